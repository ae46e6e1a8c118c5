"""Which of transformers' causal language models gain: every architecture, tiny and with random weights, on a CPU.

    python benchmarks/models.py --out benchmarks/results           all of them, a quarter of an hour with --processes 2
    python benchmarks/models.py --models llama falcon gpt_oss      some

Each is run as it is, then through backend="tsa" in exact mode and with all layers sparse that keep all tokens, so that it
must compute the same; two prompts, one with padding and one without a mask, and the first in two chunks through a cache.
A row says what became of its attention calls and the largest difference of the logits, relative to their norm, at valid
tokens; whether the second chunk has sparse layers too, or "-" where the model itself takes none. What cannot be built at a
small size, or needs a package that is not there, is listed with the reason. The exit code is 1 if a result differs, from
plain torch.compile's as well, or the backend fails where plain torch.compile does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tsa_compile import Coverage, TSAConfig, reports
from tsa_compile.reasons import Decision
from tsa_compile.report import clear_reports

LENGTH, PADDING, LARGEST, TOLERANCE = 72, 7, 60e6, 1e-4
VOCAB, WIDTH, LAYERS, HEADS = 64, 32, 2, 4
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "d_ff"), WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict(vocab_size=VOCAB, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1),
    **dict(topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
HEAD_SIZES: tuple[dict[str, int], ...] = (
    {"num_key_value_heads": 2, "head_dim": 8},
    {"num_key_value_heads": HEADS},
    {"num_key_value_heads": HEADS, "head_dim": 8},
    {},
)
SAME: dict[str, Any] = dict(window=4, min_tokens=4, min_length=1, compiler="eager")
PLAIN, PLAIN_TOO = "difference to plain torch.compile", " (plain torch.compile too)"
MODES = {"exact": TSAConfig(layers=[], **SAME), "sparse": TSAConfig(budget=Coverage(0), layers=["*"], **SAME)}


def candidates(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The forms of attention to ask for, and small sizes, the likeliest first."""
    default = transformers.CONFIG_MAPPING[kind]().to_dict()
    own: dict[str, Any] = {}
    if default.get("sliding_window"):  # where layers have one, a window that a short prompt feels
        own["sliding_window"] = 16
    if default.get("layer_types"):  # one layer of each kind, as far as there are layers
        own["layer_types"] = (list(dict.fromkeys(default["layer_types"])) * LAYERS)[:LAYERS]
    for form, heads in itertools.product(("sdpa", "eager"), HEAD_SIZES):
        yield form, {name: value for name, value in (SIZES | heads | own).items() if name in default}


def build(kind: str) -> tuple[str, Any]:
    """The form of attention and the model; the last error if no candidate runs."""
    error: Exception = ValueError("no candidate")
    for form, sizes in candidates(kind):
        try:
            return form, build_one(transformers.CONFIG_MAPPING[kind](**sizes), form)
        except Exception as failure:  # noqa: BLE001, a foreign model may raise anything at sizes that it was not made for
            error = failure
    raise error


