"""Token Sparse Attention for unmodified PyTorch models, as a torch.compile backend.

import torch
import tsa_compile

fast = torch.compile(model, backend="tsa")
print(tsa_compile.explain(model, input_ids=ids))
"""

from tsa_compile.backend import tsa_backend
from tsa_compile.config import Coverage, KeepRatio, TSAConfig
from tsa_compile.errors import ConfigError, KernelError, RewriteError, TSAError, TSAWarning
from tsa_compile.explain import explain
from tsa_compile.report import Decision, Reason, RewriteReport, SiteRow, clear_reports, reports

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Coverage",
    "Decision",
    "KeepRatio",
    "KernelError",
    "Reason",
    "RewriteError",
    "RewriteReport",
    "SiteRow",
    "TSAConfig",
    "TSAError",
    "TSAWarning",
    "clear_reports",
    "explain",
    "reports",
    "tsa_backend",
]
