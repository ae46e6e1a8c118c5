"""Look into a graph, and change it with a pass of your own: `tsa_compile.testing` and the normal form.

    python examples/write_a_pass.py

First: what torch.compile makes of a model, which attention calls are in it, and what their mask was proven to mean.
Then: a pass by which neighbouring sparse layers share one selection, run between this package's passes and the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tsa_compile import KeepRatio, TSAConfig
from tsa_compile.passes.call import AttentionCall
from tsa_compile.passes.find import find_calls
from tsa_compile.passes.graph import fake
from tsa_compile.passes.masks.infer import infer_mask
from tsa_compile.passes.masks.info import MaskInfo
from tsa_compile.testing import capture_all, count_ops, evaluate_mask, run_nodes

LENGTH = 300


def build_model() -> torch.nn.Module:
    """A small Llama with random weights; all of its eight layers will be sparse."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=8, **shape)).eval()


def prompts() -> dict[str, Tensor]:
    """Two prompts; the first is shorter and padded on the left."""
    ids = torch.randint(256, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    return {"input_ids": ids, "attention_mask": mask}


def describe(call: AttentionCall, info: MaskInfo) -> str:
    """A call in normal form, and its mask as a formula over positions: [kv - q <= 0] is one atom of it."""
    query, key = tuple(fake(call.query).shape), tuple(fake(call.key).shape)
    return f"{call.layer}: {call.form}, query {query}, key {key}\n  mask     {info}\n  formula  {info.predicate}"


def formula_is_the_mask(graph: GraphModule, inputs: tuple[Any, ...], call: AttentionCall, info: MaskInfo) -> bool:
    """Holds the formula, evaluated at every position, against the tensor that the model builds."""
    values = run_nodes(graph, inputs)
    batch, heads, length, _ = fake(call.query).shape
    formula = evaluate_mask(info, (batch, heads, length, length), values)
    return torch.equal(formula, values[call.masks[0].mask.name].expand_as(formula))


def inspect(model: torch.nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Prints what is known of the model's first attention call; returns whether its mask was understood rightly."""
    captured = capture_all(model, **inputs)
    graph = captured.graphs[0]
    call = find_calls(graph)[0]
    info = infer_mask(call)
    right = formula_is_the_mask(graph, captured.inputs[0], call, info)
    print(f"{describe(call, info)}\n  equal to the mask that the model builds, at every position: {right}")
    return right


def share_selections(graph_module: GraphModule) -> GraphModule:
    """Every second sparse layer uses the tokens that the layer before it has selected.

    before   indices_2 = tsa.select(scores_2, count_2, C)
    after    indices_2 = indices_1, count_2 = count_1; the second layer's score, budget and select are dead and go
    """
    graph = graph_module.graph
    selects = graph.find_nodes(op="call_function", target=torch.ops.tsa.select.default)
    for first, second in zip(selects[::2], selects[1::2]):
        count = second.args[1]
        second.replace_all_uses_with(first)
        if count is not None:
            count.replace_all_uses_with(first.args[1])
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    return graph_module


class WithPass:
    """What compiles the rewritten graph: the pass first, then another compiler. Counts ops before and after."""

    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.counts.append(count_ops(graph_module, "score", "select", "compress"))
        share_selections(graph_module)
        self.counts.append(count_ops(graph_module, "score", "select", "compress"))
        return graph_module.forward  # or torch._inductor.compile_fx.compile_fx(graph_module, list(example_inputs))


def main() -> tuple[bool, list[dict[str, int]]]:
    """Inspects a mask, then compiles with the pass; returns what the two have shown."""
    model, inputs = build_model(), prompts()
    understood = inspect(model, inputs)
    config = TSAConfig(layers=list(range(8)), budget=KeepRatio(0.5), window=32, min_tokens=64)
    compiler = WithPass()
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(model, backend="tsa", options={"config": config, "compiler": compiler})(**inputs)
    before, after = compiler.counts
    print(f"\nops before the pass  {before}\nops after it         {after}")
    return understood, compiler.counts


if __name__ == "__main__":
    main()
