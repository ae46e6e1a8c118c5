"""What devices reach: measured rates, and those of other devices scaled from them. What calls.py computes with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from tsa_compile.errors import ConfigError


@dataclass(frozen=True)
class DeviceCosts:
    """Measured rates of one device: teraFLOP/s, terabytes (read plus written) per second, milliseconds."""

    name: str
    attention_tflops: float
    """What dense attention approaches at long lengths."""
    attention_half_length: float
    """Rows at which attention reaches half of that, its launch apart."""
    attention_ms: float
    """One attention launch."""
    attention_exponential: float
    """The exponential of a pair of rows takes as long as so many products of the D + Dv."""
    attention_sustained_ms: float
    """Attention that takes longer slows down: the device lowers its clock."""
    attention_slowdown: float
    """By this share of the time beyond."""
    score_tflops: float
    """Of the products in `score`, apart from its bytes."""
    matmul_tflops: float
    """Of a layer's projections and MLP."""
    bandwidth_tbs: float
    """What the gathering, scattering and reading kernels reach."""
    select_tbs: float
    """Of `select`, mostly from the L2 cache."""
    sparse_ms: float
    """What the sparse path takes at any length: launches, and kernels too small to fill the device."""
    count_ms: float
    """The same of the count: `budget`'s kernels, and the host that waits for it."""
    host_ms: float
    """What a slow host takes to launch the sparse path: what a call takes where the host does not run ahead."""

    def scaled(self, name: str, *, attention: float = 1.0, compute: float = 1.0, bandwidth: float = 1.0) -> DeviceCosts:
        """Another device of which only ratios of rates are known; launches take what they take here."""
        return replace(
            self,
            name=name,
            attention_tflops=self.attention_tflops * attention,
            score_tflops=self.score_tflops * compute,
            matmul_tflops=self.matmul_tflops * attention,  # whoever multiplies faster does so in every layer
            bandwidth_tbs=self.bandwidth_tbs * bandwidth,
            select_tbs=self.select_tbs * min(compute, bandwidth),
        )


# torch 2.11, cuDNN 9.19, bfloat16, causal, medians. attention_*: a fit (tests/costs/test_calls.py) of dense attention from
# 4K to 128K and of the compressed rows of keep 0.3, 0.5 and 0.675 (23 times), with a rate that is 1% higher, as a second
# machine was 4% faster between 8K and 64K. At 128K dense attention took 249 to 256 ms in three runs, where the fit says
# 232; all up to 105 ms is on the curve. exponential: from head sizes 64 and 256 at 32K. score to select solve one measured
# step at 128K, B=1 H=32 G=8 D=128, for the rate (GPU ms, benchmarks/attention.py --parts stages): score 0.712 ms, select
# 0.125, compress 0.680 and decompress 0.405 at keep 0.5. matmul: 84 ms of projections and MLP in a layer of Llama-3.1-8B.
# sparse_ms: at 4K and 8K these steps take 0.03 ms more than the rates say; the rest is left for a host that does not run
# ahead. count_ms: a layer at 32K took 0.5 to 1 ms longer where the host read the count: budget, 0.03 to 0.2 ms on the GPU,
# which then waits until what depends on it is launched. host_ms: calls at 4K, 0.18 ms of work, took 0.33 to 0.69 ms on the
# hosts of four machines; a model of two layers was 6% slower there than with dense attention.
H200 = DeviceCosts(
    name="NVIDIA H200",
    attention_tflops=612,
    attention_half_length=640,
    attention_ms=0.013,
    attention_exponential=71,
    attention_sustained_ms=110,
    attention_slowdown=0.15,
    score_tflops=480,
    matmul_tflops=680,
    bandwidth_tbs=3.85,
    select_tbs=0.73,
    sparse_ms=0.08,
    count_ms=0.5,
    host_ms=0.7,
)
H200_PROCESSORS = 132
H200_BUS = 4.9  # TB/s that torch computes from the memory's clock and width, not what is reached
# The same chip with slower memory (3.35 instead of 4.8 TB/s); attention takes what it takes on an H200, within 7%. From
# benchmarks/results/attention-h100.md, at 128K and keep 0.5: compress 0.944 ms, decompress 0.560 (the bandwidth), score
# 0.706. There launches are remembered: 32K tokens took 0.55 ms longer where the host read the count, budget's 0.06 included.
H100 = replace(H200, name="NVIDIA H100 80GB HBM3", bandwidth_tbs=2.87, score_tflops=500, count_ms=0.35)
MEASURED = {"h200": H200, "h100": H100}


@functools.lru_cache
def for_device(device: torch.device) -> DeviceCosts:
    """The costs of a CUDA device: measured, else the H200's, scaled by multiprocessors and memory bandwidth.

    Attention is assumed as fast per multiprocessor as on the H200, and twice as fast from Blackwell on: faster than it is
    on older and smaller devices, so that the sparse path starts late there rather than early. A device that tells no
    bandwidth is taken for a slow one.
    """
    properties = torch.cuda.get_device_properties(device)
    for costs in MEASURED.values():
        if costs.name == properties.name:
            return costs
    compute = properties.multi_processor_count / H200_PROCESSORS
    # kHz and bits, two transfers a cycle. Builds for some devices know neither.
    bus = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8 / 1e12
    return H200.scaled(
        properties.name,
        attention=compute * (2 if properties.major >= 10 else 1),
        compute=compute,
        bandwidth=bus / H200_BUS if bus else 0.2,
    )


def is_cpu(device: torch.device | str | DeviceCosts | None) -> bool:
    """Whether a CPU is asked about, where speed is not claimed: by itself, or by one of its names ("cpu:0")."""
    return isinstance(device, (torch.device, str)) and str(device).partition(":")[0] == "cpu"


def costs_of(device: torch.device | str | DeviceCosts | None = None) -> tuple[DeviceCosts, tuple[str, ...]]:
    """The costs of a device, and what must be said about them.

    Args:
        device: a device, its name, the name of one that was measured ("h200", "h100"), or costs. None is the CUDA device if
            there is one. Of a CPU, and of CUDA where there is none, nothing is known: then the figures are the H200's.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(device, DeviceCosts):
        return device, ()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, str):
        for short, costs in MEASURED.items():
            if device.lower() in (short, costs.name.lower()):
                return costs, ()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        known = ", ".join(map(repr, MEASURED))
        raise ConfigError(
            f"device={device!r} is not known: device must be a torch.device, its name, {known}, or a DeviceCosts"
        ) from error
    if found.type != "cuda" or not torch.cuda.is_available():
        why = "there is no CUDA device here" if found.type == "cuda" else f"speed is not claimed on {found.type}"
        return H200, (f"{why}: all figures are those of one {H200.name}",)
    if (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={str(found)!r} does not exist: there are {torch.cuda.device_count()} CUDA devices")
    costs = for_device(found)
    if costs in MEASURED.values():
        return costs, ()
    return costs, (f"{costs.name} was not measured: its costs are the {H200.name}'s, scaled by processors and bandwidth",)
