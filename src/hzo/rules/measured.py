"""Weights that several calls read are measured once: the matrix that a recurrent cell applies at every step.

What was measured is kept while further calls of the same operator with the same weight are to come. From one gradient
to the next it is kept where the caller says so, or while gradients accumulate at the same weights; then it is tried on
random numbers before it is used: the operator, run on a few of them, must return what the kept weight says. Where it
does not, whatever the reason (an optimizer's step, a hook, hardware that drifts), the weight is measured anew.

The random numbers are drawn, and what the kept weight says of them is computed, once a measurement, so that a trial
costs one run of the operator on three rows and reads nothing that is as large as a weight. Changes do not know the
numbers; one that a trial has missed is missed again, until there is another.

A trial allows for rounding, ``4 ε ‖z‖ ‖w‖`` for each result. A change ``Δ`` of what goes into one result adds a normal
number of deviation ``‖Δ‖`` to it, so that one row of random numbers misses it with a probability of at most
``3.2 ε √n ‖w‖ / ‖Δ‖``, and the two rows of a trial with the square of that: 7e-5 for a relative change of 1e-3 in
float32 with n = 512. What is missed is about as small as rounding. Source: ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hzo.rules.base import Call, Key
from hzo.tape import Operation, Tape
from hzo.tape.operations import Ref

ROWS = 2  # of random numbers in a trial
_ROUNDINGS = 4  # of the size of a sum, that a trial allows for
_WORTH = 1 << 22  # multiplications: what takes fewer is measured faster than tried
_PRECISE = 1e-6  # dtypes that round more than this would hide changes that matter


Draw = Callable[..., Tensor]
"""A source of random numbers, by shape: ``draw(*shape, like=tensor)``."""


@dataclass(frozen=True)
class Trial:
    """How what was measured is tried, and whether that pays.

    Attributes:
        work: multiplications that a measurement takes.
        expect: from what was measured, and a source of random numbers, to the probe of a trial, what the operator must
            return for it, and the norms of what goes into each result, multiplied. Taken once a measurement.
        ask: from the probe to what the operator returns.
        laid_out: from what was measured to the same, as it is kept.
    """

    work: float
    expect: Callable[[Tensor, Draw], tuple[Tensor, Tensor, Tensor]]
    ask: Callable[[Tensor], Tensor]
    laid_out: Callable[[Tensor], Tensor] = lambda measured: measured


class _Kept(NamedTuple):
    """What was measured, and its trial: the probe, what must come back for it, and how far off that may be."""

    measured: Tensor
    probe: Tensor
    expected: Tensor
    limit: Tensor


class _Kernels:
    """What was measured of weights, for as long as these live."""

    def __init__(self) -> None:
        self._held: Any = WeakTensorKeyDictionary()
        self._versions: dict[int, int] = {}  # by id: of the weights of the last gradient
        self._generators: dict[torch.device, torch.Generator] = {}

    def unchanged(self, weights: list[Tensor]) -> set[int]:
        """Ids of the weights that the last gradient had as well, and that nobody has written to since."""
        before, self._versions = self._versions, {id(w): w._version for w in weights}
        return {key for key, version in self._versions.items() if before.get(key) == version}

    def release(self, weights: Iterable[Tensor]) -> None:
        """Forget what was measured of these."""
        if self._held:
            for weight in weights:
                self._held.pop(weight, None)

    def get(self, weight: Tensor, key: Hashable, trial: Trial) -> Tensor | None:
        """What was measured, if the operator still answers accordingly."""
        kept: _Kept | None = self._held.get(weight, {}).get(key)
        if kept is None:
            return None
        if bool((trial.ask(kept.probe).sub_(kept.expected).abs_() <= kept.limit).all()):
            return kept.measured
        del self._held[weight][key]
        return None

    def put(self, weight: Tensor, key: Hashable, measured: Tensor, trial: Trial) -> None:
        """Keep what was measured."""
        if weight not in self._held:
            self._held[weight] = {}
        probe, expected, size = trial.expect(measured, self._draw)
        limit = _ROUNDINGS * torch.finfo(expected.dtype).eps * (size + expected.abs())
        self._held[weight][key] = _Kept(measured, probe, expected, limit)

    def _draw(self, *shape: int, like: Tensor) -> Tensor:
        """Normal numbers from a generator of its own: the user's random state does not move."""
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(torch.initial_seed() % 2**63)
        return torch.randn(shape, dtype=like.dtype, device=device, generator=self._generators[device])


KERNELS = _Kernels()