def build_one(config: Any, form: str) -> Any:
    """A model that runs; its size is known before its weights are made."""
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=form)
    size = sum(parameter.numel() for parameter in shapes.parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters, with every size known here made small")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=form).eval()
    with torch.no_grad():
        model(input_ids=torch.full((2, 16), 5))
    return model


def prompts() -> list[dict[str, Tensor]]:
    """Two items with padding on the left of one, and the same without a mask."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}]


def logits_of(model: Any) -> list[Tensor]:
    """Of each prompt, at its valid tokens [n, V]."""
    found = []
    with torch.no_grad():
        for prompt in prompts():
            valid = prompt.get("attention_mask", torch.ones_like(prompt["input_ids"])).bool()
            found.append(model(**prompt).logits.float()[valid])
    return found


def chunk_logits(model: Any) -> Tensor:
    """Of the padded prompt in two chunks through a cache, at its valid tokens; the reports are those of the second chunk."""
    prompt = prompts()[0]
    ids, mask, parts = prompt["input_ids"], prompt["attention_mask"], []
    cache = transformers.DynamicCache(config=getattr(model, "_orig_mod", model).config)
    with torch.no_grad():
        for low, high in ((0, LENGTH // 2), (LENGTH // 2, LENGTH)):
            clear_reports()
            parts.append(
                model(ids[:, low:high], attention_mask=mask[:, :high], past_key_values=cache, use_cache=True).logits
            )
    return torch.cat(parts, dim=1).float()[mask.bool()]


def chunks_of(model: Any) -> list[Tensor]:
    """The same, or nothing where the model takes no chunks."""
    try:
        return [chunk_logits(model)]
    except Exception:  # noqa: BLE001, a foreign model may raise anything; the table has "-" for it
        return []


def compare(model: Any, wanted: list[Tensor], chunks: list[Tensor], mode: str) -> dict[str, Any]:
    """What became of the attention calls, and the largest relative difference."""
    torch._dynamo.reset()
    clear_reports()
    compiled = torch.compile(model, backend="tsa", options={"config": MODES[mode]})
    found = logits_of(compiled)
    calls = [row for report in first_compilations() for row in report]
    result = {
        "calls": len(calls),
        "decisions": dict(Counter(row.decision.value for row in calls)),
        "reasons": sorted({row.reason.value for row in calls if row.decision is Decision.UNCHANGED}),
    }
    if chunks:
        found, wanted = [*found, chunk_logits(compiled)], [*wanted, *chunks]
        result["chunks"] = sorted({row.decision.value for report in reports() for row in report})
    result["difference"] = difference(found, wanted)
    if not result["difference"] < TOLERANCE:  # then plain torch.compile may differ from the model as well
        torch._dynamo.reset()
        plain = torch.compile(model, backend="eager")
        result[PLAIN] = difference(found, [*logits_of(plain), *(chunks_of(plain) if chunks else [])])
    return result


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest of the prompts', relative to the norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def first_compilations() -> list[Any]:
    """The graphs of the first prompt: each layer once, though the second prompt is another graph, or several are."""
    seen: set[str] = set()
    kept = []
    for report in reports():
        names = {row.layer for row in report}
        if not names & seen:
            kept.append(report)
            seen |= names
    return kept


def examine(kind: str) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"model": kind}
    try:
        row["form"], model = build(kind)
        wanted, chunks = logits_of(model), chunks_of(model)
    except Exception as error:  # noqa: BLE001, as in `build`; the table says what it was
        return row | {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:90]}
    for mode in MODES:
        try:
            row[mode] = compare(model, wanted, chunks, mode)
        except Exception as error:  # noqa: BLE001, a failure is what this looks for: a row that makes the exit code 1
            row["failed"] = f"{mode}: {type(error).__name__}: {error}".splitlines()[0][:200] + plain_too(model)
    return row


def examined(kinds: list[str], processes: int) -> Iterator[dict[str, Any]]:
    """The rows, in order."""
    if processes == 1:
        quiet()
        yield from map(examine, kinds)
        return
    with multiprocessing.get_context("spawn").Pool(processes, quiet) as pool:
        yield from pool.imap(examine, kinds)


def quiet() -> None:
    """Without the warnings of foreign models, once in each process."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # recompilation limits of graph-breaking models


def plain_too(model: Any) -> str:
    """Whether torch.compile without this package fails as well."""
    torch._dynamo.reset()
    try:
        logits_of(torch.compile(model, backend="eager"))
    except Exception as error:  # noqa: BLE001, any failure of torch's own clears this package
        return f" (plain torch.compile fails too: {type(error).__name__})"
    return ""


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row shows a fault of this package."""
    failed = "failed" in row and "plain torch.compile fails too" not in row["failed"]
    differences = (row[mode].get(PLAIN, row[mode]["difference"]) for mode in MODES if mode in row)
    return failed or any(not found < TOLERANCE for found in differences)


def summarise(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many architectures of each kind there are."""
    ran = [row for row in rows if all(mode in row for mode in MODES)]
    gains = [row for row in ran if set(row["exact"]["decisions"]) & {"dense", "dense (padding)"}]
    return {
        "architectures": len(rows), "ran": len(ran), "wrong": sum(map(is_wrong, rows)), "exact gain": len(gains),
        "can be sparse": sum("sparse" in row["sparse"]["decisions"] for row in ran),
        "in chunks": sum("sparse" in row["sparse"].get("chunks", ()) for row in ran),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row an architecture, then those that did not run."""
    lines = [
        "| model | form | attention calls: exact | all layers sparse | in chunks | left alone because | difference |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        if all(mode in row for mode in MODES):
            exact, sparse = row["exact"], row["sparse"]
            behind = "sparse" if "sparse" in sparse.get("chunks", ()) else "no" if "chunks" in sparse else "-"
            cells = [row["model"], row["form"], describe(exact), describe(sparse), behind, ", ".join(sparse["reasons"])]
            torchs_own = PLAIN in {*exact, *sparse} and not is_wrong(row)
            cells.append(f"{max(exact['difference'], sparse['difference']):.0e}{PLAIN_TOO * torchs_own}")
            lines.append(f"| {' | '.join(cells)} |")
    rest = [
        f"- {row['model']}: {row.get('failed') or row['skipped']}" for row in rows if "failed" in row or "skipped" in row
    ]
    return "\n".join([*lines, "", "Not run, or not through:", "", *rest])


def describe(result: dict[str, Any]) -> str:
    """Decisions and how many of each."""
    return ", ".join(f"{count} {name}" for name, count in sorted(result["decisions"].items())) or "none found"


def main(given: list[str] | None = None) -> int:
    """Examines, prints and writes; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="KIND", help="model types, as config.model_type names them")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for models.json and models.md")
    arguments = parser.parse_args(given)
    kinds = arguments.models or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown := [kind for kind in kinds if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]:
        parser.error(f"{', '.join(unknown)}: not a causal language model of transformers {transformers.__version__}")
    rows = []
    for number, row in enumerate(examined(kinds, arguments.processes), 1):
        rows.append(row)
        print(f"{number}/{len(kinds)}", json.dumps(row), file=sys.stderr, flush=True)
    conditions = {"torch": torch.__version__, "transformers": transformers.__version__, **summarise(rows)}
    text = f"{conditions}\n\n{table(rows)}\n"
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "models.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
        (arguments.out / "models.md").write_text(text)
    return 1 if any(map(is_wrong, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
