"""A part without a usable derivative inside an ordinary autograd model: its backward pass is made of queries.

The part is a chain of opaque operations, and its backward pass the engine's (see autograd.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hzo._options import positive, whole
from hzo.errors import InputError
from hzo.execution import counting
from hzo.external.autograd import Pass, forget, in_dtype_of, planned, through
from hzo.external.guard import Guarded, expect
from hzo.finite_differences import Scheme, check_scheme, check_step
from hzo.gradients import traced_for
from hzo.noise import Noise
from hzo.planner import check_smoothing
from hzo.plans import Plan, Tree
from hzo.structure import Assume
from hzo.tape import current_recorder
from hzo.tracing import Chain, Local, Promise, Stages, declare, declared, declared_step
from hzo.tracing.recorder import batch_size
from hzo.verification import infer_structure

Part = Callable[..., Any]


def blackbox(
    f: Part | Sequence[Part] | Chain,
    *,
    numpy: bool = False,
    batched: bool | int = True,
    timeout: float | None = None,
    name: str | None = None,
    elementwise: bool = False,
    promises: Promise | Sequence[Promise] = (),
    parameters: Literal["perturbed", "ignored"] = "perturbed",
    tree: Tree = "planned",
    assume: Assume = "structure",
    scheme: Scheme = "central",
    step: float | None = None,
    mu: float | None = None,
    draws: int = 1,
    noise: float | Noise | Literal["measured"] | None = None,
    target_cosine: float | None = None,
    budget: float | None = None,
    memory: int | None = None,
) -> BlackBox:
    """Make an ``nn.Module`` of any callable; ``loss.backward()`` flows through it by finite differences.

    Args:
        f: from tensor(s) with the batch in dimension 0 to tensor(s) alike; samples must not influence each other. A
            list of such is a chain of black boxes, whose backward pass follows a planned tree. An ``hzo.Chain`` is
            looked into: layers that are known by their type are no black boxes.
        numpy: ``f`` takes and returns NumPy arrays.
        batched: False where ``f`` cannot take another number of samples than the forward pass; a number where it takes
            exactly so many (the last ones are padded).
        timeout: seconds for one call of ``f``, in a thread of its own; None for any time.
        name: in messages and ``count.boxes``; None takes that of ``f``.
        elementwise, promises: what may be assumed of a single ``f``, as ``hzo.declare`` takes it; ``"inferred"`` tests
            at the first input what seems to hold (``hzo.infer_structure``). Parts of a list are declared one by one.
        parameters: ``"perturbed"``: trainable parameters of an ``f`` that is a module get a gradient, by queries.
            ``"ignored"``: neither they nor other trainable tensors that ``f`` uses get one from here; their gradient
            is your affair (the product of activity and cotangent, say).
        tree, assume, scheme, step, mu, draws: as ``hzo.plan`` takes them. For piecewise constant ``f`` a ``step`` of
            half its quantum, or a smoothing ``mu``.
        noise: None where ``f`` repeats, else an error. Random numbers of torch's do repeat: every query draws those of
            the forward pass, as for dropout. A simulator can do that, a chip cannot: with a noise they are noise. A
            number or ``hzo.Noise`` declares how noisy queries are, ``"measured"`` has it measured at the first backward
            pass (``hzo.calibrate``; again after ``box.recalibrate()``). Steps, repeats and tree are then planned.
        target_cosine, budget: as ``hzo.plan`` takes them; a budget is in passes of this part.
        memory: bytes for the perturbed copies of a chunk.

    Cost of a backward pass: that of the plan (``box.plan_for(x)`` shows it); for a single callable of n input elements
    a sample 2 n B queries, 2 B if elementwise, with forward differences half of it. Where ``f`` repeats, a base
    evaluation checks that it did. A first pass traces: about six runs of at most four samples. Inputs that require no
    gradient cost nothing. Trainable parameters inside ``f`` are perturbed one by one, a query of B samples for
    each element and direction (2 with central differences); freeze those that are not to be trained.

    Raises:
        InputError: options that do not fit; a changed output shape, or one without the batch first.
        QueryError, QueryTimeoutError, NonFiniteError: what ``f`` did, and in which query.
        NondeterministicError: it gave two results for one input, and no noise is declared.
        CoupledSamplesError: samples influence each other.
        PlanError: a target that cannot be reached. Parameters and buffers are as before.
    """
    if timeout is not None:
        positive("timeout in seconds", timeout, "None waits for ever")
    if not isinstance(batched, bool):
        whole("batched, a number of samples a call,", batched, "True takes any number, False one")
    if parameters not in ("perturbed", "ignored"):
        raise InputError(f"expected parameters='perturbed' or 'ignored', got {parameters!r}")
    ignores = parameters == "ignored"
    check_step(step)
    check_smoothing(mu, draws, check_scheme(scheme), modelled=noise is not None)
    if isinstance(noise, str) and noise != "measured":
        raise InputError(f"expected noise to be a number, an hzo.Noise, 'measured' or None, got {noise!r}")
    said = (promises,) if isinstance(promises, (str, Local)) else tuple(promises)
    known = (*(("elementwise",) if elementwise else ()), *(p for p in said if p != "inferred"))
    if (known or said) and (isinstance(f, (Chain, list, tuple))):
        raise InputError("promises are made of one callable; give those of a chain one by one: hzo.declare(part, …)")

    def guard(part: Part, of: str) -> nn.Module:
        if isinstance(part, BlackBox):
            return part
        if not callable(part):
            raise InputError(f"expected something that can be called, got a {type(part).__name__}")
        guarded = Guarded(
            part, of, numpy=numpy, batched=batched, timeout=timeout, ignores=ignores, noisy=noise is not None
        )
        module = part if isinstance(part, nn.Module) else None
        own = (*known, *(declared(module) or ()))
        # Declared, the step holds in an hzo chain, too; where noise is planned for, the error model must know of it.
        return declare(guarded, *own, step=declared_step(module) or (step if noise is None else None))

    if isinstance(f, Chain):
        stages: nn.Module = f.model
    else:
        parts: list[Any] = list(f) if isinstance(f, (list, tuple)) else [f]
        if not parts:
            raise InputError("hzo.blackbox got an empty list; give a callable, or several")
        names = [name or _name(part) for part in parts]
        if name and len(parts) > 1:
            names = [f"{name}[{k}]" for k in range(len(parts))]
        stages = Stages([guard(part, of) for part, of in zip(parts, names, strict=True)])
    options: dict[str, Any] = {"tree": tree, "assume": assume, "scheme": scheme, "step": step}
    options |= {"mu": mu, "draws": draws} if mu is not None else {}
    options |= {
        key: value for key, value in (("target_cosine", target_cosine), ("budget", budget)) if value is not None
    }
    if noise is not None and noise != "measured":
        options["noise"] = noise
    return BlackBox(stages, options, measured=noise == "measured", inferred="inferred" in said, memory=memory)


def _name(f: Any) -> str:
    return str(getattr(f, "__name__", type(f).__name__))


class BlackBox(nn.Module):
    """Made by ``hzo.blackbox``. In an hzo chain its parts are operations of the chain: what was promised of them and
    their step hold there, and the chain's plan decides all else."""

    def __init__(
        self, stages: nn.Module, options: Mapping[str, Any], *, measured: bool, inferred: bool, memory: int | None
    ) -> None:
        super().__init__()
        self.stages = stages
        self.options = dict(options)
        self.measured = measured
        self.inferred = inferred
        self.memory = memory

    def forward(self, *inputs: Tensor) -> Any:
        _check_inputs(inputs)
        self._know(inputs)
        recorder = current_recorder()
        if recorder is not None and recorder.opaque is not None:  # an hzo chain: the parts are operations of it
            return in_dtype_of(inputs, self.stages(*inputs))
        if not torch.is_grad_enabled():
            return in_dtype_of(inputs, self.stages(*inputs))
        parameters = {name: p for name, p in self.stages.named_parameters() if p.requires_grad}
        if not any(t.requires_grad for t in (*inputs, *parameters.values())):
            with torch.no_grad():
                return in_dtype_of(inputs, self.stages(*inputs))
        this = Pass(
            self.stages,
            self.options,
            self.measured,
            self.memory,
            tuple(t.requires_grad for t in inputs),
            tuple(parameters),
        )
        return through(this, inputs, tuple(parameters.values()))

    def plan_for(self, *inputs: Tensor) -> Plan:
        """The plan of a backward pass at inputs like these, all of them wanting a gradient. Not yet of a box whose
        noise is measured: that is known after its first backward pass."""
        _check_inputs(inputs)
        self._know(inputs)
        x = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in inputs)
        chain = traced_for(self.stages, x, strict=False)
        return planned(chain, self.options)

    def recalibrate(self) -> None:
        """Measure noise, gains and curvature again at the next backward pass: activities change as training goes on."""
        forget(self.stages)

    def _know(self, inputs: Sequence[Tensor]) -> None:
        """What the parts must know of a forward pass before they run."""
        # A chain that is traced through the box has no forward pass of the box's own.
        expect(self.stages, None if counting.being_done() == counting.TRIAL_RUN else inputs[0].shape[0])
        if self.inferred:
            for part in self.stages.modules():
                if isinstance(part, Guarded):
                    declare(part, *_inferred(part, inputs), step=declared_step(part))
            self.inferred = False


def _inferred(part: Guarded, inputs: Sequence[Tensor]) -> list[Promise]:
    """What holds near the input and far from it: a part that saturates looks affine where it does not."""
    if len(inputs) != 1:
        raise InputError("promises are inferred of parts with one input; declare those of this one: promises=(…)")
    x = inputs[0].detach()
    found = [list(infer_structure(part, scale * x)) for scale in (1, 10, 1000)]
    return [promise for promise in found[0] if all(promise in others for others in found[1:])]


def _check_inputs(inputs: Sequence[Any]) -> None:
    for item in inputs:
        if not isinstance(item, Tensor):
            raise InputError(
                f"a black box takes tensors with the batch in dimension 0, got a {type(item).__name__}; bind all "
                "else to the callable: functools.partial(f, option=value)"
            )
    if not inputs:
        raise InputError("a black box needs a tensor to work on, got none")
    batch_size(tuple(inputs), {})
