"""Products of written-out attention: which tensors [B, H, L, D] stand behind them, and whether matrices belong together.

    matmul(q, transpose(k))        q [B, H, Lq, D], k [B, H, Lk, D]; or bmm of [B * H, L, D], baddbmm, einsum
    matmul(weights, v)             weights [B, H, Lq, Lk], v [B, H, Lk, Dv]

All are recorded operators (aten.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tsa_compile.passes.graph import fake, known
from tsa_compile.passes.operators import arguments, aten, functional, without_copies

CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
)  # fmt: skip
SAME = (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)
VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a float8 loses is more than rounding


def factors_of(product: Node) -> tuple[Any, Any]:
    """The two factors of a product."""
    if functional(product.target) is aten.baddbmm.default:
        return product.args[1], product.args[2]
    if product.target is aten.einsum.default:
        factors: Any = product.args[1]
        return (factors[0], factors[1]) if len(factors) == 2 else (None, None)
    return product.args[0], product.args[1]


def are_matched(call: Node, product: Node, query: Node, key: Node, value: Node) -> bool:
    """Whether both products pair the matrices of one item and head, as those of [B, H, ..] with [B, H or G, ..] do.

    Of a matrix in three dimensions the first is B * H, so it must be that in both factors: beside four dimensions it would
    be broadcast over the batch.
    """
    wanted = fake(query).shape[:2]
    for left, right, source in ((*factors_of(product), key), (*factors_of(call), value)):
        if fake(left).dim() != fake(right).dim():
            return False
        flat = fake(left).dim() == 3
        pairs = [*zip(fake(source).shape[: 1 + flat], wanted, strict=False)]
        if flat:
            pairs.append((fake(left).shape[0], fake(right).shape[0]))
        elif fake(left).dim() == 4:
            pairs += zip(fake(left).shape[:2], wanted, strict=True)
        if not all(known(a == b) for a, b in pairs):
            return False
    return True


def query_and_key(product: Node) -> tuple[Any, Any]:
    """Query [B,H,Lq,D] and key [B,H,Lk,D] of a product [B,H,Lq,Lk]; None for what is not of that form."""
    left, right = factors_of(product)
    if product.target is aten.einsum.default:
        return (left, right) if is_equation(product, "bhqd,bhkd->bhqk") else (None, None)
    flat = _transposed(right)
    key = four_dimensional(flat) if flat is not None else _transposed(four_dimensional(right))
    return four_dimensional(left), key


def is_equation(einsum: Node, form: str) -> bool:
    """Whether an equation is of a form, whatever its letters."""
    equation = str(einsum.args[0]).replace(" ", "")
    if len(equation) != len(form):
        return False
    letters = dict(zip(form, equation, strict=True))
    same = "".join(letters[letter] for letter in form) == equation
    distinct = len({letters[letter] for letter in "bhqkd"}) == 5
    return same and distinct and all(letters[sign] == sign for sign in ",->")


def _transposed(node: Any) -> Any:
    """Key [.., L, D] behind the [.., D, L] that is multiplied from the right; None if it is not its transpose."""
    node = without_copies(node)
    if not isinstance(node, Node):
        return None
    rank, swapped = fake(node).dim(), False
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        swapped = {dim % rank for dim in arguments(node)[1:3]} == {rank - 2, rank - 1}
    elif node.target is aten.permute.default:
        swapped = [dim % rank for dim in arguments(node)[1]] == [*range(rank - 2), rank - 1, rank - 2]
    elif node.target is aten.mT.default:
        swapped = True
    return node.args[0] if swapped else None


def four_dimensional(node: Any) -> Any:
    """[B, H, L, D] behind a [B * H, L, D] that is a view of it; a tensor of four dimensions is itself."""
    while isinstance(node, Node) and fake(node).dim() == 3:
        inner = without_copies(node)
        if inner.target not in VIEWS or not keeps_last_two(inner):
            return None
        node = inner.args[0]
    return node if isinstance(node, Node) and fake(node).dim() == 4 else None


def keeps_last_two(view: Node) -> bool:
    """Whether a view only splits or joins dimensions in front of the last two."""
    before, after = fake(view.args[0]), fake(view)
    if before.dim() < 3 or after.dim() < 3:
        return False
    return all(known(a == b) for a, b in zip(before.shape[-2:], after.shape[-2:], strict=True))


def holds(dtype: torch.dtype, needed: torch.dtype) -> bool:
    """Whether a type holds what another one does, to the last bit and in range."""
    return dtype == needed or (dtype in FLOATS and dtype.itemsize > needed.itemsize)
