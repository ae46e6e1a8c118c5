"""What is no model, no configuration, no program or no report is refused where it is passed, in the package's own words."""

import pytest
import torch
from torch import nn

from tsa_compile import ConfigError, KernelError, RewriteReport, TSAConfig, attention, calibrate, explain, prefill
from tsa_compile.bench import bench
from tsa_compile.calibration.calibrate import Calibration
from tsa_compile.calibration.fingerprint import Fingerprint
from tsa_compile.evaluation.cached import check_model
from tsa_compile.export import aoti, export_program, onnx, tensorrt

INPUT = torch.ones(1, 8)
LINEAR = nn.Linear(8, 8)
CALIBRATION = Calibration(("layers.0",), (0.5,), 1.0, 30, 1, Fingerprint.of(LINEAR, [LINEAR]))

REFUSED = {
    "explain: model": (lambda: explain("my-llama", INPUT), "a str is not allowed: explain"),
    "explain: config": (lambda: explain(nn.Identity(), INPUT, config="exact"), "config='exact' is not allowed: explain"),
    "explain: a pass": (
        lambda: explain(nn.Identity(), INPUT, config=TSAConfig(skip_passes=["Verify"])),
        "skip_passes='Verify' is not allowed: the passes that can be left out are Validate",
    ),
    "explain: a long value": (
        lambda: explain(nn.Identity(), INPUT, config=[*range(1000)]),
        r"config=\[0, 1, .{,200}\.\.\. is not allowed",
    ),
    "prefill: model": (lambda: prefill("my-llama"), "a str is not allowed: prefill"),
    "prefill: config": (lambda: prefill(nn.Identity(), {"window": 8}), "is not allowed: prefill"),
    "calibrate: model": (lambda: calibrate("my-llama", [[1] * 30]), "model is a str: pass"),
    "calibrate: tokenizer": (lambda: calibrate(LINEAR, ["words"], tokenizer=3), "prompt 0 is text: pass tokenizer="),
    "Calibration.check": (lambda: CALIBRATION.check("my-llama"), "model is a str: pass"),
    "Calibration.save": (lambda: CALIBRATION.save(None), "path is a NoneType: pass the path of a file"),
    "attention.register": (lambda: attention.register("exact"), "config='exact' is not allowed: register"),
    "attention.report": (lambda: attention.report("my-llama"), "model is a str: pass"),
    "bench: model": (lambda: bench("my-llama", [64]), "model is a str: pass"),
    "bench: config": (lambda: bench(nn.Identity(), [64], config=3), "config=3 is not allowed: bench"),
    "evaluate: model": (lambda: check_model("my-llama"), "model is a str: pass"),
    "export_program: model": (lambda: export_program("my-llama", {"input_ids": INPUT}), "model is a str: pass"),
    "export_program: config": (lambda: export_program(nn.Identity(), [INPUT], 3), "config=3 is not allowed: export_program"),
    "export_program: lengths": (
        lambda: export_program(nn.Identity().eval(), [INPUT], dynamic_lengths=8),
        r"dynamic_lengths must be \(shortest, longest\)",
    ),
    "aoti.save": (lambda: aoti.save("model", "m.pt2"), "program is a str: pass what export_program returns"),
    "onnx.save": (lambda: onnx.save("model", "m.onnx"), "program is a str: pass what export_program returns"),
    "tensorrt.save": (lambda: tensorrt.save("model", "m.ts"), "program is a str: pass what export_program returns"),
    "RewriteReport, no JSON": (lambda: RewriteReport.from_json("{"), "no report can be read"),
    "RewriteReport, other JSON": (lambda: RewriteReport.from_json("{}"), "no report can be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_the_wrong_kind_is_named(case):
    call, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        call()


def test_a_kernel_that_is_not_there_is_named_before_anything_is_traced():
    with pytest.raises(KernelError, match="unknown attention kernel 'fast'"):
        explain(nn.Identity(), INPUT, config=TSAConfig(kernel="fast"))
