"""Token Sparse Attention for unmodified PyTorch models, as a torch.compile backend.

import torch
import tsa_compile

fast = torch.compile(model, backend="tsa")
tsa_compile.prefill(model)  # or in place, for model.generate: the prompts alone
print(tsa_compile.explain(model, input_ids=ids))
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsa_compile.backend import tsa_backend
    from tsa_compile.calibration.calibrate import Calibration, calibrate, load_calibration, preset
    from tsa_compile.calibration.loss_search import LossCalibration
    from tsa_compile.config import Coverage, Floor, KeepRatio, TSAConfig
    from tsa_compile.costs.predict import Prediction, predict
    from tsa_compile.errors import ConfigError, KernelError, RewriteError, TSAError, TSAWarning
    from tsa_compile.explanation import explain
    from tsa_compile.prefilling import Prefill, prefill
    from tsa_compile.reasons import Decision, Reason
    from tsa_compile.report import CallRow, RewriteReport, clear_reports, reports

__version__ = "0.1.0"

# In a checkout `passes` and `kernels` lie beside this folder. They are looked for there before any other installation, or a
# checkout beside an installed wheel would be made of both.
if not os.path.isdir(os.path.join(__path__[0], "passes")):
    __path__.append(os.path.dirname(__path__[0]))

__all__ = [
    "Calibration",
    "CallRow",
    "ConfigError",
    "Coverage",
    "Decision",
    "Floor",
    "KeepRatio",
    "KernelError",
    "LossCalibration",
    "Prediction",
    "Prefill",
    "Reason",
    "RewriteError",
    "RewriteReport",
    "TSAConfig",
    "TSAError",
    "TSAWarning",
    "calibrate",
    "clear_reports",
    "explain",
    "load_calibration",
    "predict",
    "prefill",
    "preset",
    "reports",
    "tsa_backend",
]

# Where each name lives. It is imported when it is asked for, so that `tsa-compile --help` need not wait for torch.
_HOMES = {
    "backend": ("tsa_backend",),
    "calibration.calibrate": ("Calibration", "calibrate", "load_calibration", "preset"),
    "calibration.loss_search": ("LossCalibration",),
    "config": ("Coverage", "Floor", "KeepRatio", "TSAConfig"),
    "errors": ("ConfigError", "KernelError", "RewriteError", "TSAError", "TSAWarning"),
    "explanation": ("explain",),
    "costs.predict": ("Prediction", "predict"),
    "prefilling": ("Prefill", "prefill"),
    "report": ("Decision", "Reason", "RewriteReport", "CallRow", "clear_reports", "reports"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
# What is an attribute of the package without being imported by name. No module is called as one of the names above: Python
# binds an imported module in its package, where it would take the name's place.
_MODULES = (*_HOMES, "attention", "calibration", "costs", "kernels", "passes", "pipeline")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            value = getattr(import_module(f"tsa_compile.{_HOME_OF[name]}"), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return import_module(f"tsa_compile.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