class _Measurements:
    """For one recording: how many calls an operator and a weight have, and what was measured for those to come."""

    def __init__(self) -> None:
        self.places: Counter[Hashable] | None = None  # by operator and address, which tells most weights apart
        self.uses: Counter[Hashable] | None = None
        self.seen: dict[Hashable, tuple[Tensor, Tensor, int]] = {}
        self.keeps: set[int] = set()  # ids of weights of which measurements are kept for the next gradient

    def uses_of(self, tape: Tape, operator: Any, weight: Tensor) -> int:
        """How many calls of an operator read a weight."""
        if self.places is None:
            self.places = Counter((id(op.target), weight.data_ptr()) for op, weight in _reads_of_weights(tape))
        if self.places[id(operator), weight.data_ptr()] < 2:
            return 1
        if self.uses is None:
            self.uses = Counter((op.target, _memory(weight)) for op, weight in _reads_of_weights(tape))
        return self.uses[operator, _memory(weight)]


def _reads_of_weights(tape: Tape) -> Iterator[tuple[Operation, Tensor]]:
    """Operations with the weights that they read, once for each time that they read one."""
    values, tensors = tape.values, tape.tensors
    for op in tape.operations:
        for template in op.args:
            if type(template) is Ref and values[template.value].weight:
                tensor = tensors[template.value]
                if tensor is not None and tensor.layout == torch.strided:
                    yield op, tensor


_kept: WeakKeyDictionary[Tape, _Measurements] = WeakKeyDictionary()


def keep_measured(tape: Tape, keep: bool | None) -> None:
    """Say whether what a sweep of this tape measures is kept for the next one at these weights.

    Args:
        keep: None keeps while gradients accumulate: ``.grad`` is there, and nobody has written to the weight since the
            last gradient. Whatever is not to be kept is released.
    """
    kept = _kept[tape] = _Measurements()
    weights = [
        weight
        for value, weight in zip(tape.values, tape.tensors, strict=True)
        if value.weight and value.producer < 0 and weight is not None
        if weight.layout == torch.strided and not weight.is_inference()
    ]
    unchanged = KERNELS.unchanged(weights)
    if keep:
        kept.keeps = {id(w) for w in weights}
    elif keep is None and unchanged and any(leaf.grad is not None for leaf in tape.leaves.values()):
        kept.keeps = {id(w) for w in weights if id(w) in unchanged and (w.grad is not None or not w.requires_grad)}
    KERNELS.release(w for w in weights if id(w) not in kept.keeps)


def keeps_some(tape: Tape) -> bool:
    """Whether a sweep of this tape uses, for some weights, what was kept from another gradient."""
    kept = _kept.get(tape)
    return kept is not None and bool(kept.keeps)


def _memory(tensor: Tensor) -> Hashable:
    """Equal for tensors that show the same content of the same memory, as long as one of them lives."""
    bits = tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, bits, tensor._version


def measured_once(
    call: Call,
    key: Key,
    weight: Tensor,
    options: Hashable,
    measure: Callable[[], Tensor],
    trial: Trial | None = None,
) -> Tensor:
    """What a measurement of an operator shows of a weight.

    Args:
        key: where the weight stands among the arguments.
        options: all that it depends on besides the operator and the weight.
        measure: taken where it is not known from another call.
        trial: how it is tried before it is used in another gradient; without, it is not kept for one.
    """
    if weight.layout != torch.strided or weight.numel() == 0 or weight.is_meta:  # shapes alone have nothing to keep
        return measure()
    kept = _kept.get(call.tape)
    if kept is None:
        kept = _kept[call.tape] = _Measurements()
    uses = kept.uses_of(call.tape, call.op.target, weight)
    if uses < 2:
        return _across(kept, call, key, weight, options, measure, trial)
    name = (call.op.target, _memory(weight), options)
    found, held, left = kept.seen.pop(name, (None, weight, uses))
    if found is None:
        found = _across(kept, call, key, weight, options, measure, trial)
    if left > 1:
        kept.seen[name] = found, held, left - 1
    return found


def _across(
    kept: _Measurements,
    call: Call,
    key: Key,
    weight: Tensor,
    options: Hashable,
    measure: Callable[[], Tensor],
    trial: Trial | None,
) -> Tensor:
    """The same from one gradient to the next."""
    if not kept.keeps or trial is None or trial.work < _WORTH or torch.finfo(weight.dtype).eps > _PRECISE:
        return measure()
    root = _root(call, key)
    if root is None or id(root) not in kept.keeps:
        return measure()
    name = call.op.target, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, options
    found = KERNELS.get(root, name, trial)
    if found is None:
        found = trial.laid_out(measure())
        KERNELS.put(root, name, found, trial)
    return found


def _root(call: Call, key: Key) -> Tensor | None:
    """The tensor that an operand was computed from, by calls of one operand: a parameter behind its transpose."""
    tape = call.tape
    template = call.op.kwargs.get(key) if isinstance(key, str) else call.op.args[key]
    while type(template) is Ref:
        producer = tape.values[template.value].producer
        if producer < 0:
            return tape.tensors[template.value]
        template = next((a for a in tape.operations[producer].args if type(a) is Ref), None)
    return None
