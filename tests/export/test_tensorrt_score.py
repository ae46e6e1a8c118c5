"""The score plugins: their kernels called as TensorRT calls them, their stand-ins in torch, their PTX, their launches."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tsa_compile.export import _trt_describe as describe
from tsa_compile.export import _trt_plugins as plugins
from tsa_compile.export import _trt_score as score_plugins
from tsa_compile.kernels.score import score_aten

from ..support import without_interpreter
from .test_tensorrt import Symbols, descriptions, launch

# heads, kv_heads, length, head_dim, window, pool, padded
CASES = {
    "a group": (4, 2, 70, 16, 8, 7, False),
    "no tile divides": (3, 1, 83, 24, 37, 5, False),
    "several row tiles": (2, 2, 90, 16, 70, 1, False),
    "several splits": (2, 2, 1103, 16, 5, 3, False),
    "longer window than sequence": (2, 1, 19, 16, 33, 3, False),
    "padded": (4, 2, 75, 16, 8, 7, True),
    "padded, several splits and tiles": (2, 1, 1061, 24, 67, 3, True),
}


def make(heads, kv_heads, length, dim, window, pool, padded, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(3 if padded else 1, count, length, dim, generator=generator).to(dtype) for count in (heads, kv_heads)
    )
    padding = torch.rand(3, length, generator=generator) < 0.8
    padding[0, : length // 3] = False
    padding[1, 3:] = False  # fewer tokens than the window has rows
    padding[2, -1] = True
    return query, key, padding if padded else None


def chain(case, call, dtype=torch.float32):
    """The scores by way of `call(plugin)`, with what the standard form and the CPU kernel say of them."""
    heads, kv_heads, _, dim, window, pool, padded = case
    query, key, padding = make(*case, dtype=dtype)
    made = score_plugins.score_plugins(heads, kv_heads, dim, dtype, 0.3, window, pool, padded)
    rank = None if padding is None else padding.cumsum(dim=1)
    got = score_plugins.score(lambda name: call(made[name]), query, key, padding, rank, window)
    return got, score_aten(query, key, padding, 0.3, window, pool)


def in_interpreter(plugin):
    def call(*inputs):
        shape = plugin.fake(*inputs)
        # What no kernel writes must not be read either.
        output = torch.full(shape.shape, torch.nan if shape.is_floating_point() else 2**30, dtype=shape.dtype)
        launch(plugin, inputs, [output])
        return output

    return call


@pytest.mark.parametrize("case", CASES)
def test_kernels_in_a_chain_are_the_scores(case):
    got, expected = chain(CASES[case], in_interpreter)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_their_stand_ins_are_the_scores_too(case):
    got, expected = chain(CASES[case], lambda plugin: plugin.eager)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)


def test_half_precision_inputs_have_float32_scores():
    got, expected = chain(CASES["a group"], in_interpreter, torch.float16)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 300, 131072])
def test_outputs_have_the_first_inputs_dtype_and_sizes_of_inputs(length, padded):
    """As torch-tensorrt describes them: a tensor like the first input, with the shape that the fake function gives."""
    made = score_plugins.score_plugins(32, 8, 128, torch.bfloat16, 0.3, 100, 7, padded)
    seen = {}

    def op(name):
        def call(*inputs):
            output = made[name].fake(*inputs)
            seen[name] = tuple(output.shape)
            assert output.dtype == inputs[0].dtype
            sizes = {size for tensor in inputs for size in tensor.shape}
            assert set(output.shape) <= sizes
            assert len(inputs) == sum(kind.startswith("*") for _, kind in made[name].signature) - 1
            return output

        return call

    query, key = (torch.empty(2, count, length, 128, dtype=torch.bfloat16, device="meta") for count in (32, 8))
    padding = torch.empty(2, length, dtype=torch.bool, device="meta") if padded else None
    score_plugins.score(op, query, key, padding, padding, 100)
    window = {"window": (2, 100)} if padded else {}
    assert seen == {
        **window, "stats": (2, 32, 32, 100), "rows": (2, 32, 100), "mean": (2, 32, length), "pool": (2, 32, length)
    }  # fmt: skip


def test_shapes_hold_for_symbolic_sizes_without_conditions():
    """As torch-tensorrt derives a plugin's output shapes: each an input's size, none of it guarded."""
    made = score_plugins.score_plugins(4, 2, 16, torch.float32, 0.3, 8, 7, True)
    ranks = {
        "window": (2, 2, 1),
        "stats": (2, 4, 4, 2, 2, 2),
        "rows": (4, 4, 2),
        "mean": (3, 4, 4, 2, 2, 2),
        "pool": (3, 2, 2),
    }
    for name, plugin in made.items():
        environment = ShapeEnv()
        with FakeTensorMode(shape_env=environment):
            sizes = [[environment.create_unbacked_symint() for _ in range(rank)] for rank in ranks[name]]
            output = plugin.fake(*(torch.empty(shape) for shape in sizes))
        known = {size.node.expr for shape in sizes for size in shape}
        assert {size.node.expr for size in output.shape} <= known
        assert not environment.guards


def test_launches_are_what_the_kernels_expect():
    made = score_plugins.score_plugins(32, 8, 128, torch.bfloat16, 0.3, 100, 7, True)
    query, key, line = "B H L D", "B G L D", "B L"
    inputs = {
        "window": descriptions(line, line, "W"),
        "stats": descriptions("S W", query, key, line, line, "B W"),
        "rows": descriptions("B H S W", query, line),
        "mean": descriptions("B H W", query, key, line, line, "B W"),
        "pool": descriptions("B H L", line, line),
    }
    grids = {}
    symbols = SimpleNamespace(**{**vars(Symbols), "KernelLaunchParams": SimpleNamespace})
    for name, plugin in made.items():
        given = [SimpleNamespace(shape_expr=[Extent(size) for size in tensor.shape_expr]) for tensor in inputs[name]]
        params, sizes = describe.launch(plugin, describe.Compiled("k", "", 128, 0), symbols, given, [], 0)
        grids[name] = tuple(str(axis) for axis in (params.grid_x, params.grid_y, params.grid_z))
        assert sizes == ["int32(L)"]
    assert grids == {
        "window": ("cdiv(L, 1024)", "B", "1"),
        "stats": ("64", "32", "B"),  # 32 heads, two tiles of rows each
        "rows": ("2", "B*32", "1"),
        "mean": ("cdiv(L, 64)", "8", "B"),
        "pool": ("cdiv(L, 1024)", "B*32", "1"),
    }


class Extent(str):
    """A symbolic size."""

    def __mul__(self, times):
        return Extent(f"{self}*{times}")


PTX = """
import pathlib, subprocess, torch, triton
from tsa_compile.export import _trt_describe as describe, _trt_score as score_plugins

assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
shapes = [
    (80, 32, 8, 256, torch.float16, False), (90, 32, 8, 128, torch.bfloat16, True), (100, 6, 2, 256, torch.float32, True)
]
for arch, heads, kv_heads, dim, dtype, padded in shapes:
    made = score_plugins.score_plugins(heads, kv_heads, dim, dtype, dim**-0.5, 100, 7, padded)
    for name, plugin in made.items():
        if arch != 90 and name not in ("stats", "mean"):  # the rest depends on neither tiles nor head sizes
            continue
        compiled = describe.compile_ptx(plugin, arch)
        assert f".target sm_{arch}" in compiled.ptx and f".entry {compiled.kernel_name}(" in compiled.ptx
        assert compiled.ptx.count(".entry") == 1
        assert compiled.ptx.split(")")[0].count(".param .u") == len(plugin.signature), name
        assert (compiled.threads, compiled.shared <= 48 * 1024) == (128, True)
        assert "atom" not in compiled.ptx, "outputs are not initialised"
        if assembler.exists() and arch == 90:
            run = ["-arch=sm_90a", "-o", "/dev/null", "-"]
            subprocess.run([assembler, *run], input=compiled.ptx.encode(), check=True)
        print(arch, name, compiled.shared)
"""


def test_they_compile_for_every_architecture_without_a_gpu():
    pytest.importorskip("triton")
    printed = without_interpreter(PTX).splitlines()
    assert len(printed) == 2 + 5 + 2


def test_heads_without_a_kernel_stay_in_standard_operators():
    forms = plugins.PluginForms()
    query, key = torch.randn(1, 2, 20, 300), torch.randn(1, 1, 20, 300)
    assert torch.equal(forms.score(query, key, None, 0.1, 8, 3), score_aten(query, key, None, 0.1, 8, 3))
    assert not forms.used
    forms.score(query[..., :256], key[..., :256], None, 0.1, 8, 3)
    assert len(forms.used) == 4
