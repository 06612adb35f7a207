"""A box that is planned as a whole: its forward pass is a base pass of its chain, its backward pass a sweep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo.errors import InaccurateGradientWarning, NondeterministicError
from hzo.execution import Activations, contained, counting, full_float32, run_again, undone_on_error, with_parameters
from hzo.external.guard import Guarded, expect
from hzo.external.part_promises import check_parts
from hzo.external.state import Saved
from hzo.finite_differences import accumulation_dtype, scale_of
from hzo.gradients import Sweep, at_the_end, base_pass, plan_of, sweep_plan, traced_for
from hzo.measurement import calibrate
from hzo.planner import plan as make_plan
from hzo.plans import Plan, schedule
from hzo.tape import Ref
from hzo.tracing import Chain
from hzo.tracing.recorder import close

_measured: WeakKeyDictionary[Chain, Plan] = WeakKeyDictionary()
"""Plans of chains whose noise was measured."""
_promised: WeakKeyDictionary[Chain, int] = WeakKeyDictionary()
"""How many times what is promised of the parts of a chain was tried."""
_tried: WeakSet[Chain] = WeakSet()
"""Chains of which it was tried how straight they are over the steps of their plan."""

BENT = 0.2  # change of the derivative within a step, above which its gradient is said to be inaccurate


def planned(chain: Chain, options: Mapping[str, Any], measured: bool) -> Plan:
    """The plan of a box's chain: the one that followed from measuring it, if it was.

    Raises:
        NondeterministicError: a part is noisy, and that was to be ``measured`` and has not been yet.
    """
    found = _measured.get(chain)
    noisy = [op.name for op in chain.traced.operations if not op.deterministic]
    if found is None and noisy and measured:
        raise NondeterministicError(
            f"the noise of the black box {noisy[0]} is measured at the first backward pass, and its plan follows "
            "from it: run one, then ask for the plan; or declare how noisy it is, noise=hzo.Noise(…)"
        )
    return found or plan_of(chain, options)


def forget(stages: nn.Module) -> None:
    """Forget what was measured of these stages."""
    for chain in [chain for chain in _measured if chain.model is stages]:
        del _measured[chain]


@dataclass
class PlannedCall:
    """One forward pass through a box, and what its backward pass needs of it.

    Attributes:
        stages, options: of the box: what runs, and how its backward pass is planned.
        measured: whether its noise is to be measured. memory: bytes for the perturbed copies of a chunk.
        wanted: which inputs require a gradient. names: of the parameters that do.
        inputs, parameters: as they were in the forward pass, whoever holds others since.
        chain, activations: what was traced, and what its base pass left. structure: of the output. seed: of smoothing.
        autocast: device, and the dtype that autocast computed in there, if it did. training: modes of the modules.
        states: those that parts with a state began with. consumed: a backward pass has been through it.
        check_promises: try what is promised of the parts, once. inferred: promises are hzo's own, and tried every time.
    """

    stages: nn.Module
    options: Mapping[str, Any]
    measured: bool
    memory: int | None
    wanted: tuple[bool, ...]
    names: tuple[str, ...]
    inputs: tuple[Tensor, ...] = ()
    parameters: dict[str, Tensor] = field(default_factory=dict)
    chain: Chain = field(init=False)
    activations: Activations = field(init=False)
    structure: Any = None
    seed: int = 0
    autocast: tuple[str, torch.dtype | None] = ("cpu", None)
    training: dict[nn.Module, bool] = field(default_factory=dict)
    states: dict[Guarded, Saved] = field(default_factory=dict)
    consumed: bool = False
    check_promises: bool = True
    inferred: bool = False

    @property
    def repeats(self) -> bool:
        """Whether the stages are said to give the same for the same."""
        return not self.measured and "noise" not in self.options

    def forward(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A base pass, whose activations wait for the backward pass."""
        return _forward(self, inputs, parameters)

    def carry_back(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The cotangents of inputs and parameters, by a sweep."""
        return _backward(self, cotangents)


@full_float32()
def _forward(this: PlannedCall, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A base pass, whose activations wait for the backward pass."""
    device = inputs[0].device.type
    this.autocast = device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    this.training = {module: module.training for module in this.stages.modules()}
    this.inputs = tuple(t.detach().requires_grad_(w) for t, w in zip(inputs, this.wanted, strict=True))
    this.parameters = {n: p.detach().requires_grad_() for n, p in zip(this.names, parameters, strict=True)}

    def run() -> None:
        this.chain = traced_for(this.stages, this.inputs, strict=False)
        graph = this.chain.traced
        noisy = next((op for op in graph.operations if not op.deterministic), None)
        if noisy is not None and this.repeats:
            raise _two_results(noisy.name)
        with undone_on_error([this.stages]):
            this.activations, _ = base_pass(this.chain, this.inputs)
            this.states = {
                part: part.remembers.start for part in parts_of(this.stages) if part.remembers.start is not None
            }
            this.seed = int(torch.randint(2**62, ())) if "mu" in this.options else 0

    _with_parameters(this, run)
    # Copies: what becomes of the output must not reach what is stored.
    output = pytree.tree_map_only(Ref, lambda ref: this.activations.tensor(ref.value).clone(), this.chain.traced.output)
    leaves, this.structure = pytree.tree_flatten(in_dtype_of(inputs, output))
    return tuple(leaves)


@full_float32()
def _backward(this: PlannedCall, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The cotangents of inputs and parameters, by a sweep; nothing is asked where all that come in are zero."""
    graph = this.chain.traced
    given = pytree.tree_unflatten(list(cotangents), this.structure)
    at_end = {v: g.to(accumulation_dtype(graph.values[v].dtype)) for v, g in at_the_end(graph, given).items()}
    if not any(bool(g.any()) for g in at_end.values()):
        return [None] * (len(this.wanted) + len(this.names))

    this.consumed = True

    def run() -> Sweep:
        if this.measured and this.chain not in _measured:
            of = {key: this.options[key] for key in ("assume", "scheme")}
            with _from(this.states):
                found = calibrate(this.chain, this.inputs, cotangent=given, **of)
            _measured[this.chain] = make_plan(this.chain, calibration=found, **this.options)
        plan = planned(this.chain, this.options, this.measured)
        # A sweep releases what it has read, and there may be another one.
        activations = this.activations.again()
        with contained([this.stages]), _from(this.states):
            for module, training in this.training.items():  # of the forward pass, too
                module.training = training
            expect(this.stages, this.inputs[0].shape[0])
            if this.repeats:
                _check_same(this)
            elif this.options.get("step") is None and this.chain not in _tried:
                _check_straight(this, plan)
                _tried.add(this.chain)
            _check_promises(this, activations)
            return sweep_plan(
                graph, plan, schedule(graph, plan), activations, at_end, memory=this.memory, seed=this.seed
            )

    device, dtype = this.autocast  # autograd runs a backward pass outside the user's autocast
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        found = _with_parameters(this, run)
    at_inputs = found.cotangents.get(0, {})
    wanted = [at_inputs.get(v) for v in graph.inputs]
    wanted += [found.gradients[name][1] if name in found.gradients else None for name in this.names]
    tensors = (*this.inputs, *this.parameters.values())
    return [None if g is None else g.to(t.dtype) for t, g in zip(tensors, wanted, strict=True)]


def seconds_of_plan(chain: Chain, plan: Plan, inputs: Sequence[Tensor]) -> float:
    """The time of a backward pass that follows a plan: of its queries and of the test that the parts repeat.

    Each operation is run twice and timed; queries that are put into one call take less where the part computes samples
    at once. Counted as checks.
    """
    graph = chain.traced
    times = []
    with counting.as_checks(), counting.doing("a measurement of time"), contained([chain.model]), torch.no_grad():
        activations, _ = base_pass(chain, tuple(t.detach() for t in inputs))
        for k in range(len(graph.operations)):
            tried = []
            for _ in range(2):  # the shorter one: a busy machine makes any of them long
                began = perf_counter()
                run_again(graph, activations, k, k + 1, 1, [()])
                tried.append(perf_counter() - began)
            times.append(min(tried))
    passes = [(node.cost.queries, node.operations) for node in plan.nodes]
    passes += [(probe.cost.queries, (probe.operation,)) for probe in plan.perturbed]
    of_samples = sum(queries * sum(times[k] for k in operations) for queries, operations in passes)
    of_one = sum(
        node.cost.measurements * sum(times[k] for k in node.operations) / activations.batch for node in plan.nodes
    )
    return of_samples + of_one + sum(times)


def parts_of(stages: nn.Module) -> list[Guarded]:
    """The callables from outside among the stages."""
    return [part for part in stages.modules() if isinstance(part, Guarded)]


@contextmanager
def _from(states: Mapping[Guarded, Saved]) -> Iterator[None]:
    """Inside, every call of a part begins with the state that the forward pass began with."""
    with ExitStack() as stack:
        for part, start in states.items():
            stack.enter_context(part.queries_from(start))
        yield


def _with_parameters(this: PlannedCall, run: Callable[[], Any]) -> Any:
    """Run with the parameters of the forward pass, whoever holds others since."""
    now = dict(this.stages.named_parameters())
    with with_parameters(this.stages, {id(now[name]): p for name, p in this.parameters.items()}):
        return run()


def _check_same(this: PlannedCall) -> None:
    """Run the stages once more: differences of a result that has changed since would mean nothing."""
    graph, first = this.chain.traced, this.activations
    again = first.again()
    with counting.doing("the test that it is deterministic"):
        run_again(graph, again, 0, len(graph.operations), len(graph.stages), [()] * len(graph.operations))
    for op in graph.operations:
        if not all(close(first.tensor(v), again.tensor(v)) for v in op.writes):
            raise _two_results(op.name)


def _check_promises(this: PlannedCall, activations: Activations) -> None:
    """What is promised of the parts, tried the first time that a chain is swept; what was inferred, each time."""
    before = _promised.get(this.chain, 0)
    if not this.check_promises or this.options["assume"] == "nothing" or (before and not this.inferred):
        return
    check_parts(this.chain.traced, activations, noisy=not this.repeats, inferred=this.inferred, seed=before)
    _promised[this.chain] = before + 1


def _check_straight(this: PlannedCall, plan: Plan) -> None:
    """Warn where the derivative changes within the steps of a plan.

    A declared noise says nothing of how far a part is smooth, and waves are not seen by a measurement at few lengths.
    One element of each sample is moved by a whole step and by half of one, up and down; what the derivatives differ by
    more than noise does, as two readings at one place show it, is the part's own. Costs six passes, as checks.
    """
    lengths = [n.relative_step for n in plan.nodes if n.relative_step is not None]
    if not lengths or "mu" in this.options:
        return
    generator = torch.Generator().manual_seed(0)

    def ask(share: float) -> list[Tensor]:
        moved = [t + share * d if d is not None else t for t, d in zip(this.inputs, directions, strict=True)]
        return [t.double() for t in pytree.tree_leaves(this.stages(*moved)) if t.is_floating_point()]

    directions = [_one_element(t, max(lengths), generator) if t.is_floating_point() else None for t in this.inputs]
    counting.add(check_evaluations=6 * len(this.inputs[0]))
    with counting.doing("the test how long a step may be"), torch.no_grad():
        first, second, up, down, half_up, half_down = map(ask, (0.0, 0.0, 1.0, -1.0, 0.5, -0.5))
    noise = change = seen = 0.0
    for a, b, u, d, hu, hd in zip(first, second, up, down, half_up, half_down, strict=True):
        noise += float((a - b).square().sum()) / 2  # of one reading
        change += float(((u - d) - 2 * (hu - hd)).square().sum())
        seen += float((u - d).square().sum())
    # By noise alone the change would be ten times that of one reading, give or take a third of it, say.
    if change - 15 * noise > BENT**2 * max(seen - 2 * noise, 0.0):
        share, names = ((change - 10 * noise) / seen) ** 0.5, ", ".join(map(str, parts_of(this.stages)))
        advice = "" if this.measured else ", or have noise and smoothness measured: noise='measured'"
        warnings.warn(
            f"the gradient of {names} is inaccurate: the steps of its plan are long, for the noise, and within one the "
            f"derivative changes by about {share:.0%}. Say how far the part is smooth: step= (half a radian for a "
            f"phase, say){advice}",
            InaccurateGradientWarning,
            stacklevel=2,
        )


def _one_element(tensor: Tensor, length: float, generator: torch.Generator) -> Tensor:
    """A step for one element of each sample, in units of the root mean square."""
    rows = torch.zeros_like(tensor).reshape(len(tensor), -1)
    chosen = torch.randint(rows.shape[1], (len(rows), 1), generator=generator).to(rows.device)
    return rows.scatter_(1, chosen, length * scale_of(tensor)).reshape(tensor.shape)


def _two_results(name: str) -> NondeterministicError:
    return NondeterministicError(
        f"the black box {name} gave two results for the same input, and differences of its results would mean nothing. "
        "Does it keep a state that hzo cannot see (in another process, a library, a global variable)? Give the state "
        "to it and have it returned, f(x, state) -> (y, state), or say how it is saved and put back: "
        "hzo.blackbox(f, state=(save, load)). Only where results differ by the noise of a measurement, new in every "
        "reading, say so: noise='measured' has steps and repeats planned for it"
    )


def in_dtype_of(inputs: Sequence[Tensor], outputs: Any) -> Any:
    """Floating outputs in the dtype of the inputs: NumPy code that computes in another one fits into the model."""
    dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.get_default_dtype())

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor

    return pytree.tree_map_only(Tensor, cast, outputs)
