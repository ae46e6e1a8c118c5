"""What the tests of `attn_implementation="tsa"` share: settings, tiny models and what they report."""

import contextlib
import itertools
import warnings

import torch

from tsa_compile import Floor, KeepRatio, TSAConfig, TSAWarning, attention

from ..support import tiny

LENGTH = 50
SMALL = dict(window=4, min_tokens=4, compiler="eager")
FLOOR = TSAConfig(budget=KeepRatio(0.5), layers=[0, 2], floor=Floor(8, 2), **SMALL)
ATOL = 1e-5

numbers = itertools.count()


def sparse(name, config=FLOOR, **changes):
    """A tiny model whose attention follows a configuration, whatever other models of the test follow."""
    return tiny(name, attention.register(config, name=f"tsa-{next(numbers)}"), **changes)


def logits(model, *inputs, **named):
    with torch.no_grad():
        return model(*inputs, **named).logits


def rows_of(report):
    return [(row.layer_index, row.decision, row.reason) for row in report]


def reasons(model):
    return [row.reason for row in attention.report(model)]


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", TSAWarning)
        yield
