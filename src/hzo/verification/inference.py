"""``infer_structure``: what an unknown module seems to promise, from probing alone.

A proposal, not a proof: what holds at the inputs tried may fail at others. It reads no type, no code and no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from hzo.errors import HzoError, InputError
from hzo.execution import contained, counting, devices_of, random_state, set_random_state
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import Local, Promise, declare
from hzo.verification import properties
from hzo.verification.properties import PropertyResult
from hzo.verification.structure import check_structure

_SAMPLES = 4
_LONGEST = 256  # places along an axis that are probed one by one
_ROUNDS = 3  # moves of every place; a dead unit or a maximum may hide one of them
_STRIDES = (Fraction(1), *(Fraction(n) for n in range(2, 9)), *(Fraction(1, n) for n in range(2, 5)))


@dataclass(frozen=True)
class InferredStructure:
    """The result of ``hzo.infer_structure``: promises about a module, for ``hzo.declare(module, *inferred)``.

    Attributes:
        promises: that held. tested: every property by name, and what its test saw.
    """

    promises: tuple[Promise, ...]
    tested: tuple[tuple[str, PropertyResult], ...]

    def __iter__(self) -> Iterator[Promise]:
        return iter(self.promises)

    def __str__(self) -> str:
        lines = [f"promises: {', '.join(map(str, self.promises)) or 'none'}"]
        for name, finding in self.tested:
            why = f" ({finding.where})" if finding.where and not finding.holds else ""
            lines.append(f"  {name}: {'yes' if finding.holds else 'no'}, error {finding.error:.2g}{why}")
        return "\n".join(lines)

    __repr__ = __str__


@torch.no_grad()
def infer_structure(module: nn.Module, x: Tensor, *, seed: int = 0) -> InferredStructure:
    """Find out by experiments what holds of a module's Jacobian (elementwise, affine, local, …), for ``hzo.declare``.

    The module runs near ``x``, at random points and at shifted ones; what they do not contradict is proposed.

    Args:
        module: from one tensor with the batch in dimension 0 to one alike. Its type, code and weights are not looked
            at; at most four samples of ``x`` are used.
        x: an input as the module will meet it in the network.
        seed: of moves and random points, drawn apart from the global random state.

    Looked for: elementwise, affine, symmetric, tokens, locality along each axis (between axes of the same number, of at
    most 256 places), reindexing, stationary; positively homogeneous is reported and promises nothing. Strong promises
    are only proposed where they pass ``hzo.check_structure``.

    Cost: three runs for each place along each axis and some hundred more, of at most four samples, counted as
    ``check_evaluations``. Buffers, random state and training flags are as before. Source: ours.

    Raises:
        InputError: ``x`` or the output is not one floating tensor with the batch first.
    """
    if not isinstance(module, nn.Module):
        raise InputError(
            f"hzo.infer_structure expects a module, got {type(module).__name__}; wrap a function: hzo.Chain([f]).model"
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        raise InputError(
            "hzo.infer_structure expects a floating tensor x of shape (B, …), at least one axis to a sample"
        )
    refuse_transforms()
    generator = torch.Generator().manual_seed(seed)
    x = x.detach()[:_SAMPLES].clone()  # a module may write to it
    if len(x) == 1:  # samples can only be told apart where there are two
        x = torch.cat([x, properties.moved(x, generator)])
    with contained([module]):
        return _infer(module, x, generator)


def _infer(module: nn.Module, x: Tensor, generator: torch.Generator) -> InferredStructure:
    y = _output(module, x)
    shape, output = (1, *x.shape[1:]), (1, *y.shape[1:])
    rows, state = x.reshape(len(x), -1), random_state(devices_of([x]))

    def run(moved: Tensor) -> list[Tensor]:
        set_random_state(state)
        counting.add(check_evaluations=len(moved))
        return [module(moved.reshape(x.shape)).reshape(len(moved), -1)]

    tested = {
        "deterministic": properties.deterministic(run, rows),
        "samples apart": properties.samples_apart(run, rows, generator),
    }
    if not all(finding.holds for finding in tested.values()):
        return InferredStructure((), tuple(tested.items()))
    if shape == output:
        tested["elementwise"] = _tried(lambda: properties.elementwise(run, rows, shape, generator))
    else:
        tested["elementwise"] = PropertyResult(float("inf"), 0.0, 0, f"{shape[1:]} goes in and {output[1:]} comes out")
    tested["affine"] = _tried(lambda: properties.affine(run, rows, generator))
    tested["positively homogeneous"] = _tried(lambda: _homogeneous(run, rows))
    promises: list[Promise] = [name for name in ("elementwise", "affine") if tested[name].holds]
    affine = tested["affine"].holds
    if shape == output and not tested["elementwise"].holds:
        tested["symmetric"] = _tried(lambda: properties.symmetric(run, rows, generator))
        promises += ["symmetric"] if tested["symmetric"].holds else []
    if not tested["elementwise"].holds and len(shape) == len(output):
        local = [p for axis in range(1, len(shape)) if (p := _along(run, rows, shape, output, axis, generator))]
        apart = {p.axis for p in local if p == Local(p.axis)}
        if len(shape) >= 3 and x.shape[:-1] == y.shape[:-1] and apart.issuperset(range(1, len(shape) - 1)):
            tested["tokens"] = properties.alike(run, rows, rows.shape[1] // shape[-1], generator)
            if tested["tokens"].holds:
                promises.append("tokens")
                local = [p for p in local if p.axis == len(shape) - 1]
        promises += local
        if affine and all(any(p.axis == axis for p in local) for axis in range(2, len(shape))) and len(shape) > 2:
            tested["stationary"] = _checked(module, x, *promises, "stationary")
            promises += ["stationary"] if tested["stationary"].holds else []
    if affine:
        tested["reindexing"] = _checked(module, x, "reindexing")
        promises += ["reindexing"] if tested["reindexing"].holds else []
    return InferredStructure(tuple(promises), tuple(tested.items()))


def _output(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    counting.add(check_evaluations=len(x))
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() < 1 or len(y) != len(x):
        came = f"shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"hzo.infer_structure expects {len(x)} samples in one floating tensor to come out, got {came}")
    return y


def _tried(test: Callable[[], PropertyResult]) -> PropertyResult:
    """A test at points that the module refuses does not hold."""
    try:
        return test()
    except Exception as error:
        return PropertyResult(float("inf"), 0.0, 0, f"{type(error).__name__}: {error}")


class _Wrapped(nn.Module):
    """The module under another name, so that declaring it on trial leaves the module alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x)
        return result


