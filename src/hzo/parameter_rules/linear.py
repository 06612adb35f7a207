"""Parameters of products: linear layers, matrix products, embeddings. Cost: a product of the layer's size."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.parameter_rules.common import Arguments, Entry, lift


def _linear(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """y = x Wᵀ + b, x (..., in): gᵀx and the sum of g."""
    rows = g.reshape(-1, g.shape[-1])
    found = {"bias": rows.sum(0)} if "bias" in wanted else {}
    if "weight" in wanted:
        x = lift(a, "input", g)
        found["weight"] = rows.T @ x.reshape(-1, x.shape[-1])
    return found


def _bilinear(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """y_o = xᵀ W_o z + b_o."""
    rows = g.reshape(-1, g.shape[-1])
    found = {"bias": rows.sum(0)} if "bias" in wanted else {}
    if "weight" in wanted:
        x, z = (lift(a, name, g) for name in ("input1", "input2"))
        left, right = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
        found["weight"] = torch.einsum("bo,bi,bj->oij", rows, left, right)
    return found


def _embedding(a: Arguments, g: Tensor, _: frozenset[str]) -> dict[str, Tensor]:
    """Rows of g summed by index; the padding row stays zero. Dense, also where torch would make it sparse."""
    rows, padding = a["weight"].shape[0], a.get("padding_idx")
    padding = -1 if padding is None else padding % rows
    return {"weight": torch.ops.aten.embedding_dense_backward(g, a["input"], rows, padding, False)}


def _matmul(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """y = a @ b with the broadcasting of torch.matmul: g bᵀ and aᵀ g, summed to shape."""
    left, right = lift(a, "input", g), lift(a, "other", g)
    rows = left.unsqueeze(0) if left.ndim == 1 else left
    columns = right.unsqueeze(-1) if right.ndim == 1 else right
    g = g.unsqueeze(-1) if right.ndim == 1 else g
    g = g.unsqueeze(-2) if left.ndim == 1 else g
    found = {}
    if "input" in wanted:
        found["input"] = (g @ columns.mT).sum_to_size(rows.shape).reshape(left.shape)
    if "other" in wanted and columns.ndim == 2:  # one product, instead of one a sample
        product = rows.reshape(-1, rows.shape[-1]).T @ g.reshape(-1, g.shape[-1])
        found["other"] = product.reshape(right.shape)
    elif "other" in wanted:
        found["other"] = (rows.mT @ g).sum_to_size(columns.shape).reshape(right.shape)
    return found


def _addmm(a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """y = beta · input + alpha · mat1 @ mat2."""
    scaled = a.get("alpha", 1) * g
    found = {}
    if "input" in wanted:
        found["input"] = (a.get("beta", 1) * g).sum_to_size(a["input"].shape)
    if "mat1" in wanted:
        found["mat1"] = scaled @ lift(a, "mat2", g).T
    if "mat2" in wanted:
        found["mat2"] = lift(a, "mat1", g).T @ scaled
    return found


def _is_matrix(a: Arguments) -> bool:
    return bool(a["weight"].ndim == 2)


def _plain_embedding(a: Arguments) -> bool:
    # max_norm rewrites the weight in the forward pass; scale_grad_by_freq is no derivative.
    return a.get("max_norm") is None and not a.get("scale_grad_by_freq", False)


_PRODUCT = Entry(_matmul, ("input", "other"), ("input", "other"))
_EMBEDDING = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

MODULES: dict[type[nn.Module], Entry] = {
    nn.Linear: Entry(_linear, ("input",), attributes=("weight",), accepts=_is_matrix),
    nn.Bilinear: Entry(_bilinear, ("input1", "input2")),
    nn.Embedding: Entry(_embedding, ("input",), ("weight",), ("weight", *_EMBEDDING), accepts=_plain_embedding),
}
FUNCTIONS: dict[Callable[..., Any], Entry] = {
    F.linear: Entry(_linear, ("input", "weight", "bias"), accepts=_is_matrix),
    F.bilinear: Entry(_bilinear, ("input1", "input2", "weight", "bias")),
    F.embedding: Entry(_embedding, ("input", "weight", *_EMBEDDING), ("weight",), accepts=_plain_embedding),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, operator.matmul), _PRODUCT),
    **dict.fromkeys((torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm), _PRODUCT),
    torch.Tensor.__rmatmul__: Entry(_matmul, ("other", "input"), ("input", "other")),
    torch.addmm: Entry(_addmm, ("input", "mat1", "mat2", "beta", "alpha"), ("input", "mat1", "mat2")),
}
