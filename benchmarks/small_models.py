"""Any architecture of transformers at a small size, with random weights, and prompts for it: padded, not, or with an image.

Nothing here knows one architecture by name. A configuration's sizes are known by their names, those of its parts (a vision
tower, a text model) too. How an image is passed, and how many tokens it becomes, is found by trying.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LENGTH, PADDING, LARGEST = 72, 7, 60e6
VOCAB, WIDTH, LAYERS, HEADS = 64, 32, 2, 4
PATCH, GRID, FRAMES = 4, 4, 2
"""Pixels of a patch's side, patches of an image's side, and frames that one patch takes."""
IMAGE_TOKEN, FIRST_WORD = 5, 12
"""Token ids: words are none of those with a meaning."""
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
IMAGE_SIZES = {
    **dict.fromkeys(("embed_dim", "out_hidden_size", "projection_dim", "hidden_dim", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), WIDTH),
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
    **dict.fromkeys(("vision_start_token_id", "boi_token_index", "boi_token_id"), 8),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_index", "eoi_token_id"), 9),
    **dict.fromkeys(("depth", "num_global_layers"), LAYERS),
    **{name: [0] for name in ("fullatt_block_indexes", "deepstack_visual_indexes")},
    **dict(image_size=PATCH * GRID, patch_size=PATCH, temporal_patch_size=FRAMES, spatial_merge_size=2),
    **dict(video_token_id=6, audio_token_id=7, mm_tokens_per_image=4, vocab_size_per_layer_input=VOCAB),
    **dict(hidden_size_per_layer_input=8),
}
HEAD_SIZES: tuple[dict[str, int], ...] = (
    {"num_key_value_heads": 2, "head_dim": 8},
    {"num_key_value_heads": HEADS},
    {"num_key_value_heads": HEADS, "head_dim": 8},
    {},
)


def kinds(images: bool) -> list[str]:
    """The model types of causal language models, or of those that read images and text."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if images else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind: str, images: bool) -> tuple[str, Any]:
    """The form of attention and the model; the last error if no candidate runs."""
    error: Exception = ValueError("no candidate")
    auto = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    for form, heads in itertools.product(("sdpa", "eager"), HEAD_SIZES):  # the likeliest first
        try:
            return form, _model(auto, _small(transformers.CONFIG_MAPPING[kind], heads), form)
        except Exception as failure:  # noqa: BLE001, a foreign model may raise anything at sizes that it was not made for
            error = failure
    raise error


def _small(kind: type, heads: dict[str, int]) -> Any:
    """A configuration of that class, its parts made small as well."""
    default = kind()
    values = default.to_dict()
    own: dict[str, Any] = {}
    if values.get("sliding_window"):  # where layers have one, a window that a short prompt feels
        own["sliding_window"] = 16
    if values.get("layer_types"):  # one layer of each kind, as far as there are layers
        own["layer_types"] = (list(dict.fromkeys(values["layer_types"])) * LAYERS)[:LAYERS]
    if "vision" in kind.__name__.lower():
        heads = {}
    sizes = {name: value for name, value in (SIZES | IMAGE_SIZES | heads | own).items() if name in values}
    rotary = values.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary:  # positions of three dimensions share a head of 8
        sizes["rope_parameters"] = {**rotary, "mrope_section": [2, 1, 1]}
    parts = {name: getattr(default, name, None) for name in getattr(kind, "sub_configs", {})}
    return kind(**sizes, **{name: _small(type(part), heads) for name, part in parts.items() if part is not None})


def _model(auto: Any, config: Any, form: str) -> Any:
    """A model that runs; its size is known before its weights are made."""
    with torch.device("meta"):
        shapes = auto.from_config(config, attn_implementation=form)
    size = sum(parameter.numel() for parameter in shapes.parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters, with every size known here made small")
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=form).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)  # more than training begins with, where attention is nearly uniform
        model(input_ids=torch.full((2, 16), FIRST_WORD))
    return model


def prompts(model: Any, images: bool) -> list[dict[str, Tensor]]:
    """Two items with padding on the left of one, the same without a mask, and if possible padded ones with an image each."""
    ids = torch.randint(FIRST_WORD, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    found = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}]
    with_image = next(_with_image(model, found[0]), None) if images else None
    return found if with_image is None else [*found, with_image]


def _with_image(model: Any, prompt: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The prompt with an image in the middle of each item, in those ways in which it makes a difference."""
    takes = inspect.signature(model.forward).parameters
    for pixels, count in itertools.product(_pixels(), (16, 4, 1, 8, 2, 9, 64, 17, 5, 20)):
        ids = prompt["input_ids"].clone()
        ids[:, 20 : 20 + count] = IMAGE_TOKEN  # behind the padding
        kinds_of = dict.fromkeys(takes.keys() & {"token_type_ids", "mm_token_type_ids"}, (ids == IMAGE_TOKEN).long())
        given = {**prompt, "input_ids": ids, **pixels, **kinds_of}
        other = {**given, "pixel_values": pixels["pixel_values"] + 1}
        try:
            with torch.no_grad():
                if not torch.equal(model(**given).logits, model(**other).logits):
                    yield given
        except Exception:  # noqa: BLE001, a foreign model may raise anything where an image is not passed so: the next way
            continue


def _pixels() -> Iterator[dict[str, Tensor]]:
    """Images of two items as models take them: whole, as one of several, or as patches with where these lie."""
    draw, side, places = torch.Generator().manual_seed(1), PATCH * GRID, GRID * GRID
    sizes = {"image_sizes": torch.tensor([[side, side]] * 2)}
    for shape, more in itertools.product(((2, 3, side, side), (2, 1, 3, side, side)), ({}, sizes)):
        yield {"pixel_values": torch.randn(shape, generator=draw), **more}
    grid = {"image_grid_thw": torch.tensor([[1, GRID, GRID]] * 2)}
    for frames in (FRAMES, 1):
        yield {"pixel_values": torch.randn(2 * places, 3 * frames * PATCH**2, generator=draw), **grid}
    lie = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).expand(2, -1, -1)
    yield {"pixel_values": torch.randn(2, places, 3 * PATCH**2, generator=draw), "image_position_ids": lie}
