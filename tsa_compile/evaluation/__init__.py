"""How much accuracy do sparse layers cost a pretrained model, on tasks that need the whole context?"""

from tsa_compile.evaluation.outcomes import Cell, Study
from tsa_compile.evaluation.settings import DENSE, Setting
from tsa_compile.evaluation.study import evaluate
from tsa_compile.evaluation.tasks import TASKS

__all__ = ["DENSE", "TASKS", "Cell", "Setting", "Study", "evaluate"]
