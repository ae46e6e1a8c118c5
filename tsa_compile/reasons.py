"""What can become of an attention call, and why: the words of a report, with what each means and what to do about it."""

from __future__ import annotations

from enum import StrEnum


class Decision(StrEnum):
    """What became of an attention call. All but `SPARSE` and `KERNEL` compute exactly what the model wrote."""

    SPARSE = "sparse"
    DENSE = "dense"  # dense, its mask removed: is_causal
    DENSE_PADDED = "dense (padding)"  # dense, its L x L mask replaced by the padding mask behind it
    WINDOW = "dense (window)"  # dense, its L x L mask replaced by the number of tokens that each row sees
    KERNEL = "kernel"  # all tokens, by the kernel that `dense_kernel` names: as exact as that kernel is
    UNCHANGED = "unchanged"


class Reason(StrEnum):
    """Why an attention call became sparse or stayed dense."""

    SPARSE = "SPARSE"
    LAYER_NOT_SELECTED = "LAYER_NOT_SELECTED"
    LAYER_COUNT_UNKNOWN = "LAYER_COUNT_UNKNOWN"
    TOO_SHORT = "TOO_SHORT"
    LENGTH_UNKNOWN = "LENGTH_UNKNOWN"
    MASK_OPAQUE = "MASK_OPAQUE"
    MASK_FIXED = "MASK_FIXED"
    NOT_CAUSAL = "NOT_CAUSAL"
    SLIDING_WINDOW = "SLIDING_WINDOW"
    CHUNKED = "CHUNKED"
    PACKED = "PACKED"
    NOT_SELF_ATTENTION = "NOT_SELF_ATTENTION"
    NEEDS_GRAD = "NEEDS_GRAD"
    DROPOUT = "DROPOUT"
    HEAD_DIM = "HEAD_DIM"
    DTYPE = "DTYPE"
    RANK = "RANK"
    DEVICE = "DEVICE"
    KERNEL = "KERNEL"
    UNSUPPORTED_FORM = "UNSUPPORTED_FORM"
    PASS_SKIPPED = "PASS_SKIPPED"
    PASS_FAILED = "PASS_FAILED"

    @property
    def explanation(self) -> str:
        """One sentence that says what was found."""
        return EXPLANATIONS[self]

    @property
    def remedy(self) -> str | None:
        """What a user can do about it, or None where nothing is to be done."""
        return REMEDIES.get(self)

    def said(self, detail: str = "") -> str:
        """The code, what was found, and what can be done."""
        found = f"{self}: {self.explanation}" + (f" ({detail})" if detail else "")
        return " ".join(filter(None, (found, self.remedy)))


NOT_UNDERSTOOD = (Reason.MASK_OPAQUE, Reason.UNSUPPORTED_FORM, Reason.PASS_FAILED)
"""The meaning of the call could not be established; the other reasons are established facts."""

EXPLANATIONS: dict[Reason, str] = {
    Reason.SPARSE: "The call was rewritten to token sparse attention.",
    Reason.LAYER_NOT_SELECTED: "The layer is not among those that were selected to be sparse.",
    Reason.LAYER_COUNT_UNKNOWN: "The call cannot be placed among the model's layers, so the default cannot select it.",
    Reason.TOO_SHORT: "The sequence is too short for compression to drop tokens or to gain time.",
    Reason.LENGTH_UNKNOWN: "The sequence length is not known well enough to prove the rewrite right and worth it.",
    Reason.MASK_OPAQUE: "The meaning of the mask could not be proven.",
    Reason.MASK_FIXED: "The mask hides the same positions in every call, whose tokens need not be padding.",
    Reason.NOT_CAUSAL: "The attention is not causal.",
    Reason.SLIDING_WINDOW: "The mask is a sliding window.",
    Reason.CHUNKED: "The mask splits the sequence into chunks that do not see each other.",
    Reason.PACKED: "The mask separates sequences that may be packed into one row.",
    Reason.NOT_SELF_ATTENTION: "Query and key lengths are not proven equal, as in a decode step or cross-attention.",
    Reason.NEEDS_GRAD: "A gradient may be needed, and only inference is rewritten.",
    Reason.DROPOUT: "The attention uses dropout.",
    Reason.HEAD_DIM: "The head size is not supported.",
    Reason.DTYPE: "The data type is not supported.",
    Reason.RANK: "The inputs do not have the four dimensions batch, heads, length, head size.",
    Reason.DEVICE: "The device is not supported.",
    Reason.KERNEL: "No registered attention kernel fits the call.",
    Reason.UNSUPPORTED_FORM: "The call was recognised as attention, but not in a form that can be rewritten.",
    Reason.PASS_SKIPPED: "The pass that would rewrite the call is switched off.",
    Reason.PASS_FAILED: "A pass raised an error, so the graph was compiled without it.",
}

_BY_LAYER = (
    "If layers are compiled one by one (FSDP2, layer.compile(), a graph break between them), use "
    'attn_implementation="tsa" without compiling.'
)

REMEDIES: dict[Reason, str] = {
    Reason.LAYER_NOT_SELECTED: "Name the layer in `layers`.",
    Reason.LAYER_COUNT_UNKNOWN: (
        "Compile the whole model without graph breaks (regional=True compiles its layers once), or name modules by pattern "
        f"in `layers`. {_BY_LAYER}"
    ),
    Reason.TOO_SHORT: (
        "Nothing need be done where no time would be gained. To compress shorter sequences all the same, set `min_length`, "
        "or lower `min_tokens` and `window`."
    ),
    Reason.LENGTH_UNKNOWN: "Compile with a static length, or one in a range above the minimum, or set `min_length`.",
    Reason.MASK_OPAQUE: (
        f"Compile the whole model, and let it build its own causal mask, with the 2-D padding mask as input. {_BY_LAYER}"
    ),
    Reason.MASK_FIXED: "If they are padding, pass an `attention_mask` that says so: rows of padding are zeros.",
    Reason.PACKED: "Leave `position_ids` out, or pass an `attention_mask` too. Do not pack: one sequence a batch item.",
    Reason.NOT_SELF_ATTENTION: (
        "Let the model build the mask of a prefill itself, over a DynamicCache or a StaticCache. For a padded batch and a "
        'static cache generate() builds it: use a dynamic cache or attn_implementation="tsa".'
    ),
    Reason.NEEDS_GRAD: "Run the model under torch.inference_mode() or torch.no_grad().",
    Reason.DROPOUT: "Call model.eval().",
    Reason.DTYPE: "Load the model in float32, float16 or bfloat16; under autocast, in the type that autocast uses.",
    Reason.UNSUPPORTED_FORM: (
        'Load a transformers model with attn_implementation="sdpa", not "flash_attention_2": only the masks of "sdpa" can '
        "be read. Use regional=True in place of torch.compiler.nested_compile_region."
    ),
    Reason.KERNEL: 'Set `kernel="auto"`, or register a kernel that supports the call.',
    Reason.PASS_SKIPPED: "Take it out of `skip_passes`.",
    Reason.PASS_FAILED: "Use strict=True to see the error, and please report it.",
}
