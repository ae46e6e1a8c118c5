"""One of two processes of tensor parallel: compares a tiny Llama that is split over both with the whole one.

Run by `test_tensor_parallel.py`. Writes a JSON object from the name of each case to the largest difference of logits.
"""

import contextlib
import copy
import json
import os
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers

from tsa_compile import ConfigError, Coverage, Floor, KeepRatio, TSAConfig, attention, prefill, reports, tsa_backend
from tsa_compile.engines import transformers as engine

# `min_length`: on a GPU the default is the length from which sparse attention is faster, and 72 tokens would stay dense.
SMALL = dict(window=4, min_tokens=4, min_length=9, floor=None, compiler="eager", layers=[0, 2])
CONFIGS = {
    "exact": TSAConfig(**{**SMALL, "layers": []}),
    "keep ratio": TSAConfig(budget=KeepRatio(0.5), **{**SMALL, "floor": Floor(8, 2)}),
    "coverage": TSAConfig(budget=Coverage(0.2), **SMALL),
    "coverage, groups": TSAConfig(budget=Coverage(0.2), granularity="group", **SMALL),
    "coverage, floor": TSAConfig(budget=Coverage(0.2), **{**SMALL, "floor": Floor(8, 2)}),
}
CHUNKED = CONFIGS["coverage, floor"]
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
DEVICE = (
    torch.device("cuda", int(os.environ["LOCAL_RANK"])) if os.environ["TSA_TEST_DEVICE"] == "cuda" else torch.device("cpu")
)
PADS = (0, 9, -13)


def batch(length=72):
    """Token ids and a mask, padded left and right."""
    mask = torch.ones(len(PADS), length, dtype=torch.long)
    mask[1, : PADS[1]], mask[2, PADS[2] :] = 0, 0
    ids = torch.randint(1, 64, mask.shape, generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=mask, use_cache=True)


def logits(model, name=None):
    """On valid rows; with an implementation of its name, if one is given."""
    if name is not None:
        model.set_attn_implementation(name)
    inputs = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in batch().items()}
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def compiled(model, wanted):
    """The differences of the compiled model by each configuration, which Dynamo traces once for all of them."""
    graphs = []

    def backend(graph_module, inputs):
        for config in CONFIGS.values():
            graphs.append(tsa_backend(copy.deepcopy(graph_module), inputs, options={"config": config}))
        return lambda *given: graphs[turn](*given)

    model.set_attn_implementation("sdpa")
    traced = torch.compile(model, backend=backend)
    found = {}
    for turn, name in enumerate(CONFIGS):  # noqa: B007 the backend reads it
        found[name] = gap(logits(traced), wanted[name])
    assert len(graphs) == len(CONFIGS), "one graph"
    return found


def chunked(model, size=36):
    """The logits of the batch in chunks through a cache."""
    inputs, cache, parts = batch(), transformers.DynamicCache(config=model.config), []
    ids, mask = inputs["input_ids"].to(DEVICE), inputs["attention_mask"].to(DEVICE)
    with torch.no_grad():
        for low in range(0, ids.shape[1], size):
            given = dict(input_ids=ids[:, low : low + size], attention_mask=mask[:, : low + size], past_key_values=cache)
            parts.append(model(**given).logits)
    return torch.cat(parts, dim=1)[mask.bool()]


def chunked_by_one_graph(model):
    """The same by the graph of `prefill(dynamic=True)`."""
    model.set_attn_implementation("sdpa")
    before = len(reports())
    with prefill(model, CHUNKED, dynamic=True):
        found = chunked(model)
    assert [report.sparse for report in reports()[before:]] == [len(CHUNKED.layers)], reports()[before:]
    return found


def gap(left, right):
    return float((left - right).abs().max())


@contextlib.contextmanager
def replaced(owner, name, value):
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


def main(checkpoint, output):
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, config in CONFIGS.items():
        attention.register(config, name=f"tsa-{[*CONFIGS].index(name)}")
    names = {name: f"tsa-{index}" for index, name in enumerate(CONFIGS)}
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    whole = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().to(DEVICE)
    wanted = {name: logits(whole, names[name]) for name in CONFIGS}
    whole.set_attn_implementation(names["coverage, floor"])
    in_chunks = chunked(whole)
    block = re.search(r"^```python\n([^`]*tp_plan.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    page = dict(
        AutoModelForCausalLM=transformers.AutoModelForCausalLM, torch=torch, Coverage=Coverage, checkpoint=checkpoint
    )
    exec(block[1], page)  # which compiles nothing until it is called
    split = page["model"]
    found = {f"eager, {name}": gap(logits(split, names[name]), wanted[name]) for name in CONFIGS}
    heads = {row.query[1] for row in attention.report(split)}
    assert heads == {whole.config.num_attention_heads // 2}, heads
    with replaced(engine.Implementation, "_group", lambda self, *given: None):
        found["by the heads of one process"] = gap(logits(split, names["coverage"]), wanted["coverage"])
    with replaced(engine, "group_of_module", lambda module: None):
        try:
            logits(split, names["coverage"])
        except ConfigError as error:
            found["refused"] = str(error)
    found["device"] = DEVICE.type
    found |= {f"compiled, {name}": value for name, value in compiled(split, wanted).items()}
    found["chunks"] = gap(chunked_by_one_graph(split), in_chunks)
    Path(output).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
