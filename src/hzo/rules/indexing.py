"""Calls that pick or place elements by an index: gather and scatter are each other's VJP.

Where several elements meet in one place (``scatter_reduce``), ties share the cotangent equally, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.rules.base import Call, Cotangents, Key, unbroadcast, vjp

aten = torch.ops.aten


# -- tables of embeddings ---------------------------------------------------------------------------------------------


@vjp(aten.embedding.default, lean=True)
def embedding(call: Call) -> Cotangents:
    """Rows of a table; a sparse gradient of one that is a leaf, where the call asks for it."""
    table, indices = call.args[:2]
    padding, by_frequency = call.arg(2, "padding_idx", -1), call.arg(3, "scale_grad_by_freq", False)
    sparse = call.arg(4, "sparse", False) and call.leaf(0)
    backward = aten.embedding_sparse_backward if sparse else aten.embedding_dense_backward
    return {0: backward(call.grad, indices, table.shape[0], padding, by_frequency)}


@vjp(aten.embedding_dense_backward.default)
def embedding_dense_backward(call: Call) -> Cotangents:
    """Rows added up in a table."""
    g, (_, indices, _, padding) = call.grad, call.args[:4]
    rows = g[indices]
    return {0: rows.masked_fill((indices == padding).unsqueeze(-1), 0) if padding >= 0 else rows}


@vjp(aten._embedding_bag.default, measures=True)
def embedding_bag(call: Call) -> Cotangents:
    """Rows of a table, reduced over bags.

    A cotangent of ``per_sample_weights`` needs the rows: where the table is a weight they are measured, each as a bag
    of its own.
    """
    table, indices, offsets = call.args[:3]
    by_frequency, mode = call.arg(3, "scale_grad_by_freq", False), call.arg(4, "mode", 0)
    factors, padding = call.arg(6, "per_sample_weights"), call.arg(8, "padding_idx", -1)
    bags, sizes, largest = call.out[1:4]
    g = call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        sparse = call.arg(5, "sparse", False) and call.leaf(0)
        found[0] = aten._embedding_bag_backward(
            g, indices, offsets, bags, sizes, largest, table.shape[0], by_frequency, mode, sparse, factors, padding
        )
    place: Key = 6 if len(call.args) > 6 else "per_sample_weights"
    if call.needs(place):
        if call.weight(0) and not call.weight(place):
            alone = torch.arange(indices.numel(), device=indices.device, dtype=offsets.dtype)
            if call.arg(7, "include_last_offset", False):
                alone = torch.cat([alone, alone.new_full((1,), indices.numel())])
            rows = call.measure({2: alone, place: torch.ones_like(factors)}, indices)[0]
            if bags is None or not bags.numel():
                bags = torch.bucketize(torch.arange(indices.numel(), device=indices.device), offsets, right=True) - 1
            grad = (rows * g.index_select(0, bags)).sum(-1)
            found[place] = grad.masked_fill(indices == padding, 0) if padding >= 0 else grad
        else:
            found[place] = aten._embedding_bag_per_sample_weights_backward(
                g, table, indices, offsets, bags, mode, padding
            )
    return found


# -- x[indices] -------------------------------------------------------------------------------------------------------


@vjp(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(call: Call) -> Cotangents:
    """``x[indices]``, with integers, masks and None."""
    x, indices = call.args
    zeros = call.grad.new_zeros(x.shape)
    return {0: aten._index_put_impl_(zeros, indices, call.grad, True, True)}


@vjp(aten._unsafe_masked_index.default)
def unsafe_masked_index(call: Call) -> Cotangents:
    """``x[indices]`` where a mask says so, else a constant."""
    x, mask, indices, _ = call.args
    zeros = call.grad.new_zeros(x.shape)
    return {0: aten._unsafe_masked_index_put_accumulate(zeros, mask, indices, call.grad)}


@vjp(aten._unsafe_masked_index_put_accumulate.default)
def unsafe_masked_index_put_accumulate(call: Call) -> Cotangents:
    """``x[indices] += values`` where a mask says so."""
    _, mask, indices, _ = call.args
    found: dict[Key, Tensor] = {0: call.grad}
    if call.needs(3):
        found[3] = aten._unsafe_masked_index(call.grad, mask, indices, 0)
    return found


@vjp(aten.index_put.default, aten._unsafe_index_put.default, aten._index_put_impl.default)
def index_put(call: Call) -> Cotangents:
    """``x[indices] = values`` or ``+=``."""
    _, indices, values = call.args[:3]
    g = call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = g if call.arg(3, "accumulate", False) else aten.index_put(g, indices, g.new_zeros(()))
    if call.needs(2):
        found[2] = unbroadcast(aten.index.Tensor(g, indices), values)
    return found


# -- along one axis, by an index of one axis --------------------------------------------------------------------------


@vjp(aten.index_select.default)
def index_select(call: Call) -> Cotangents:
    """Elements of an axis, by number."""
    x, dim, places = call.args
    if x.dim() == 0:
        return {0: call.grad.sum()}
    return {0: call.grad.new_zeros(x.shape).index_add_(dim, places, call.grad)}


def _selected(grad: Tensor, dim: int, places: Tensor, source: Tensor) -> Tensor:
    """What a source placed along an axis receives."""
    return grad.index_select(dim, places).reshape(source.shape)


@vjp(aten.index_add.default)
def index_add(call: Call) -> Cotangents:
    """``x`` with a source added along an axis."""
    _, dim, places, source = call.args[:4]
    alpha = call.kwargs.get("alpha", 1)
    found: dict[Key, Tensor] = {0: call.grad}
    if call.needs(3):
        grad = _selected(call.grad, dim, places, source)
        found[3] = grad if alpha == 1 else grad * alpha
    return found


@vjp(aten.index_copy.default)
def index_copy(call: Call) -> Cotangents:
    """``x`` with elements of an axis replaced."""
    _, dim, places, source = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = call.grad.index_fill(dim, places, 0)
    if call.needs(3):
        found[3] = _selected(call.grad, dim, places, source)
    return found


@vjp(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(call: Call) -> Cotangents:
    """``x`` with elements of an axis replaced by one number."""
    _, dim, places = call.args[:3]
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = call.grad.index_fill(dim, places, 0)
    if call.needs(3):
        found[3] = call.grad.index_select(dim, places.unique()).sum()
    return found


@vjp(aten.index_reduce.default)
def index_reduce(call: Call) -> Cotangents:
    """``x`` reduced with a source along an axis."""
    x, dim, places, source, reduce = call.args[:5]
    shape = [1] * source.dim()
    if shape:
        shape[dim] = -1
    return _reduced(call, x, source, dim, places.reshape(shape).expand(source.shape), reduce)


# -- along one axis, by an index of the same shape --------------------------------------------------------------------


@vjp(aten.gather.default)
def gather(call: Call) -> Cotangents:
    """Elements of an axis, picked for each place."""
    x, dim, places = call.args[:3]
    return {0: call.grad.new_zeros(x.shape).scatter_add_(dim, places, call.grad)}


def _gathered(grad: Tensor, dim: int, places: Tensor, source: Tensor) -> Tensor:
    """What a scattered source receives; an index may be smaller than its source, the rest of which is unused."""
    picked = grad.gather(dim, places)
    if picked.shape == source.shape:
        return picked
    padding = [p for have, want in zip(picked.shape[::-1], source.shape[::-1], strict=True) for p in (0, want - have)]
    padded: Tensor = aten.constant_pad_nd(picked, padding)
    return padded


@vjp(aten.scatter.src, aten.scatter.value)
def scatter(call: Call) -> Cotangents:
    """``x`` with elements replaced, for each place of an index."""
    _, dim, places, source = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = call.grad.scatter(dim, places, 0)
    if call.needs(3):
        found[3] = _gathered(call.grad, dim, places, source)
    return found


@vjp(aten.scatter_add.default)
def scatter_add(call: Call) -> Cotangents:
    """``x`` with elements of a source added, for each place of an index."""
    _, dim, places, source = call.args
    found: dict[Key, Tensor] = {0: call.grad}
    if call.needs(3):
        found[3] = _gathered(call.grad, dim, places, source)
    return found


@vjp(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with_reduction(call: Call) -> Cotangents:
    """``x`` with elements of a source, or one number, added or multiplied; PyTorch itself has no derivative here."""
    x, dim, places, source = call.args
    if not isinstance(source, Tensor):
        source = x.new_full(places.shape, source)
    reduce = {"add": "sum", "multiply": "prod"}[call.kwargs["reduce"]]
    found = _reduced(call, x, source, dim, places, reduce)
    return {k: g for k, g in found.items() if k == 0 or call.needs(k)}


@vjp(aten.scatter_reduce.two)
def scatter_reduce(call: Call) -> Cotangents:
    """``x`` reduced with elements of a source, for each place of an index."""
    x, dim, places, source, reduce = call.args[:5]
    return _reduced(call, x, source, dim, places, reduce)


def _reduced(call: Call, x: Tensor, source: Tensor, dim: int, places: Tensor, reduce: str) -> dict[Key, Tensor]:
    """The cotangents of ``x`` (place 0) and of the source (place 3) of a reduction at the places of an index."""
    g = call.grad
    include_self = call.kwargs.get("include_self", True)
    found: dict[Key, Tensor] = {}
    if reduce == "sum":
        found = {0: g, 3: _gathered(g, dim, places, source)}
    elif reduce == "mean":
        count = torch.full_like(g, float(include_self))
        count = count.scatter_add_(dim, places, g.new_ones(()).expand(places.shape)).clamp_(min=1)
        share = g / count
        found = {0: share, 3: _gathered(share, dim, places, source)}
    else:
        used = source[tuple(slice(n) for n in places.shape)]
        if reduce == "prod":
            found = _of_product(call, x, used, dim, places, include_self)
        else:
            found = _of_extreme(call, x, used, dim, places)
        if used.shape != source.shape:
            padding = [
                p for have, want in zip(used.shape[::-1], source.shape[::-1], strict=True) for p in (0, want - have)
            ]
            found[3] = aten.constant_pad_nd(found[3], padding)
    if not include_self:
        found[0] = found[0].scatter(dim, places, 0)
    return found


def _of_product(
    call: Call, x: Tensor, source: Tensor, dim: int, places: Tensor, include_self: bool
) -> dict[Key, Tensor]:
    """Of a product, also where factors are zero: the product of all others."""
    g = call.grad

    def product(start: Tensor, factors: Tensor) -> Tensor:
        return start.scatter_reduce(dim, places, factors, "prod", include_self=include_self)

    found: dict[Key, Tensor] = {}
    if call.needs(0):
        without_zeros = x.masked_fill(x == 0, 1)
        found[0] = g * product(without_zeros, source) / without_zeros
    zero = source == 0
    if not bool(zero.any()):
        found[3] = (g * call.result).gather(dim, places) / source
        return found
    zeros = torch.zeros_like(g).scatter_add_(dim, places, zero.to(g.dtype)).gather(dim, places)
    alone = zero & (zeros == 1)
    others = product(x, source.masked_fill(alone, 1))
    found[3] = torch.where(
        alone,
        (g * others).gather(dim, places),
        (g * call.result).gather(dim, places) / source.masked_fill(zero, 1),
    )
    return found


def _of_extreme(call: Call, x: Tensor, source: Tensor, dim: int, places: Tensor) -> dict[Key, Tensor]:
    """Of a maximum or minimum: equal parts for all elements that are the result."""
    g, result = call.grad, call.result
    here = (x == result).to(g.dtype)
    there = (source == result.gather(dim, places)).to(g.dtype)
    share = g / here.scatter_add(dim, places, there)
    return {0: here * share, 3: there * share.gather(dim, places)}


# -- by a mask, or by the flat number ---------------------------------------------------------------------------------


@vjp(aten.masked_select.default)
def masked_select(call: Call) -> Cotangents:
    """The elements that a mask shows, in order."""
    x, mask = call.args
    shape = torch.broadcast_shapes(x.shape, mask.shape)  # type: ignore[no-untyped-call]
    grad = call.grad.new_zeros(shape).masked_scatter_(mask.expand(shape), call.grad)
    return {0: unbroadcast(grad, x)}


@vjp(aten.masked_scatter.default)
def masked_scatter(call: Call) -> Cotangents:
    """``x`` with the elements that a mask shows replaced by those of a source in order."""
    x, mask, source = call.args
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = unbroadcast(call.grad.masked_fill(mask, 0), x)
    if call.needs(2):
        found[2] = _front(call.grad.masked_select(mask), source.shape)
    return found


def _front(picked: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that begins with these elements, in order, and is zero behind them."""
    padded: Tensor = aten.constant_pad_nd(picked, [0, math.prod(shape) - picked.numel()])
    return padded.view(shape)


