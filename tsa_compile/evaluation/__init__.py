"""How much accuracy do sparse layers cost a pretrained model, on tasks that need the whole context?

words.py        what tasks are written with: names, numbers, filler text
tasks.py        the tasks: RULER's families in plain English, a passage to copy, a text to go on with
prompts.py      a task through a tokenizer: prompts of exactly so many tokens, and the expected answer
settings.py     what is compared: dense, configurations, the control of a random selection
probe.py        how many tokens sparse layers keep, and random ones in their place
cached.py       a prefill, compiled or not, and what follows through its cache
traced.py       a model that Dynamo traces once for all settings
running.py      one prefill a sample and setting; the answer through its cache: likelihood, then greedily
limits.py       whether a model has positions for prompts of a length
study.py        evaluate(model, tokenizer, ...): every setting on the same samples; a file keeps the results, to be continued
outcomes.py     every sample's outcome
statistics.py   intervals and paired tests, by statsmodels
lm_eval.py      the model type `tsa` of lm-evaluation-harness
tables.py       outcomes against dense, as text and Markdown
"""

from tsa_compile.evaluation.outcomes import Cell, Study
from tsa_compile.evaluation.settings import DENSE, Setting
from tsa_compile.evaluation.study import evaluate
from tsa_compile.evaluation.tasks import TASKS

__all__ = ["DENSE", "TASKS", "Cell", "Setting", "Study", "evaluate"]
