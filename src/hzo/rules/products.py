"""Products of two operands: the Jacobian with respect to one is the other; where that is a weight, it is measured.

A factor is measured by an identity in the place of the other one, with a row of zeros beside it: what the operator
adds for zeros is the hardware's offset and is taken off. Its own addend (the bias of ``addmm``) is replaced by zeros:
nothing cancels, and what is measured is as precise as the operator's products. Cost: one sample more than the other
factor has entries in the dimension that is summed over; in a batch of matrices that many for each of them.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from hzo.rules.arithmetic import scaled
from hzo.rules.base import Call, Cotangents, Key, vjp
from hzo.rules.divided import in_shares
from hzo.rules.measured import ROWS, Draw, Trial, measured_once
from hzo.rules.probes import less_offset, made_once

aten = torch.ops.aten


def may_read(call: Call, key: Key, to: Key) -> bool:
    """Whether an operand may be read to carry a cotangent to another one: all but a weight beside an activation."""
    return not call.weight(key) or call.weight(to)


def adjoint(x: Tensor) -> Tensor:
    """A matrix transposed and conjugated, sparse ones included."""
    if x.layout == torch.strided:
        return x.mH
    return x.transpose(-1, -2).conj() if x.is_complex() else x.transpose(-1, -2)


def _identity(call: Call, key: int, size: int) -> Tensor:
    """The rows of an identity, and a row of zeros. Nobody writes to it: layers of one width share it."""
    return made_once(_rows_of_identity, size, call.args[key].dtype, call.grad.device)


def _rows_of_identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(size + 1, size, dtype=dtype, device=device).fill_diagonal_(1)


def _zero(call: Call, key: int) -> Tensor:
    """A zero of an operand's type. Its own content may be gone, so that only its dtype is asked for."""
    return made_once(_one_zero, call.args[key].dtype, call.grad.device)


def _one_zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=dtype, device=device)


def _without_addend(call: Call, left: int) -> dict[Key, Any]:
    return {0: _zero(call, 0)} if left == 1 else {}