@vjp(aten.masked_scatter_backward.default)
def masked_scatter_backward(call: Call) -> Cotangents:
    """The elements that a mask shows, at the front of a tensor of zeros."""
    g, mask, _ = call.args
    shown = torch.zeros_like(g) if g.device.type != "meta" else call.grad.new_zeros(g.shape)
    return {0: shown.masked_scatter_(mask.expand(g.shape), call.grad)}


@vjp(aten.take.default)
def take(call: Call) -> Cotangents:
    """Elements by their number in the flattened tensor."""
    x, places = call.args
    return {0: call.grad.new_zeros(x.shape).put_(places, call.grad, accumulate=True)}


@vjp(aten.put.default)
def put(call: Call) -> Cotangents:
    """``x`` with elements replaced, or added to, by their number in the flattened tensor."""
    _, places, source = call.args[:3]
    g = call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = g if call.arg(3, "accumulate", False) else g.put(places, g.new_zeros(places.shape))
    if call.needs(2):
        found[2] = g.take(places).reshape(source.shape)
    return found


# -- in order ---------------------------------------------------------------------------------------------------------


@vjp(aten.sort.default, aten.sort.stable, aten.topk.default)
def sort(call: Call) -> Cotangents:
    """The elements of an axis in order, or the first of them."""
    x, order = call.args[0], call.out[1]
    assert order is not None
    if x.dim() == 0:
        return {0: call.grad}
    dim = call.arg(2 if call.op.target is aten.topk.default else 1, "dim", -1)
    return {0: call.grad.new_zeros(x.shape).scatter_(dim, order, call.grad)}


