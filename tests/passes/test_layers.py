"""Which layer a call belongs to: the number that is proven to be the layer's, or none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile.config import KeepRatio, TSAConfig
from tsa_compile.errors import TSAWarning
from tsa_compile.passes.find import FindCalls
from tsa_compile.passes.layers import module_name, unwrapped
from tsa_compile.pipeline import run_passes
from tsa_compile.reasons import Reason
from tsa_compile.report import reports
from tsa_compile.testing import capture, capture_all

from ..support import exhaustive_but

CONFIG = TSAConfig(budget=KeepRatio(0.5), window=4, min_tokens=4, compiler="eager")
WIDTH = 16
UNKNOWN = Reason.LAYER_COUNT_UNKNOWN

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:no attention call of this graph became sparse"),
]


class Attention(nn.Module):
    """Causal attention with two heads over [B, L, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        x = self.project(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
        return hidden + F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, hidden):
        return self.attention(hidden)


class Stack(nn.Module):
    """Numbered members; `call` says how one is called."""

    def __init__(self, members, call=lambda member, hidden: member(hidden)):
        super().__init__()
        self.layers = members if isinstance(members, nn.Module) else nn.ModuleList(members)
        self.call = call

    def forward(self, hidden):
        members = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        for member in members:
            hidden = self.call(member, hidden)
        return hidden


def hidden(length=32):
    return torch.randn(1, length, WIDTH)


def decided(model, config=CONFIG, **kwargs):
    """(layer, number, reason) of each call, graph after graph."""
    compiled = torch.compile(model, backend="tsa", options={"config": config}, **kwargs)
    with torch.no_grad():
        compiled(hidden())
    return [(row.layer, row.layer_index, row.reason) for report in reports() for row in report]


def sparse(model, config=CONFIG, **kwargs):
    return [layer for layer, _, reason in decided(model, config, **kwargs) if reason is Reason.SPARSE]


def numbers(model):
    return [number for _, number, _ in decided(model)]


def pairs(count):
    """[attention, feed-forward] lists, as some libraries build their layers."""
    return [nn.ModuleList([Attention(), nn.Linear(WIDTH, WIDTH)]) for _ in range(count)]


def both(member, hidden):
    return member[1](member[0](hidden))


class TestTheNumberThatVaries:
    def test_lists_of_attention_and_feed_forward(self):
        assert sparse(Stack(pairs(4), both)) == ["layers.2.0", "layers.3.0"]
        assert sparse(Stack(pairs(4), both), CONFIG.replace(layers=[1])) == ["layers.2.0", "layers.3.0", "layers.1.0"]

    def test_sequences_with_a_norm_first(self):
        blocks = (nn.Sequential(nn.LayerNorm(WIDTH), Attention()) for _ in range(3))
        assert sparse(Stack(blocks)) == ["layers.1.1", "layers.2.1"]

    def test_attention_and_feed_forward_in_turns(self):
        """Every second member has attention: the stack is as long as the list."""
        blocks = [Block() if number % 2 == 0 else nn.Linear(WIDTH, WIDTH) for number in range(8)]
        assert sparse(Stack(blocks)) == ["layers.4.attention", "layers.6.attention"]

    def test_a_model_of_one_layer(self):
        assert sparse(Stack([Block()])) == ["layers.0.attention"]

    def test_stages_of_blocks(self):
        """Near-miss: the first number repeats, and so does the second."""
        stages = (nn.Sequential(Block(), Block()) for _ in range(2))
        assert {reason for *_, reason in decided(Stack(stages))} == {Reason.LAYER_COUNT_UNKNOWN}

    def test_numbers_that_go_on_through_stages(self):
        """Each call has an own second number, so it is the layer's."""
        stages = (nn.ModuleDict({str(2 * stage + i): Block() for i in range(2)}) for stage in range(2))
        model = Stack(stages, lambda stage, hidden: [hidden := block(hidden) for block in stage.values()][-1])
        assert sparse(model, CONFIG.replace(layers=[1, 2])) == ["layers.0.1.attention", "layers.1.2.attention"]

    def test_self_and_cross_attention_of_one_class(self):
        blocks = (nn.ModuleList([Attention(), Attention()]) for _ in range(3))
        assert numbers(Stack(blocks, both)) == [None] * 6

    def test_one_layer_with_two_numbers(self):
        assert numbers(Stack(pairs(1), both)) == [None]

    def test_one_call_beside_other_members(self):
        """A norm and attention in a sequence: 1 is the attention's place in its layer."""
        assert numbers(nn.Sequential(nn.LayerNorm(WIDTH), Attention())) == [None]

    def test_two_stacks(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = Stack(Block() for _ in range(2)), Stack(Block() for _ in range(4))

            def forward(self, hidden):
                return self.decoder(self.encoder(hidden))

        wanted = ["encoder.layers.1.attention", "decoder.layers.2.attention", "decoder.layers.3.attention"]
        assert sparse(Model()) == wanted

    def test_one_node_by_itself(self):
        node = torch.fx.Graph().placeholder("x")
        node.meta["nn_module_stack"] = {"a": ("L['self'].blocks[4].attention", nn.Module)}
        assert module_name(node) == "blocks.4.attention"
        node.meta["nn_module_stack"] = {"a": ("L['self'].blocks[4].heads.1", nn.Module)}
        assert module_name(node) == "blocks.4.heads.1"


class Shared(nn.Module):
    """One layer for all depths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, hidden):
        for _ in range(4):
            hidden = self.layers[0](hidden)
        return hidden


class TestOneModuleAppliedSeveralTimes:
    def test_no_number(self):
        for layers in (None, [0], [2]):
            found = decided(Shared(), CONFIG.replace(layers=layers))
            assert found[-4:] == [("layers.0.attention", None, Reason.LAYER_COUNT_UNKNOWN)] * 4
        assert len(sparse(Shared(), CONFIG.replace(layers=["layers.0.*"]))) == 4

    def test_under_several_names(self):
        block = Block()
        assert numbers(Stack([block, block, block])) == [None] * 3

    def test_a_whole_stack_twice(self):
        stack = Stack(Block() for _ in range(2))
        assert numbers(Stack([stack, stack])) == [None] * 4

    def test_two_calls_in_one_module(self):
        """Near-miss: the module is applied once."""

        class Double(Attention):
            def forward(self, hidden):
                return super().forward(super().forward(hidden))

        assert numbers(Stack(Double() for _ in range(2))) == [0, 0, 1, 1]

    def test_exported(self):
        program = torch.export.export(Shared().eval(), (hidden(),), strict=False)
        assert [row.layer_index for row in run_passes(program.graph_module, CONFIG)] == [None] * 4


class Towers(nn.Module):
    """Two stacks that Dynamo compiles by themselves, as their owner does what it cannot trace."""

    def __init__(self):
        super().__init__()
        self.tower, self.text = Tower(Block() for _ in range(2)), Stack(Block() for _ in range(4))

    @torch.compiler.disable(recursive=False)
    def forward(self, hidden):
        return self.text(self.tower(hidden))


class Tower(Stack):
    pass


class TestParts:
    def test_layers_that_are_compiled_one_by_one(self):
        """Whatever selects some of them selects none, and it is said that it may have been asked for."""
        for layers in (None, [0], [1], [2], ["layers.1.*"], ["*.2.attention"]):
            torch._dynamo.reset()
            model = Stack(Block() for _ in range(3))
            model.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
            with pytest.warns(TSAWarning, match=r"LAYER_COUNT_UNKNOWN.*compiles its module by itself"):
                assert {reason for *_, reason in decided(model, CONFIG.replace(layers=layers))} == {UNKNOWN}

    def test_a_pattern_that_fits_every_one_of_them(self):
        model = Stack(Block() for _ in range(3))
        model.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
        assert set(sparse(model, CONFIG.replace(layers=["*"]))) == {"attention"}

    def test_layers_that_the_user_compiles_one_by_one(self):
        model = Stack(nn.Sequential(nn.LayerNorm(WIDTH), Attention()) for _ in range(3))
        for block in model.layers:
            block.compile(backend="tsa", options={"config": CONFIG.replace(layers=[1])})
        with torch.no_grad():
            model(hidden())
        assert {row.reason for report in reports() for row in report} == {Reason.LAYER_COUNT_UNKNOWN}

    def test_lists_inside_layers_that_are_compiled_one_by_one(self):
        model = Stack(Stack([Attention(), Attention()]) for _ in range(3))
        for block in model.layers:
            block.compile(backend="tsa", options={"config": CONFIG})
        with torch.no_grad():
            model(hidden())
        assert {row.reason for report in reports() for row in report} == {Reason.LAYER_COUNT_UNKNOWN}

    def test_a_function_that_layers_share(self):
        attention = torch.compile(F.scaled_dot_product_attention, backend="tsa", options={"config": CONFIG, "layers": [0]})

        class Mine(nn.Module):
            def forward(self, x):
                return attention(x, x, x, is_causal=True)

        with torch.no_grad():
            Mine()(torch.randn(1, 2, 32, 8))
            assert {row.reason for row in reports()[-1]} == {Reason.LAYER_COUNT_UNKNOWN}
            torch._dynamo.reset()
            attention(*torch.randn(3, 1, 2, 32, 8), is_causal=True)
        assert {row.reason for row in reports()[-1]} == {Reason.SPARSE}, "by itself it is all that was compiled"

    def test_towers_have_the_names_that_the_model_gives_them(self):
        names = [f"tower.layers.{i}.attention" for i in range(2)] + [f"text.layers.{i}.attention" for i in range(4)]
        assert [name for name, *_ in decided(Towers())] == names
        assert len(reports()) == 2
        for pattern in ("text.layers.3.*", "layers.3.*"):
            torch._dynamo.reset()
            assert sparse(Towers(), CONFIG.replace(layers=[pattern]))[-1] == "text.layers.3.attention"

    def test_behind_a_graph_break(self):
        """The list says how many layers there are, and a graph that ends at a break does not hold the rest."""

        class Broken(Stack):
            def forward(self, hidden):
                hidden = self.layers[1](self.layers[0](hidden))
                torch._dynamo.graph_break()
                return self.layers[3](self.layers[2](hidden))

        model = Broken(Block() for _ in range(4))
        unknown, chosen = [Reason.LAYER_COUNT_UNKNOWN] * 2, [Reason.SPARSE] * 2
        first, second = capture_all(model, hidden()).graphs
        assert [row.reason for row in run_passes(first, CONFIG)] == unknown
        assert [row.reason for row in run_passes(second, CONFIG)] == chosen
        assert [row.layer_index for row in run_passes(capture_all(model, hidden()).graphs[1], CONFIG)] == [2, 3]

    def test_calls_without_a_module_behind_a_graph_break(self):
        def two(x):
            x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            torch._dynamo.graph_break()
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

        with torch.no_grad():
            torch.compile(two, backend="tsa", options={"config": CONFIG, "layers": [0]})(torch.randn(1, 2, 32, 8))
        assert [row.reason for report in reports() for row in report] == [Reason.LAYER_COUNT_UNKNOWN] * 2


class TestStagesOfAPipeline:
    @pytest.mark.parametrize("stage, wanted", [((0, 1), []), ((2, 3), [2, 3]), ((3,), [3])], ids=str)
    def test_keep_their_numbers(self, stage, wanted):
        model = Stack(nn.ModuleDict({str(number): Block() for number in stage}))
        assert sparse(model, CONFIG.replace(layers=[2, 3])) == [f"layers.{number}.attention" for number in wanted]

    def test_do_not_know_how_many_layers_there_are(self):
        model = Stack(nn.ModuleDict({str(number): Block() for number in (2, 3)}))
        assert {reason for *_, reason in decided(model)} == {Reason.LAYER_COUNT_UNKNOWN}

    def test_reach_their_layers_by_getattr(self):
        class Stage(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Module()
                for number in range(4):
                    self.inner.add_module(str(number), Block())

            def forward(self, hidden):
                for number in range(4):
                    hidden = getattr(self.inner, str(number))(hidden)
                return hidden

        assert sparse(Stage()) == ["inner.2.attention", "inner.3.attention"]


class Wrapper(nn.Module):
    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)
        self.name = name

    def forward(self, hidden):
        return getattr(self, self.name)(hidden)


NAMES = [["module"], ["model", "base_model"], ["_fsdp_wrapped_module"], ["_orig_mod", "module"]]


class TestWrappers:
    @pytest.mark.parametrize("names", exhaustive_but(NAMES, NAMES[1]))
    @pytest.mark.parametrize("layers", [None, [2], ["layers.2.*"]], ids=str)
    def test_names_are_those_of_the_model(self, names, layers):
        model = Stack(Block() for _ in range(3))
        for name in names:
            model = Wrapper(name, model)
        assert "layers.2.attention" in sparse(model, CONFIG.replace(layers=layers))
        full = [name for name, _ in model.named_modules() if name.endswith("layers.2.attention")]
        torch._dynamo.reset()
        assert sparse(model, CONFIG.replace(layers=full))[-1] == "layers.2.attention"

    def test_compiled_inside(self):
        inner = torch.compile(Stack(Block() for _ in range(2)), backend="eager")
        assert sparse(Wrapper("model", inner)) == ["model.layers.1.attention"]

    @pytest.mark.parametrize(
        "name, shown",
        [
            ("module.module.layers.3", "layers.3"),
            ("base_model.model.model.layers.3", "model.layers.3"),
            ("_orig_mod.layers._checkpoint_wrapped_module.3", "layers.3"),
            ("model.module.3", "model.module.3"),
            ("base_model.layers.3", "base_model.layers.3"),
        ],
    )
    def test_what_is_a_wrapper(self, name, shown):
        assert unwrapped(name) == shown

    def test_data_parallel_buckets(self, tmp_path):
        """DDP cuts the graph at its buckets, and each part is compiled by itself."""
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            blocks = (nn.Sequential(Block(), nn.Linear(WIDTH, 1 << 16), nn.Linear(1 << 16, WIDTH)) for _ in range(4))
            model = nn.parallel.DistributedDataParallel(Stack(blocks), bucket_cap_mb=1)
            wanted = ["layers.2.0.attention", "layers.3.0.attention"]
            assert sparse(model, CONFIG.replace(layers=[2, 3])) == wanted
            torch._dynamo.reset()
            assert sparse(model, CONFIG.replace(layers=["layers.[23].*"]))[2:] == wanted
            assert len(reports()) > 1
        finally:
            torch.distributed.destroy_process_group()


class TestWhatIsNotFound:
    def test_a_part_may_lack_what_the_model_has(self, recwarn):
        assert sparse(Towers(), CONFIG.replace(layers=["text.layers.0.*"])) == ["text.layers.0.attention"]
        assert not [warning for warning in recwarn if issubclass(warning.category, TSAWarning)]

    @pytest.mark.parametrize("layers", [[7], ["decoder.*"]], ids=str)
    def test_what_no_part_has_is_said_once(self, layers):
        with pytest.warns(TSAWarning, match="not found") as said:
            assert not sparse(Towers(), CONFIG.replace(layers=layers))
        assert len(said) == 1 and len(reports()) == 2

    def test_a_number_that_is_not_known_cannot_be_missing(self, recwarn):
        block = Block()
        assert not sparse(Stack([block, block]), CONFIG.replace(layers=[1]))
        assert not [warning for warning in recwarn if "not found" in str(warning.message)]


def test_graphs_that_nobody_remembers_the_frame_of():
    """What the graph itself shows: calls that are told apart by one number."""
    graph = capture(Stack(pairs(4), both), hidden())
    graph.meta.clear()
    assert [row.layer for row in run_passes(graph, CONFIG).sparse_calls] == ["layers.2.0", "layers.3.0"]


def test_finding_places_takes_little_time_in_large_models():
    graph = capture(Stack(Block() for _ in range(64)), hidden())
    from time import perf_counter

    from tsa_compile.passes.base import GraphState

    state, start = GraphState(CONFIG), perf_counter()
    FindCalls(state)(graph)
    assert len(state.plans) == 64 and perf_counter() - start < 2
