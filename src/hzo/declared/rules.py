"""Declared modules: what their user promises, in place of what their type does.

An affine module tells its Jacobian by impulses: an element of a sample at a time, for all samples at once. What else is
promised makes them fewer: one for all elements (elementwise), one a feature (tokens), one a channel and phase of the
stride on a small canvas (stationary).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from hzo.declared import impulses
from hzo.declared.common import Adjoint, DeclaredCall, Shape, impulse_size, is_only_input
from hzo.declared.impulses import Geometry
from hzo.errors import StructureError
from hzo.tracing import Graph, GraphOperation, Local, Promise, declared, local_along

_CHUNK = 512  # impulses in one call


def rules_of(promises: Sequence[Promise]) -> list[Adjoint]:
    """The rules that declared promises allow, the cheapest first."""
    if "reindexing" in promises:
        return [_REINDEXING]
    if "affine" not in promises:
        return []
    if "elementwise" in promises:
        return [_DIAGONAL]
    found = [_STATIONARY] if "stationary" in promises else []
    return [*found, _TOKENS if "tokens" in promises else _AFFINE]


def find_adjoint(graph: Graph, op: GraphOperation, value: int) -> Adjoint | None:
    """How ``op`` carries a cotangent back to its operand ``value`` by what was declared of it, or None."""
    promises = declared(op.module)
    if promises is None or op.random or not op.deterministic:
        return None
    return next((rule for rule in rules_of(promises) if rule.accepts(graph, op, value)), None)


def _one_to_one(graph: Graph, op: GraphOperation, value: int) -> bool:
    """One tensor to one tensor, the batch first in both, and its samples kept apart."""
    alone = is_only_input(op, value) and len(op.writes) == 1
    return alone and not op.coupled and graph.values[value].batch_dim == 0 == graph.values[op.writes[0]].batch_dim


# ---- affine: the coordinates of one sample --------------------------------------------------------------------------


def _sample(graph: Graph, value: int) -> Shape:
    return graph.values[value].sample_shape


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _affine_probes(graph: Graph, _: GraphOperation, value: int) -> list[Shape]:
    shape = _sample(graph, value)
    chunks = [(stop - start, *shape[1:]) for start, stop in _chunks(prod(shape))]
    return [(shape[0], *shape[1:]), *chunks]


def _affine(call: DeclaredCall, value: int) -> Tensor:
    operand = call.operand
    sample, h = _sample(call.graph, value), impulse_size(operand.dtype)
    n = prod(sample)
    offset = call.measure(torch.zeros(sample, dtype=operand.dtype, device=operand.device)).to(call.dtype)
    g = call.cotangent.reshape(call.cotangent.shape[0], -1)
    found = torch.empty(g.shape[0], n, dtype=call.dtype, device=operand.device)
    for start, stop in _chunks(n):
        probe = torch.zeros(stop - start, n, dtype=operand.dtype, device=operand.device)
        probe[:, start:stop].fill_diagonal_(h)
        response = call.measure(probe.view(stop - start, *sample[1:])).to(call.dtype) - offset
        found[:, start:stop] = g @ (response.reshape(stop - start, -1) / h).T
    return found.view(operand.shape)


def _affine_accepts(graph: Graph, op: GraphOperation, value: int) -> bool:
    return _one_to_one(graph, op, value) and _sample(graph, value)[0] == 1 == _sample(graph, op.writes[0])[0]


# ---- affine and elementwise: all places at once ---------------------------------------------------------------------


def _diagonal_probes(graph: Graph, _: GraphOperation, value: int) -> list[Shape]:
    return [(2, *_sample(graph, value)[1:])]


def _diagonal(call: DeclaredCall, _: int) -> Tensor:
    operand = call.operand
    h = impulse_size(operand.dtype)
    probe = torch.zeros(2, *operand.shape[1:], dtype=operand.dtype, device=operand.device)
    probe[0] = h
    response = call.measure(probe).to(call.dtype)
    return call.cotangent * ((response[0] - response[1]) / h)


def _diagonal_accepts(graph: Graph, op: GraphOperation, value: int) -> bool:
    return _affine_accepts(graph, op, value) and graph.values[value].shape == graph.values[op.writes[0]].shape


# ---- affine, tokens alike: the features of one token ----------------------------------------------------------------


def _token_probes(graph: Graph, _: GraphOperation, value: int) -> list[Shape]:
    shape = graph.values[value].shape
    places = prod(shape[1:-1])
    return [(-(-(shape[-1] + 1) // places), *shape[1:])]


def _tokens(call: DeclaredCall, value: int) -> Tensor:
    """Impulses in the features, packed into as few samples as hold so many tokens."""
    operand = call.operand
    n, h = operand.shape[-1], impulse_size(operand.dtype)
    (shape,) = _token_probes(call.graph, call.op, value)
    probe = torch.zeros(shape, dtype=operand.dtype, device=operand.device)
    probe.view(-1, n)[:n].fill_diagonal_(h)
    response = call.measure(probe).to(call.dtype)
    response = response.reshape(-1, response.shape[-1])
    return call.cotangent @ ((response[:n] - response[n : n + 1]) / h).T


def _tokens_accept(graph: Graph, op: GraphOperation, value: int) -> bool:
    operand, output = graph.values[value], graph.values[op.writes[0]]
    return _one_to_one(graph, op, value) and len(operand.shape) >= 2 and operand.shape[:-1] == output.shape[:-1]


# ---- reindexing: the places that a run on their numbers shows -------------------------------------------------------


def _copied(call: DeclaredCall, _: int) -> Tensor:
    operand = call.operand
    # A module of the user's own may insist on its dtype; where that cannot count so far, float64 can.
    countable = operand.numel() < 2 / torch.finfo(operand.dtype).eps
    dtype = operand.dtype if countable else torch.float64
    numbers = torch.arange(1, operand.numel() + 1, dtype=dtype, device=operand.device).view(operand.shape)
    origin = call.copied(numbers).reshape(-1).long()
    if origin.numel() and not bool(((origin >= 0) & (origin <= operand.numel())).all()):
        raise StructureError(
            f"{call.op.name} was promised to be reindexing, and is not: given the numbers of places it returned "
            "others. Promise less (hzo.infer_structure(module, x) proposes what holds), or nothing"
        )
    found = torch.zeros(operand.numel() + 1, dtype=call.dtype, device=operand.device)
    return found.index_add_(0, origin, call.cotangent.reshape(-1))[1:].view(operand.shape)


# ---- affine and stationary: impulses on a small canvas --------------------------------------------------------------


def declared_geometry(graph: Graph, op: GraphOperation, value: int) -> Geometry | None:
    """The convolution that a stationary module must be; None where what was declared does not say.

    A ``Local`` for every axis of space gives kernel, stride and padding; one for the channels (not mixing, so as many
    out as in) makes every channel a group. A dilated kernel is one with zeros between its taps.
    """
    promises = declared(op.module) or ()
    shape, output = graph.values[value].shape, graph.values[op.writes[0]].shape
    local = local_along(promises, len(shape))
    space = range(2, len(shape))
    if len(shape) != len(output) or not space or any(axis not in local for axis in space):
        return None
    kernel, stride, padding = [], [], []
    for axis in space:
        numbers = [Fraction(n) for n in (local[axis].low, local[axis].high, local[axis].stride)]
        if any(n.denominator > 1 for n in numbers) or numbers[0] > 0:
            return None
        low, high, s = (int(n) for n in numbers)
        k = high - low + 1
        plain = (shape[axis] - 2 * low - k) // s + 1 == output[axis]
        behind = -low if plain else (output[axis] - 1) * s + k + low - shape[axis]
        if behind < 0:
            return None
        kernel.append(k)
        stride.append(s)
        padding.append((-low, behind))
    apart = local.get(1) == Local(1) and shape[1] == output[1]
    return Geometry(
        channels_in=shape[1],
        channels_out=output[1],
        groups=shape[1] if apart else 1,
        kernel=tuple(kernel),
        stride=tuple(stride),
        dilation=tuple(1 for _ in space),
        padding=tuple(padding),
        mode="zeros",
        transposed=False,
        output_padding=tuple(0 for _ in space),
    )


def _stationary_accepts(graph: Graph, op: GraphOperation, value: int) -> bool:
    return _one_to_one(graph, op, value) and declared_geometry(graph, op, value) is not None


def _stationary_probes(graph: Graph, op: GraphOperation, value: int) -> list[Shape]:
    geometry = declared_geometry(graph, op, value)
    assert geometry is not None
    return [geometry.probe]


def _stationary(call: DeclaredCall, value: int) -> Tensor:
    geometry = declared_geometry(call.graph, call.op, value)
    assert geometry is not None
    return impulses.convolution_vjp(call, geometry)


_AFFINE = Adjoint("affine", _affine, _affine_accepts, _affine_probes)
_DIAGONAL = Adjoint("affine", _diagonal, _diagonal_accepts, _diagonal_probes)
_TOKENS = Adjoint("affine", _tokens, _tokens_accept, _token_probes)
_STATIONARY = Adjoint("stationary", _stationary, _stationary_accepts, _stationary_probes)
_REINDEXING = Adjoint("reindexing", _copied, _one_to_one)