@vjp(aten.searchsorted.Tensor, aten.searchsorted.Scalar, aten.bucketize.Tensor, aten.bucketize.Scalar)
def searchsorted(_: Call) -> Cotangents:
    """Places in a sorted sequence: integers."""
    return {}


@vjp(aten.nonzero.default, aten.nonzero_static.default)
def nonzero(_: Call) -> Cotangents:
    """Places of elements that are not zero: integers."""
    return {}


@vjp(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default)
def unique(call: Call) -> Cotangents:
    """The values that occur. PyTorch has no derivative of them, and which of equal elements it would be for is open.

    Raises:
        TapeError: a gradient of the values was asked for; places and counts are integers and never are.
    """
    raise TapeError(
        f"expected no gradient through the values of {call.op.name}, which have none in PyTorch; call it on the "
        "detached tensor, and take the values from the tensor by index"
    )


@vjp(aten.segment_reduce.default)
def segment_reduce(call: Call) -> Cotangents:
    """Consecutive elements reduced."""
    given = call.kwargs
    named: dict[str, Any] = {name: given.get(name) for name in ("lengths", "offsets", "initial")}
    data, reduce = call.args[:2]
    axis = given.get("axis", 0)
    return {0: aten._segment_reduce_backward(call.grad, call.result, data, reduce, axis=axis, **named)}
