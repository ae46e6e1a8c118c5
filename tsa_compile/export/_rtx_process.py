"""Parses an ONNX file with TensorRT-RTX, and builds an engine of it: python _rtx_process.py job.json answer.json

A program of its own, which imports nothing of this package: whatever the library does, the process that asked goes on.

    job      {"model": path, "engine": path | null, "profiles": [{input: [shortest, best, longest]}],
              "capabilities": ["SM89"], "decompose": bool}
    answer   {"version": "1.7.1.116", "built": bool, "said": [the library's errors],
              "errors": [{"node": name, "operator": "TopK", "reason": text}],
              "attention": [{"node": name, "dtype": "FLOAT", "head_dim": 64}]}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as rtx  # type: ignore[import-not-found]


class Log(rtx.ILogger):  # type: ignore[misc]
    """Keeps the errors; what else the library says is dropped."""

    def __init__(self) -> None:
        rtx.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by the library."""
        if severity in (rtx.ILogger.INTERNAL_ERROR, rtx.ILogger.ERROR):
            self.errors.append(message)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    log = Log()
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    parsed = parser.parse_from_file(job["model"])
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    errors = [{"node": e.node_name(), "operator": e.node_operator(), "reason": e.desc()} for e in found]
    attention = [layer for layer in map(network.get_layer, range(network.num_layers)) if is_attention(layer)]
    answer = {"version": rtx.__version__, "built": False, "said": log.errors, "errors": errors}
    answer["attention"] = [describe(layer) for layer in attention]
    if parsed and job["engine"] is not None:
        for layer in attention if job["decompose"] else ():
            layer.__class__ = rtx.IAttentionInputLayer  # the binding hands out layers as what they all are
            layer.attention.decomposable = True
        engine = builder.build_serialized_network(network, configuration(builder, network, job))
        if engine is not None:
            Path(job["engine"]).write_bytes(engine)
            answer["built"] = True
    return answer


def is_attention(layer: Any) -> bool:
    """Whether a layer is the first of the two that an Attention becomes."""
    return bool(layer.type == rtx.LayerType.ATTENTION_INPUT)


def describe(layer: Any) -> dict[str, Any]:
    """What decides whether there is a kernel for an Attention."""
    query = layer.get_input(0)
    return {"node": layer.name.removesuffix("_AttentionInput"), "dtype": query.dtype.name, "head_dim": query.shape[-1]}


def configuration(builder: Any, network: Any, job: dict[str, Any]) -> Any:
    """The ranges of the inputs, and the devices to build for."""
    config = builder.create_builder_config()
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for index, name in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(rtx.ComputeCapability, name), index)
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name in names & set(shapes):
            profile.set_shape(name, *shapes[name])
        config.add_optimization_profile(profile)
    return config


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
