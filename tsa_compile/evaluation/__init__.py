"""How much accuracy do sparse layers cost, and what do they save, on tasks that need the whole context?

tasks.py        the questions: RULER's families and MQAR, generated
methods.py      what is compared: dense, budgets, controls
probe.py        what the sparse layers select: a pass over the rewritten graph
study.py        evaluate(model, ...): every method on the same samples
outcomes.py     every sample's outcome, by method, task and length
results.py      Study: outcomes as JSON, tables and figures
statistics.py   intervals, McNemar's test
"""

from tsa_compile.evaluation.methods import STANDARD, Method
from tsa_compile.evaluation.outcomes import Cell, LayerRow, Timing
from tsa_compile.evaluation.results import Study
from tsa_compile.evaluation.study import evaluate
from tsa_compile.evaluation.tasks import TASKS, VOCABULARY, Samples, generate

__all__ = [
    "STANDARD",
    "TASKS",
    "VOCABULARY",
    "Cell",
    "LayerRow",
    "Method",
    "Samples",
    "Study",
    "Timing",
    "evaluate",
    "generate",
]