def right_factor(call: Call, left: int) -> Tensor:
    """The right factor of ``left @ right``, or of a batch of such products, as the operator shows it."""

    def measure() -> Tensor:
        shape = call.args[left].shape
        probe = _identity(call, left, shape[-1])
        if len(shape) > 2:
            probe = probe.expand(*shape[:-2], -1, -1)

        def ask(first: int, stop: int) -> Tensor:
            rows = probe if stop - first == probe.shape[-2] else probe[..., first:stop, :]
            seen: Tensor = call.measure({left: rows, **_without_addend(call, left)}, rows)
            return seen

        seen = in_shares(call, probe.shape[-2], probe.numel() * call.grad.shape[-1], ask, of_result=-2)
        return less_offset(seen, -2)

    def expect(kept: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        shape = call.args[left].shape
        rows = draw(*shape[:-2], ROWS, shape[-1], like=kept)
        sizes = rows.norm(dim=-1, keepdim=True) * kept.norm(dim=-2, keepdim=True)
        return torch.cat([rows, torch.zeros_like(rows[..., :1, :])], -2), rows @ kept, sizes

    def ask(probe: Tensor) -> Tensor:
        return less_offset(call.measure({left: probe, **_without_addend(call, left)}, probe), -2)

    shape = call.args[left].shape
    work = prod(shape[:-2]) * shape[-1] ** 2 * call.args[left + 1].shape[-1]
    # The sweep multiplies by the transpose: a few rows take a quarter less time where that lies row by row.
    trial = Trial(work, expect, ask, lambda found: found.mT.contiguous().mT)
    return measured_once(call, left + 1, call.args[left + 1], ("right", call.kwargs.get("alpha")), measure, trial)


def left_factor(call: Call, left: int) -> Tensor:
    """The left factor of ``left @ right``, or of a batch of such products, as the operator shows it."""
    right = left + 1

    def measure() -> Tensor:
        shape = call.args[right].shape
        probe = _identity(call, right, shape[-2]).mT.expand(*shape[:-2], -1, -1)

        def ask(first: int, stop: int) -> Tensor:
            columns = probe if stop - first == probe.shape[-1] else probe[..., first:stop]
            seen: Tensor = call.measure({right: columns, **_without_addend(call, left)}, columns.mT)
            return seen

        seen = in_shares(call, probe.shape[-1], probe.numel() * call.grad.shape[-2], ask, of_result=-1)
        return less_offset(seen, -1)

    def expect(kept: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        shape = call.args[right].shape
        columns = draw(*shape[:-2], shape[-2], ROWS, like=kept)
        sizes = kept.norm(dim=-1, keepdim=True) * columns.norm(dim=-2, keepdim=True)
        return torch.cat([columns, torch.zeros_like(columns[..., :1])], -1), kept @ columns, sizes

    def ask(probe: Tensor) -> Tensor:
        return less_offset(call.measure({right: probe, **_without_addend(call, left)}, probe.mT), -1)

    shape = call.args[right].shape
    work = prod(shape[:-2]) * shape[-2] ** 2 * call.args[left].shape[-2]
    trial = Trial(work, expect, ask)
    return measured_once(call, left, call.args[left], ("left", call.kwargs.get("alpha")), measure, trial)


def times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of matrices or of batches of them, sparse ones included."""
    return torch.bmm(a, b) if a.dim() == 3 else torch.mm(a, b)


def laid_out_like(operand: Tensor, a: Tensor, b: Tensor, otherwise: bool = False) -> Tensor:
    """``a @ b`` in the memory format of an operand: the gradient of a transposed weight is as the weight is.

    Args:
        otherwise: whether an operand whose content is gone was transposed.
    """
    strided = operand.layout == a.layout == b.layout == torch.strided
    transposed = otherwise if operand.is_meta else operand.dim() == 2 and operand.stride(0) == 1 < operand.stride(1)
    if strided and transposed:
        return torch.mm(b.t(), a.t()).t()
    return times(a, b)


def _product(call: Call, left: int, alpha: Any = 1) -> dict[Key, Tensor]:
    """Of ``alpha * left @ right``: the cotangents of both."""
    right = left + 1
    a, b = call.args[left], call.args[right]
    g = call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(left):
        if may_read(call, right, left):
            found[left] = scaled(laid_out_like(a, g, adjoint(b)), alpha)
        else:
            found[left] = times(g, adjoint(right_factor(call, left)))
    if call.needs(right):
        if may_read(call, left, right):
            found[right] = scaled(laid_out_like(b, adjoint(a), g, otherwise=b.dim() == 2), alpha)
        else:
            found[right] = times(adjoint(left_factor(call, left)), g)
    return found


def addend(call: Call) -> dict[Key, Tensor]:
    """The cotangent of what ``addmm`` and its kind add."""
    if not call.needs(0):
        return {}
    g = scaled(call.grad, call.kwargs.get("beta", 1))
    shape = call.args[0].shape
    return {0: g if g.shape == shape else g.sum_to_size(shape)}


# ---- matrices -------------------------------------------------------------------------------------------------------


@vjp(aten.mm.default, aten.bmm.default, measures=True, lean=True)
def mm(call: Call) -> Cotangents:
    """``a @ b``; a batch of such products in ``bmm``. Sparse factors that are constants included."""
    return _product(call, 0)


@vjp(aten.addmm.default, aten.baddbmm.default, measures=True, lean=True)
def addmm(call: Call) -> Cotangents:
    """``beta * c + alpha * a @ b``; a batch of such products in ``baddbmm``."""
    return {**addend(call), **_product(call, 1, call.kwargs.get("alpha", 1))}


@vjp(aten.addbmm.default, measures=True)
def addbmm(call: Call) -> Cotangents:
    """``beta * c + alpha * sum(a[b] @ b[b])`` over the batch."""
    a, b = call.args[1:3]
    alpha = call.kwargs.get("alpha", 1)
    batch, rows, n = a.shape
    g = call.grad.expand(batch, -1, -1)
    found = addend(call)
    if call.needs(1):
        if may_read(call, 2, 1):
            found[1] = scaled(g @ b.mH, alpha)
        else:  # one row for each entry of each matrix, zeros in the others
            probe = _identity(call, 1, batch * n).view(-1, batch, n).transpose(0, 1)
            seen = call.measure({0: _zero(call, 0), 1: probe}, probe[0])
            found[1] = g @ (seen[:-1] - seen[-1]).view(batch, n, g.shape[-1]).mH
    if call.needs(2):
        if may_read(call, 1, 2):
            found[2] = scaled(a.mH @ g, alpha)
        else:
            probe = _identity(call, 2, batch * n).mT.reshape(batch, n, -1)
            seen = call.measure({0: _zero(call, 0), 2: probe}, probe[0].mT)
            found[2] = (seen[:, :-1] - seen[:, -1:]).view(rows, batch, n).transpose(0, 1).mH @ g
    return found


# ---- matrices and vectors -------------------------------------------------------------------------------------------


def _matrix_times_vector(call: Call, matrix: int, alpha: Any = 1) -> dict[Key, Tensor]:
    vector = matrix + 1
    a, v = call.args[matrix], call.args[vector]
    g = call.grad
    found: dict[Key, Tensor] = {}
    if call.needs(matrix):
        if may_read(call, vector, matrix):
            found[matrix] = scaled(torch.outer(g, v.conj()), alpha)
        else:
            probe = _identity(call, matrix, v.shape[0])
            seen = call.measure({matrix: probe, **_without_addend(call, matrix)}, probe)
            found[matrix] = torch.outer(g, (seen[:-1] - seen[-1]).conj())
    if call.needs(vector):
        if may_read(call, matrix, vector):
            found[vector] = scaled(adjoint(a).mv(g), alpha)
        else:  # the operator takes one vector at a time
            probe = _identity(call, vector, a.shape[1])
            seen = _one_by_one(call, vector, probe, _without_addend(call, matrix))
            found[vector] = (seen[:-1] - seen[-1]).conj() @ g
    return found


def _one_by_one(call: Call, key: int, probe: Tensor, also: dict[Key, Any]) -> Tensor:
    return torch.stack([call.measure({key: row, **also}, row[None]) for row in probe.unbind()])


@vjp(aten.mv.default, measures=True)
def mv(call: Call) -> Cotangents:
    """``a @ v``. Where the matrix is a weight, one call for each of its columns."""
    return _matrix_times_vector(call, 0)


@vjp(aten.addmv.default, measures=True)
def addmv(call: Call) -> Cotangents:
    """``beta * c + alpha * a @ v``."""
    return {**addend(call), **_matrix_times_vector(call, 1, call.kwargs.get("alpha", 1))}


def _other_vector(call: Call, key: int, to: int) -> Tensor:
    """A factor of ``dot`` or ``vdot``, conjugated where the operator conjugates it; measured entry by entry."""
    if may_read(call, key, to):
        seen: Tensor = call.args[key]
        return seen.conj() if key == 0 and call.op.target is aten.vdot.default else seen
    seen = _one_by_one(call, to, _identity(call, to, call.args[to].shape[0]), {})
    return seen[:-1] - seen[-1]


@vjp(aten.dot.default, measures=True)
def dot(call: Call) -> Cotangents:
    """``sum(u * v)``. Where one of them is a weight, one call for each of its entries."""
    return {k: call.grad * _other_vector(call, 1 - k, k).conj() for k in (0, 1) if call.needs(k)}


@vjp(aten.vdot.default, measures=True)
def vdot(call: Call) -> Cotangents:
    """``sum(conj(u) * v)``."""
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        found[0] = call.grad.conj() * _other_vector(call, 1, 0)
    if call.needs(1):
        found[1] = call.grad * _other_vector(call, 0, 1).conj()
    return found


@vjp(aten.addr.default, measures=True)
def addr(call: Call) -> Cotangents:
    """``beta * c + alpha * outer(u, v)``."""
    alpha = call.kwargs.get("alpha", 1)
    u, v = call.args[1:3]
    g = call.grad
    found = addend(call)
    step: dict[Key, Any] = {0: _zero(call, 0)}
    if call.needs(1):
        if may_read(call, 2, 1):
            found[1] = scaled(g.mv(v.conj()), alpha)
        else:
            probe = _identity(call, 1, 1).view(2)
            seen = call.measure({1: probe, **step}, probe[:, None])
            found[1] = g.mv((seen[0] - seen[1]).conj())
    if call.needs(2):
        if may_read(call, 1, 2):
            found[2] = scaled(g.t().mv(u.conj()), alpha)
        else:
            probe = _identity(call, 2, 1).view(2)
            seen = call.measure({2: probe, **step}, probe[:, None])
            found[2] = g.t().mv((seen[:, 0] - seen[:, 1]).conj())
    return found


# ---- products of three, and by groups -------------------------------------------------------------------------------

_BILINEAR = ((1, 3), (0,), (1, 2), (2, 3))


@vjp(aten._trilinear.default, measures=True)
def trilinear(call: Call) -> Cotangents:
    """A product of three summed over some dimensions: ``nn.Bilinear``, with its weight in the middle.

    Where that weight, or a learned vector, stands beside an activation, the operator is run with an identity in the
    place of the activation, sample by sample: as many samples for each one of the batch as the activation has features.
    """
    i1, i2, i3, expand1, expand2, expand3, summed = call.args[:7]
    g = call.grad
    bilinear = tuple(tuple(e) for e in (expand1, expand2, expand3, summed)) == _BILINEAR
    for dim in sorted(summed):
        g = g.unsqueeze(dim)
    g = g.expand(_broadcast(call))
    found: dict[Key, Tensor] = {}
    for key, others in ((0, (1, 2)), (2, (0, 1))):
        if call.needs(key) and bilinear and not all(may_read(call, other, key) for other in others):
            found[key] = _through_bilinear(call, key)
    nothing: tuple[int, ...] = ()
    if call.needs(0) and 0 not in found:
        found[0] = aten._trilinear(g, i2.conj(), i3.conj(), nothing, expand2, expand3, expand1)
    if call.needs(1):
        found[1] = aten._trilinear(i1.conj(), g, i3.conj(), expand1, nothing, expand3, expand2)
    if call.needs(2) and 2 not in found:
        found[2] = aten._trilinear(i1.conj(), i2.conj(), g, expand1, expand2, nothing, expand3)
    return found


def _broadcast(call: Call) -> list[int]:
    """The shape of the product before it is summed."""
    shapes: list[list[int]] = []
    for operand, expand in zip(call.args[:3], call.args[3:6], strict=True):
        shape = list(operand.shape)
        for dim in sorted(expand):
            shape.insert(dim, 1)
        shapes.append(shape)
    return [next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True)]


def _through_bilinear(call: Call, key: int) -> Tensor:
    """The cotangent of one vector of ``x W y``, with what the operator returns for each of its unit vectors."""
    batch, n = call.args[key].shape
    other = 2 - key
    probe = _identity(call, key, n).repeat(batch, 1)
    beside = call.args[other].repeat_interleave(n + 1, 0)
    seen = call.measure({key: probe, other: beside}, probe).view(batch, n + 1, call.grad.shape[-1])
    return torch.einsum("bno,bo->bn", (seen[:, :-1] - seen[:, -1:]).conj(), call.grad)


@vjp(aten._grouped_mm.default, measures=True)
def grouped_mm(call: Call) -> Cotangents:
    """One product for each expert of a mixture, their samples in one tensor that ``offs`` cuts up."""
    a, b = call.args[:2]
    offs = call.arg(2, "offs")
    g = call.grad.contiguous()
    found: dict[Key, Tensor] = {}
    if call.needs(0):
        right = b if may_read(call, 1, 0) or b.dim() == 2 else _right_of_groups(call, a, b, offs)
        found[0] = aten._grouped_mm(g, right.mT, offs)
        if found[0].dim() == 2 and offs is not None and a.dim() == 2 and b.dim() == 3:  # rows that no expert has seen
            rows = torch.arange(a.shape[0], device=g.device)
            found[0] = found[0].masked_fill_((rows >= offs[-1])[:, None], 0)
    if call.needs(1):
        left = a if may_read(call, 0, 1) or b.dim() == 2 else _left_of_groups(call, b)
        found[1] = aten._grouped_mm(left.mT, g, offs)
    return found


def _right_of_groups(call: Call, a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    """The factor of every expert, by an identity for each of them."""
    groups, n, _ = b.shape
    probe = _identity(call, 0, n).repeat(groups, 1) if a.dim() == 2 else _identity(call, 0, n).repeat(groups, 1, 1)
    replaced: dict[Key, Any] = {0: probe}
    if offs is not None:
        ends = torch.arange(1, groups + 1, dtype=offs.dtype, device=offs.device) * (n + 1)
        replaced[2 if len(call.args) > 2 else "offs"] = ends
    seen: Tensor = call.measure(replaced, probe).view(groups, n + 1, b.shape[-1])
    return (seen[:, :-1] - seen[:, -1:]).contiguous()


def _left_of_groups(call: Call, b: Tensor) -> Tensor:
    """The rows that all experts were given, by experts that return what they are given, and zeros."""
    groups, n, _ = b.shape
    unit = _identity(call, 1, n)[:-1]
    probe = torch.cat([unit, torch.zeros_like(unit)], 1).repeat(groups, 1, 1)
    seen: Tensor = call.measure({1: probe}, probe)
    return (seen[..., :n] - seen[..., n:]).contiguous()
