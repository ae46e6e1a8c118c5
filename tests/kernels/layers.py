"""Options of whole sparse layers, and what the reference computes with them."""

import dataclasses

from tsa_compile.kernels import reference
from tsa_compile.kernels.options import Options

SCALE = 0.25
HALF = Options(SCALE, 4, 7, None, 0.5, 3, None, False, "auto")
COVER = dataclasses.replace(HALF, coverage=0.1, keep_ratio=None)

OPTIONS = {
    "keep_ratio": HALF,
    "coverage": COVER,
    "coverage_0": dataclasses.replace(COVER, coverage=0.0),
    "keep_all": dataclasses.replace(HALF, keep_ratio=1.0),
    "group": dataclasses.replace(COVER, shared=True),
    "capacity": dataclasses.replace(COVER, capacity=12),
    "capacity_of_a_ratio": dataclasses.replace(HALF, capacity=12),
    "few_tokens": dataclasses.replace(COVER, min_tokens=100),
    "floor": dataclasses.replace(HALF, keep_ratio=0.2, floor_window=6, floor_sinks=2),
    "floor_coverage": dataclasses.replace(COVER, coverage=0.3, floor_window=6, floor_sinks=2),
    "floor_group": dataclasses.replace(COVER, coverage=0.3, shared=True, floor_window=9, floor_sinks=1),
    "max": dataclasses.replace(COVER, reduce="max"),
    "floor_max": dataclasses.replace(HALF, keep_ratio=0.2, floor_window=6, floor_sinks=2, reduce="max"),
    "floor_keep_all": dataclasses.replace(HALF, keep_ratio=1.0, floor_window=6, floor_sinks=2),
}


def expected(query, key, value, padding, options, sink_logits=None):
    scalars = dataclasses.asdict(options)
    scalars["granularity"] = "group" if scalars.pop("shared") else "head"
    scalars.pop("kernel"), scalars.pop("group")
    wide = (tensor.cpu().double() for tensor in (query, key, value))
    return reference.token_sparse_attention(*wide, padding, **scalars, sink_logits=sink_logits)