def _checked(module: nn.Module, x: Tensor, *promises: Promise) -> PropertyResult:
    """Whether the rule that the last of the promises leads to is the adjoint."""
    wrapped = declare(_Wrapped(module), *promises)
    try:
        report = check_structure(wrapped, x)
    except HzoError as error:
        return PropertyResult(float("inf"), 0.0, 0, str(error).splitlines()[min(1, str(error).count("\n"))].strip())
    by_rule = [check.finding for check in report.checks if check.promise == f"adjoint rule ({promises[-1]})"]
    return by_rule[0] if by_rule else PropertyResult(float("inf"), 0.0, 0, "no rule makes use of it")


def _homogeneous(run: properties.Evaluate, rows: Tensor) -> PropertyResult:
    base = run(rows)[0]
    found = [properties.difference(run(rows * c)[0] / c, base) for c in (0.5, 2.0, 8.0)]
    error = max(float(f.max()) for f in found)
    return PropertyResult(error, properties.slack([base], rows), 3, "f(c·x) is not c·f(x)", 0.0, error)


def _along(
    run: properties.Evaluate,
    rows: Tensor,
    shape: tuple[int, ...],
    output: tuple[int, ...],
    axis: int,
    generator: torch.Generator,
) -> Local | None:
    """The narrowest interval that covers what was seen along one axis; None where it restricts nothing."""
    inputs, outputs = shape[axis], output[axis]
    if not 1 < inputs <= _LONGEST:
        return None
    base = run(rows)[0]
    tolerance = properties.slack([base], rows)
    seen: set[tuple[int, int]] = set()
    for _ in range(_ROUNDS):
        other = properties.moved(rows, generator)
        for i in range(inputs):
            mask = torch.zeros(shape, dtype=torch.bool)
            mask.select(axis, i).fill_(True)
            moved = torch.where(mask.flatten().to(rows.device), other, rows)
            change = properties.difference(base, run(moved)[0]).amax(0).view(output) > tolerance
            places = change.movedim(axis, 0).reshape(outputs, -1).any(1).nonzero().flatten()
            seen.update((int(o), i) for o in places)
    fitting = [fit for stride in _STRIDES if (fit := _interval(axis, seen, stride))]
    best = min(fitting, key=lambda p: (p.high - p.low, abs(p.stride - Fraction(inputs, outputs))), default=None)
    full = (1 << inputs) - 1
    return best if best is not None and full not in best.matrix(inputs, outputs) else None


def _interval(axis: int, seen: set[tuple[int, int]], stride: Fraction) -> Local | None:
    offsets = [i - o * stride for o, i in seen]
    if not offsets:
        return None
    numbers = (min(offsets), max(offsets), stride)
    return Local(axis, *(int(n) if n.denominator == 1 else n for n in numbers))
