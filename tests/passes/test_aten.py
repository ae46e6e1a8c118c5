"""What is recorded of a graph: operators with all their arguments, values that writes do not change, and where they are."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tsa_compile.passes.aten import unknown, users
from tsa_compile.passes.graph import fake
from tsa_compile.passes.operators import arguments
from tsa_compile.passes.record import _Recording, record
from tsa_compile.testing import capture, capture_all

from .program_check import quick
from .programs import generate

aten = torch.ops.aten


def recorded(function, *args, **options):
    graph_module = capture(function, *args, **options)
    return graph_module, record(graph_module)


def named(graph_module, name):
    return next(node for node in graph_module.graph.nodes if node.name == name)


def targets(graph):
    return [call.target for call in graph.calls.nodes if call.target is not unknown]


@torch._dynamo.allow_in_graph
def softmax(x, dim):
    return x.relu()


class TestOperators:
    @pytest.mark.parametrize(
        "call",
        [
            lambda x, y: torch.where(x > 0, x, y),
            lambda x, y: x.where(x > 0, y),
            lambda x, y: torch.where(condition=x > 0, input=x, other=y),
            lambda x, y: aten.where.self(x > 0, x, y),
            lambda x, y: aten.where(x > 0, x, y),
        ],
        ids=["function", "method", "by name", "overload", "packet"],
    )
    def test_every_spelling_is_one_operator(self, call):
        _, graph = recorded(call, torch.randn(3), torch.randn(3))
        (found,) = [node for node in graph.calls.nodes if node.target is aten.where.self]
        condition, chosen, other = arguments(found)
        assert condition.target is aten.gt.Scalar
        assert [graph.holder(value).name for value in (chosen, other)] == ["l_x_", "l_y_"]

    def test_a_function_is_what_it_does(self):
        _, graph = recorded(lambda x: softmax(x, -1), torch.randn(3, 3))
        assert targets(graph) == [aten.relu.default]

    def test_defaults_are_filled_in(self):
        _, graph = recorded(lambda x: F.scaled_dot_product_attention(x, x, x), torch.randn(1, 1, 4, 8))
        (call,) = [node for node in graph.calls.nodes if "attention" in str(node.target)]
        assert arguments(call)[3:] == (None, 0.0, False, None, False)

    @pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)], ids=str)
    @pytest.mark.parametrize("out", [(), (5,)], ids=str)
    def test_a_projection_is_one_operator(self, shape, out):
        _, graph = recorded(F.linear, torch.randn(shape), torch.randn(*out, 3))
        (call,) = [node for node in graph.calls.nodes if node.target is aten.linear.default]
        assert targets(graph) == [aten.linear.default] and not graph.problems
        assert fake(call).shape == (*shape[:-1], *out) and fake(call).is_contiguous()

    def test_a_projection_under_autocast_is_of_its_type(self):
        def project(x, w):
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(x, w)

        _, graph = recorded(project, torch.randn(2, 3), torch.randn(5, 3))
        (call,) = [node for node in graph.calls.nodes if node.target is aten.linear.default]
        assert fake(call).dtype == torch.bfloat16 and not graph.problems

    def test_autocast_is_left_where_the_recording_begins_anew(self):
        def change(x):
            with torch.autocast("cpu", torch.bfloat16):
                mask = x + 0
                return mask.unsqueeze_(0) @ x  # a change of a shape that was taken from the trace

        recorded(change, torch.randn(3, 3))
        assert not torch.is_autocast_enabled("cpu")

    def test_equal_calls_are_one_value(self):
        _, graph = recorded(lambda x: x.clamp(max=1) + x.clamp(max=1), torch.randn(3))
        assert targets(graph).count(aten.clamp.default) == 1

    def test_draws_are_two(self):
        _, graph = recorded(lambda x: F.dropout(x, 0.5) + F.dropout(x, 0.5), torch.randn(3))
        assert targets(graph).count(aten.dropout.default) == 2

    def test_constants_keep_their_number(self):
        _, graph = recorded(lambda x: x * torch.tensor(0.5), torch.randn(3))
        (product,) = [node for node in graph.calls.nodes if node.target is aten.mul.Tensor]
        assert arguments(product.args[1])[1] == 0.5


class TestWrites:
    def test_a_value_never_changes(self):
        def function(x):
            y = x + 1
            y.mul_(2)
            return y - 1

        _, graph = recorded(function, torch.randn(3))
        added, multiplied, subtracted = (node for node in graph.calls.nodes if node.target is not unknown)
        assert (multiplied.target, multiplied.args[0]) == (aten.mul_.Tensor, added)
        assert subtracted.args[0] is multiplied

    @pytest.mark.parametrize(
        "write",
        [
            lambda y: y[0].mul_(2),
            lambda y: y.t().zero_(),
            lambda y: y.__setitem__(0, 1.0),
            lambda y: torch.neg(y, out=y),
            lambda y: y.numpy().fill(1.0),
        ],
        ids=["part", "view", "setitem", "out", "numpy"],
    )
    def test_what_shares_memory_is_another_value(self, write):
        def function(x):
            y = x + 1
            write(y)
            return y - 1

        graph_module, graph = recorded(function, torch.randn(3, 3))
        (added,) = [node for node in graph.calls.nodes if node.target is aten.add.Tensor]
        (subtracted,) = [node for node in graph.calls.nodes if node.target is aten.sub.Tensor]
        assert subtracted.args[0] is not added
        assert graph.source(added, named(graph_module, graph.holder(subtracted).name)) is None
        assert graph.source(subtracted.args[0], graph.holder(subtracted)) is not None

    def test_running_statistics(self):
        def function(x, mean, variance):
            before = mean + 0
            F.batch_norm(x, mean, variance, training=True)
            return before + mean

        _, graph = recorded(function, torch.randn(4, 3), torch.zeros(3), torch.ones(3))
        total = [node for node in graph.calls.nodes if node.target is aten.add.Tensor][-1]
        assert total.args[1].target is unknown and total.args[1].args, "the mean after the write is another value"

    def test_shapes_changed_in_place(self):
        def function(x):
            y = x + 1
            y.t_()
            return y * 2

        _, graph = recorded(function, torch.randn(2, 3))
        (added,) = [node for node in graph.calls.nodes if node.target is aten.add.Tensor]
        assert list(fake(added).shape) == [2, 3]


class TestUnknown:
    def test_bodies_are_recorded(self):
        _, graph = recorded(
            lambda x: checkpoint(lambda y: F.scaled_dot_product_attention(y, y, y), x, use_reentrant=False) + x,
            torch.randn(1, 1, 4, 8),
        )
        (call,) = [node for node in graph.calls.nodes if "dot_product" in str(node.target)]
        assert call.meta["inside"] == "tag_activation_checkpoint"
        assert graph.holder(call) is None

    def test_a_node_that_fails_may_have_written(self):
        graph_module = capture(lambda x: (x + 1).relu() - 1, torch.randn(3))
        relu = named(graph_module, "relu")
        relu.args, relu.target = (*relu.args, 3, 4), "relu"
        graph = record(graph_module)
        assert relu in graph.problems
        added = next(node for node in graph.calls.nodes if node.target is aten.add.Tensor)
        assert graph.source(added, named(graph_module, "sub")) is None

    def test_vmap_over_symbolic_sizes(self):
        """What torch.vmap wraps has symbols for its sizes, and no numbers that a constant could be made of."""

        def masked(x):
            below = torch.arange(x.shape[1])[None] <= torch.arange(x.shape[1])[:, None]
            return torch.vmap(lambda row: below & row)(x[:, None] > 0).float()

        assert record(capture(masked, torch.randn(2, 4), dynamic=True)).problems == {}

    def test_vmap_hides_values(self):
        _, graph = recorded(lambda x: torch.vmap(lambda row: row + 1)(x) * 2, torch.randn(3, 4))
        assert aten.add.Tensor not in targets(graph)
        assert aten.mul.Tensor in targets(graph)
        assert not graph.problems


class TestPurity:
    @pytest.mark.parametrize(
        "call, pure",
        [
            (lambda x: x.clamp(max=1), True),
            (lambda x: F.dropout(x, 0.5, training=False), True),
            (lambda x: F.dropout(x, 0.5), False),
            (lambda x: torch.rand_like(x), False),
            (lambda x: x.clone().add_(1), False),
        ],
        ids=["pointwise", "dropout in evaluation", "dropout", "random", "in place"],
    )
    def test_is_pure(self, call, pure):
        graph_module, graph = recorded(lambda x: call(x) + 1, torch.randn(3))
        nodes = [node for node in graph_module.graph.nodes if node.op in ("call_function", "call_method")]
        assert graph.is_pure(nodes[-2]) is pure

    def test_type_checks_are_no_readers(self):
        _, graph = recorded(lambda x: (x + 1).relu(), torch.randn(3))
        (added,) = [node for node in graph.calls.nodes if node.target is aten.add.Tensor]
        assert [user.target for user in users(added)] == [aten.relu.default]


def test_symbolic_sizes_add_no_guards():
    graph_module = capture(lambda x: F.softmax(x @ x.mT, -1) @ x, torch.randn(2, 3, 5, 4), dynamic=True)
    shapes = next(fake(node).node.shape_env for node in graph_module.graph.nodes if isinstance(fake(node), torch.SymInt))
    before = len(shapes.guards)
    graph = record(graph_module)
    assert not graph.problems and len(shapes.guards) == before


class TestWhatTheTraceHas:
    """Single operators are not run again: the trace has what they make."""

    def written(self, graph):
        """All that is recorded, as text."""
        values = [
            (str(call.format_node()), call.meta["origin"], call.meta["inside"], layout(call.meta["val"]))
            for call in graph.calls.nodes
        ]
        return values, graph.problems, graph.impure, graph.order, str(graph.holders), str(graph.values)

    @pytest.mark.parametrize("seed", range(8))
    def test_it_is_what_running_them_makes(self, seed):
        program = generate(seed)
        with quick(program):
            (graph_module, *_) = capture_all(program.function(), *program.inputs(0), dynamic=bool(program.dynamic)).graphs
        run_again = _Recording(graph_module, borrows=False).run(graph_module)
        assert self.written(record(graph_module)) == self.written(run_again)

    def test_it_is_not_run(self):
        graph_module, graph = recorded(lambda x: (x * 2).view(-1).relu(), torch.randn(3, 4))
        held = [
            graph.values[node].meta["val"] is fake(node) for node in graph_module.graph.nodes if node.op.startswith("call")
        ]
        assert held == [True] * 3

    def test_a_cast_to_the_type_that_it_has_is_its_input(self):
        _, graph = recorded(lambda x: x.to(torch.float32).contiguous() + 1, torch.randn(3))
        assert targets(graph) == [aten.add.Tensor]

    @pytest.mark.parametrize(
        "change",
        [lambda y: y.unsqueeze_(0), lambda y: y.view(6).unsqueeze_(0), lambda y: y.t_()],
        ids=["of itself", "of a view", "its strides"],
    )
    def test_a_change_of_its_shape_leaves_it_alone(self, change):
        def function(x):
            y = x + 1
            return y.sum(), change(y)

        graph_module = capture(function, torch.randn(2, 3))
        before = {node: layout(fake(node)) for node in graph_module.graph.nodes}
        graph = record(graph_module)
        assert {node: layout(fake(node)) for node in graph_module.graph.nodes} == before
        assert self.written(graph) == self.written(_Recording(graph_module, borrows=False).run(graph_module))


def layout(value):
    return f"{value.shape} {value.stride()} {value.dtype}" if isinstance(value, torch.Tensor) else str(value)
