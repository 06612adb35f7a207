"""Where a gradient goes wrong: bisection over the places between the operations of a recorded step.

At each place the loss is a function of the values there, which the rest of the tape computes by forward passes alone;
the cotangents that a sweep has carried to that place must be its derivative. At the loss they are, at the parameters
they are not: so there is an operation behind which they are, and before which they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from hzo.execution import replay
from hzo.finite_differences import immovable, real_parts, scale_of
from hzo.gradients import estimated_cotangents
from hzo.losses import fitting_loss
from hzo.reverse import RecordedStep, recorded_loss, sweep_end
from hzo.tape import Tape, current_recorder
from hzo.tracing import Chain, Graph, call_arguments, module_of
from hzo.tracing.recorder import recorded
from hzo.verification.slopes import Slope, measured_slope

_RANDOM = 2  # directions at each place beside that of the cotangents

CotangentsAt = Callable[[int], Mapping[int, Tensor]]
"""From the index of an operation to the cotangents, by value, of what is there before it runs."""


@dataclass(frozen=True)
class WrongOperation:
    """The part of a step that hands back a wrong cotangent.

    Attributes:
        operations: its calls as PyTorch names them: one, or all between two neighbouring estimates of a plan.
        module: the qualified name of the innermost module that made the first of them; empty outside of all.
        index, count: where the first stands among how many calls.
        slope: what disagrees in front of it.
    """

    operations: tuple[str, ...]
    module: str
    index: int
    count: int
    slope: Slope

    def __str__(self) -> str:
        several = len(self.operations) > 4
        names = ", ".join([*self.operations[:2], "…", self.operations[-1]] if several else self.operations)
        where = f" in {self.module}" if self.module else ""
        calls = "call" if len(self.operations) == 1 else f"{len(self.operations)} calls from"
        return f"{names}{where} ({calls} {self.index} of {self.count}): {self.slope}"


def locate(
    model: Chain | nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any,
    options: dict[str, Any],
    seed: int,
    wrong: Sequence[Slope],
) -> WrongOperation | None:
    """The operation behind which hzo's own cotangents agree with the loss and before which they do not.

    Args:
        wrong: the parameters that disagree. Where a plan's cotangents agree at all boundaries, it is the operation that
            reads the first of them.

    Cost: about log₂ of the number of calls times 12 runs of a part of the tape. None where nothing disagrees on the
    way, so that what is wrong was not computed here, or where queries return noise.
    """
    module = module_of(model)
    estimated = estimated_cotangents(model, loss_fn, x, y, **options)
    with _scopes(module) as scopes:
        if estimated is None:
            step, loss = recorded_loss(module, loss_fn, x, y, keep=True)
    if estimated is None:
        tape = step.tape
        seeds, hooks = step.seed(loss)
        return _bisect(tape, seeds, range(len(tape.operations) + 1), _swept(tape, seeds, hooks), scopes, seed)
    graph, found = estimated
    if graph.noise is not None:
        return None
    args, kwargs = call_arguments(x)
    with _scopes(module) as scopes, recorded(module, args, kwargs, opaque=graph.opaque_stages) as run:
        loss = fitting_loss(loss_fn, run.output, y)
    seeds, _ = RecordedStep(run.recorder).seed(loss)
    places = sorted({*found, len(run.tape.operations)})
    located = _bisect(run.tape, seeds, places, lambda k: found.get(k, {}), scopes, seed)
    return located or _reader(graph, wrong, scopes)


def _reader(graph: Graph, wrong: Sequence[Slope], scopes: _Scopes) -> WrongOperation | None:
    """The operation on activations that reads a parameter, or what was computed from it alone."""
    for slope in wrong:
        held = {v for v, name in graph.names.items() if name == slope.direction}
        for op in graph.operations:
            if not held.intersection(op.reads):
                continue
            if op.batched:
                return WrongOperation(
                    (str(op.target),), scopes.of(op.index), op.index + 1, len(graph.operations), slope
                )
            held.update(op.writes)
    return None


def _swept(tape: Tape, seeds: dict[int, Tensor], hooks: dict[int, Callable[[Tensor], Tensor]]) -> CotangentsAt:
    def at(place: int) -> Mapping[int, Tensor]:
        with torch.no_grad():
            return sweep_end(tape, place, dict(seeds), hooks)

    return at


def _bisect(
    tape: Tape, seeds: dict[int, Tensor], places: Sequence[int], at: CotangentsAt, scopes: _Scopes, seed: int
) -> WrongOperation | None:
    wrong, right = 0, len(places) - 1
    slope = _disagreement(tape, places[0], at(places[0]), seeds, seed)
    if slope is None:
        return None
    while right - wrong > 1:
        middle = (wrong + right) // 2
        found = _disagreement(tape, places[middle], at(places[middle]), seeds, seed)
        if found is None:
            right = middle
        else:
            wrong, slope = middle, found
    first, last = places[wrong], places[right]
    names = tuple(op.name for op in tape.operations[first:last])
    return WrongOperation(names, scopes.of(first), first + 1, len(tape.operations), slope)


def _disagreement(
    tape: Tape, place: int, cotangents: Mapping[int, Tensor], seeds: Mapping[int, Tensor], seed: int
) -> Slope | None:
    """A direction along which cotangents and loss disagree at a place; None where none was found."""
    given = {v: (tape.tensor(v).detach(), g.to_dense()) for v, g in cotangents.items() if v not in seeds or place == 0}
    given = {v: (t, g) for v, (t, g) in given.items() if t.layout == torch.strided and t.numel()}
    if not given:
        return None
    generator = torch.Generator().manual_seed(seed)
    directions = [("along the cotangents", {v: g.to(t.dtype) for v, (t, g) in given.items()})]
    for k in range(_RANDOM):
        drawn = _drawn(given, generator)
        for op in tape.operations[place:]:
            if op.target is torch.ops.aten.embedding.default and op.args[0].value in drawn and len(op.args) > 2:
                drawn[op.args[0].value][op.args[2] if op.args[2] >= 0 else slice(0)] = 0  # no gradient by convention
        directions.append((f"random direction {k + 1}", drawn))
    for name, direction in directions:
        slope = _slope(tape, place, given, direction, seeds, name)
        if slope is not None and not slope.agrees:
            return slope
    return None


def _drawn(given: Mapping[int, tuple[Tensor, Tensor]], generator: torch.Generator) -> dict[int, Tensor]:
    """A direction that moves every value in proportion to its size, and what is infinite not at all."""
    found = {}
    for v, (t, _) in given.items():
        noise = torch.randn(real_parts(t).shape, generator=generator, dtype=torch.float64, device="cpu")
        if t.is_complex():
            noise = torch.view_as_complex(noise)
        found[v] = (noise * scale_of(t)).to(t).masked_fill_(immovable(t), 0)
    return found


def _slope(
    tape: Tape,
    place: int,
    given: Mapping[int, tuple[Tensor, Tensor]],
    direction: Mapping[int, Tensor],
    seeds: Mapping[int, Tensor],
    name: str,
) -> Slope | None:
    length = sqrt(sum(float(d.abs().double().square().sum()) for d in direction.values()))
    if length == 0:
        return None
    expected = sum(float((real_parts(g).double() * real_parts(direction[v])).sum()) for v, (_, g) in given.items())
    size = sqrt(sum(scale_of(t) ** 2 * t.numel() for t, _ in given.values()))
    unit = max(torch.finfo(t.dtype).eps for t in (*(t for t, _ in given.values()), *seeds.values()))

    def loss(by: float) -> float:
        return replay(tape, place, {v: t + by * direction[v] for v, (t, _) in given.items()}, seeds)

    return measured_slope(name, expected, loss, unit ** (1 / 3) * size / length, unit)


class _Scopes:
    """Which calls ran inside which module."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, str]] = []

    def of(self, index: int) -> str:
        """The name of the innermost module that made a call."""
        around = [(stop - start, name) for start, stop, name in self.spans if start <= index < stop]
        return min(around, default=(0, ""))[1]


@contextmanager
def _scopes(module: nn.Module) -> Iterator[_Scopes]:
    """Note, inside the ``with`` block, where the calls of each module begin and end on the tape that is recorded."""
    scopes = _Scopes()
    names = {id(m): name for name, m in module.named_modules()}
    began: list[int] = []

    def calls() -> int:
        recorder = current_recorder()
        return 0 if recorder is None else len(recorder.tape.operations)

    def before(_: nn.Module, __: Any) -> None:
        began.append(calls())

    def after(inner: nn.Module, _: Any, __: Any) -> None:
        start = began.pop()
        if names.get(id(inner)):
            scopes.spans.append((start, calls(), names[id(inner)]))

    handles = (
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after, always_call=True),
    )
    try:
        yield scopes
    finally:
        for handle in handles:
            handle.remove()
