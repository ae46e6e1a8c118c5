"""transformers' tensor parallel over two processes equals one process, compiled and not."""

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tsa_compile import Reason, TSAConfig, attention, reports
from tsa_compile.kernels import fused, ranks
from tsa_compile.kernels.fused import Options
from tsa_compile.kernels.padded import valid_ranges

from ..support import difference, heads, mixed_padding, tiny, tokens

CASES = ["exact", "keep ratio", "coverage", "coverage, groups", "coverage, floor"]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def found(request, tmp_path_factory):
    """What each of the two processes found, over gloo or over NCCL."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    if transformers.__version__ < "5.24" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers before 5.24 splits models by accelerate only")
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny("llama", initializer_range=0.02)
    for layer in model.model.layers:  # from flat attention to sharp: the two processes would decide otherwise
        layer.self_attn.q_proj.weight.data.unflatten(0, (4, -1)).mul_(torch.tensor([1, 4, 16, 64])[:, None, None])
    model.save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_ranks.py")
    processes = []
    for rank in range(2):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1", "TSA_TEST_DEVICE": request.param}
        if request.param == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # Not `-P script`: a script's own folder is the first place of its path, and holds nothing that is imported.
        command = [sys.executable, "-P", str(script), str(folder / "model"), str(folder / f"{rank}.json")]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = []
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(found, how, case):
    assert max(process[f"{how}, {case}"] for process in found) < (1e-3 if found[0]["device"] == "cuda" else 1e-5)


@pytest.mark.slow
def test_chunks_of_two_processes_by_one_graph(found):
    assert max(process["chunks"] for process in found) < (1e-3 if found[0]["device"] == "cuda" else 1e-5)


@pytest.mark.slow
def test_the_heads_of_one_process_would_keep_other_tokens(found):
    """Or nothing was tested."""
    assert max(process["by the heads of one process"] for process in found) > 1e-3


@pytest.mark.slow
def test_coverage_is_refused_where_no_group_is_known(found):
    assert all("LlamaAttention that has 2 of 4 heads" in process["refused"] for process in found)


@pytest.fixture
def group(tmp_path):
    """The name of a group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("fresh", "group")
@pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse")
class TestFullySharded:
    """FSDP2: not compiled, a model is sparse. Compiled, Dynamo breaks at every layer, and the report says what to do."""

    CONFIG = TSAConfig(window=8, min_tokens=8, compiler="eager")

    @pytest.fixture
    def inputs(self):
        return dict(input_ids=tokens(3, 40), attention_mask=mixed_padding(40))

    def sharded(self, implementation):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, mesh = tiny("llama", implementation), init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def test_not_compiled_it_equals_the_plain_model(self, inputs):
        name = attention.register(self.CONFIG, name="tsa-sharded")
        model = self.sharded(name)
        with torch.no_grad():
            found, plain = model(**inputs).logits, tiny("llama", name)(**inputs).logits
        assert difference(found, plain, inputs["attention_mask"]) == 0
        assert attention.report(model).sparse == 2

    @pytest.mark.slow
    def test_compiled_it_names_what_needs_no_graph(self, inputs):
        with torch.no_grad():
            torch.compile(self.sharded("sdpa"), backend="tsa", options={"config": self.CONFIG})(**inputs)
        rows = [row for report in reports() for row in report]
        assert {row.reason for row in rows} == {Reason.MASK_OPAQUE}
        for reason in (Reason.MASK_OPAQUE, Reason.LAYER_COUNT_UNKNOWN):
            assert 'attn_implementation="tsa"' in reason.remedy


@pytest.mark.usefixtures("group")
class TestMeanOverRanks:
    """Of one process: the mean over its heads."""

    def test_mean(self, group):
        scores = torch.rand(2, 3, 9)
        scores[..., -2:], scores[0, :, :4] = torch.inf, -torch.inf
        assert torch.allclose(ranks.mean_over_ranks(scores, group), scores.mean(1, keepdim=True))
        torch.library.opcheck(ranks.mean_over_ranks, (scores, group))

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("path", [fused._plain, fused.padded_sparse_triton], ids=["ATen", "Triton"])
    def test_the_op_asks_for_it(self, group, path, shared):
        """Once a call, with the mean over its heads as the answer here."""
        alone = Options(0.2, 4, 7, 0.2, None, 3, None, shared, "auto", floor_window=6, floor_sinks=2)
        padding = mixed_padding(40).bool()
        where = (padding,) if path is fused._plain else (padding, valid_ranges(padding))
        found = path(*heads(3), *where, dataclasses.replace(alone, group=group))
        assert difference(found, path(*heads(3), *where, alone)) < 1e-6
