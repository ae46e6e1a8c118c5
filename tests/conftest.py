"""What every test shares: GPU tests are skipped without a GPU, and hypothesis gives the same cases on every run."""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from . import quick

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hugging Face Hub; read when its package is imported

# Triton reads this when a kernel is decorated, so it must be set before any test module imports the package.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: the first case of a test may trace or compile.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("suite")


# The modules that take longest, a minute to a quarter of one, longest first.
LONG = (
    "passes/test_programs_fuzz.py", "test_models.py", "passes/test_masks_fuzz.py", "test_chunks.py",
    "export/test_aoti.py", "export/test_onnx.py", "test_chunk_cache.py", "export/test_program.py", "test_dynamic.py",
    "test_backend.py", "kernels/test_fused.py", "passes/test_models_masks.py", "engines/test_transformers.py",
    "commands/test_cli.py", "test_documents.py", "test_benchmarks.py", "test_explanation.py", "test_failures.py",
    "export/test_standard_form.py", "export/test_benchmark.py", "test_regions.py", "engines/test_tensor_parallel.py",
    "test_training.py", "kernels/test_score.py", "kernels/test_floor.py", "export/test_triton.py",
    "commands/test_full_disk.py", "export/test_tensorrt.py", "test_handover.py", "test_examples.py", "passes/test_lower.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # Modules go to workers in the order of `LONG`: by itself, pytest-xdist begins with those of most tests, which are not
    # those that take longest, and one worker would be left alone with a long one in the end.
    missing = [name for name in LONG if not (Path(__file__).parent / name).is_file()]
    if missing:
        raise pytest.UsageError(f"LONG in {__file__} names {', '.join(missing)}, which are not there: take them out")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the workers run the tests, and start only then: Dynamo's import, some seconds, is theirs
    gc.disable()  # until all is imported: almost nothing of what imports make is garbage
    quick.dynamo()
    if os.environ.get("TRITON_INTERPRET") == "1":
        quick.interpreter()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    pyfuncitem.obj = quick.with_room_for_frames(pyfuncitem.obj)


def pytest_collection_finish() -> None:
    """What is imported stays: without a look at all of it in every garbage collection, tests take a tenth less time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def thin_out(items: list[pytest.Item]) -> None:
    """Of a test that runs kernels in the interpreter, with more than six cases, every third is not exhaustive."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.parent.name in ("kernels", "sparse") and "interpreter" in item.name:
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for same in cases.values():
        for number, item in enumerate(same if len(same) > 6 else ()):
            if number % 3:
                item.add_marker(pytest.mark.exhaustive)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
    thin_out(items)
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Each test begins with gradients enabled: a benchmark's `main` switches them off for the whole process."""
    with torch.enable_grad():
        yield


@pytest.fixture
def vectors() -> Iterator[None]:
    """Inductor writes vector instructions, as its kernel for FlexAttention on CPUs needs them (see quick.py)."""
    with importlib.import_module("torch._inductor.config").patch({"cpp.simdlen": None}):
        yield


@pytest.fixture
def fresh() -> Iterator[None]:
    """A compiler without memory: no compiled code, no reports."""
    from tsa_compile import clear_reports

    torch._dynamo.reset()
    clear_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, its tokenizer, its chat template and a text, book.txt; not to be written to."""
    from .evaluation.small import save

    return save(tmp_path_factory.mktemp("models") / "tiny", layers=1)


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as its neighbours do: by name, from the folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith(("attention", "memcheck", "models", "prefill", "vllm_serve", "windows")):
            del sys.modules[name]
