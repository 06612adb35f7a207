"""A part without a usable derivative inside an ordinary autograd model: its backward pass is made of queries.

A single callable is asked directly (call.py, queries.py). A list of them, or a part that is noisy, is planned as a
whole (planned.py): stops between the parts, steps and repeats against noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo._compiler import uncompiled
from hzo._options import one_of, positive, shown, whole
from hzo.distributed import refuse_all_wrappers
from hzo.errors import InputError
from hzo.execution import counting
from hzo.external.autograd import check_untraced, through, through_planned
from hzo.external.call import BoxCall, OnFailure, Settings
from hzo.external.cost import BoxPlan, ChainPlan, plan_of_call
from hzo.external.guard import Guarded, expect, followed, innermost, vmapped
from hzo.external.planned import PlannedCall, forget, in_dtype_of, planned, seconds_of_plan
from hzo.external.signature import argument_names, flatten
from hzo.external.state import floating
from hzo.external.state_history import StateHistory
from hzo.external.steps import MEASURED, Bounds, Steps
from hzo.finite_differences import Scheme, check_scheme
from hzo.gradients import traced_for
from hzo.noise import Noise
from hzo.plans import Tree, check_not_modelled, check_smoothing
from hzo.pools import Pool, processes
from hzo.structure import Assume
from hzo.tape import current_recorder
from hzo.tape.history import requires_grad
from hzo.tracing import Chain, Local, Promise, Stages, batch_size, declare, declared, declared_links, declared_step
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
    check_promises: bool = True,
    parameters: Literal["perturbed", "ignored"] = "perturbed",
    tree: Tree = "planned",
    assume: Assume = "structure",
    scheme: Scheme = "central",
    step: Any = None,
    relative: bool = False,
    bounds: Any = None,
    max_error: float | None = None,
    mu: float | None = None,
    draws: int = 1,
    batch_dim: Literal["found", 0] | None = "found",
    integers: Literal["floating", "kept"] = "floating",
    state: Any = "found",
    on_failure: OnFailure = "pass",
    workers: int | None = None,
    executor: Any = None,
    retries: int = 3,
    hedge: float | None = None,
    noise: float | Noise | Literal["measured"] | None = None,
    target_cosine: float | None = None,
    budget: float | None = None,
    memory: int | None = None,
) -> BlackBox:
    """Make an ``nn.Module`` of any callable; ``loss.backward()`` flows through it by finite differences.

    The module is called as ``f`` is: with tensors, and whatever else ``f`` takes, by position or by keyword, nested in
    tuples, dicts and dataclasses. It returns what ``f`` does, with tensors in place of arrays and numbers.

    Args:
        f: any callable. Tensors with the batch in dimension 0 have a gradient for each sample, and samples must not
            influence each other; others are shared by all samples. A list of callables (tensors in, tensors out) is a
            chain, whose backward pass follows a planned tree. An ``hzo.Chain`` is looked into: layers that are known by
            their type are no black boxes.
        numpy: ``f`` takes and returns NumPy arrays.
        batched: False where ``f`` cannot take another number of samples than the forward pass; a number where it takes
            exactly so many (the last ones are padded).
        timeout: seconds for one call of ``f``, in a thread of its own; None for any time. As many perturbed samples go
            into a call as, by the time of the forward pass, take half of it.
        name: in messages and ``count.boxes``; None takes that of ``f``.
        elementwise, promises: what may be assumed of a single ``f``, as ``hzo.declare`` takes it; ``"inferred"`` tests
            at the first input what seems to hold (``hzo.infer_structure``), of each part of a list, too. Else parts of
            a list are declared one by one.
        check_promises: try at the first use of a promise, by one more evaluation (symmetric: five), whether it holds;
            what is inferred, which may end where a kink or a branch begins, at every use. False takes it on trust.
        parameters: ``"perturbed"``: trainable parameters of an ``f`` that is a module get a gradient, by queries.
            ``"ignored"``: neither they nor other trainable tensors that ``f`` uses get one from here; their gradient
            is left to you (the product of activation and cotangent, say).
        tree, assume, scheme, mu, draws: as ``hzo.plan`` takes them. For piecewise constant ``f`` a ``step`` of half its
            quantum, or a smoothing ``mu``.
        step: length of the differences. None takes one for each element from its dtype and its surroundings. A number
            is for all; a list has an entry for each input, a dict for each by name, and a tensor for each element of a
            sample. ``"measured"`` tries many lengths at the first backward pass, and takes the one that suits the
            part's own granularity: a tolerance, a quantum, a narrower dtype inside.
        relative: steps are shares of the size of each element.
        bounds: (low, high), where ``f`` is defined; None on one side for no bound; or such a pair for each input, as
            for ``step``. Differences stay inside, one-sided at the edge.
        max_error: error estimate above which a gradient is an error; None warns above 0.1 where hzo chose the steps.
        batch_dim: ``"found"`` decides by the shapes that come out; 0; or None for a part without a batch, each of whose
            elements is perturbed by itself.
        integers: ``"floating"``: whole numbers and truth values come out in the input's dtype and carry a gradient;
            ``"kept"``: they come out as they are (indices, masks), and carry none.
        state: what ``f`` remembers from call to call. ``"found"`` looks at attributes and buffers of whatever ``f`` is
            made of. A pair of functions ``(save, load)``, or an object with such methods, where it is elsewhere. None:
            nothing. Queries start where the forward pass did, and the forward pass moves the state on once. Gradients
            flow through numbers of the state from call to call, until a backward pass has been through them, or
            ``detach_state()``.
        on_failure: of samples that come out as NaN or infinity. ``"pass"`` hands them on, and is an error where the
            loss depends on them; ``"raise"`` is an error at once; ``"zero"`` makes them zero, without a gradient, and
            ``box.failed`` tells which they are, None under ``vmap``. With ``"zero"`` a sample whose call raises is left
            out alike.
        workers: as many processes of this box's own, in which calls of ``f`` run several at a time; ``box.close()``
            ends them. ``f`` must be one that can be sent there (defined at the top of a module, or anything at all
            where cloudpickle is installed), and must keep no state. From its second pass on, the samples of a batch
            are divided among them, too.
        executor: the same with workers of yours: a ``concurrent.futures.Executor`` (threads, processes, a cluster), or
            a function that makes one. Several calls travel together where they are short for what sending one costs,
            unless ``timeout`` or ``hedge`` is given. One whose worker is lost is asked again up to ``retries`` times.
        hedge: ask a call a second time where it runs longer than so many times the median of the others, once none
            waits any more; the first answer counts. None never does.
        noise: None where ``f`` repeats, else an error. Random numbers of torch's do repeat: every query draws those of
            the forward pass, as for dropout. A simulator can do that, a chip cannot: with a noise they are noise. A
            number or ``hzo.Noise`` declares how noisy queries are, ``"measured"`` has it measured at the first backward
            pass (``hzo.calibrate``; again after ``box.recalibrate()``). Steps, repeats and tree are then planned. A
            state is no noise.
        target_cosine, budget: as ``hzo.plan`` takes them; a budget is in passes of this part.
        memory: bytes for the perturbed copies of a chunk.

    Cost of a backward pass: that of the plan (``box.plan_for(x)`` shows it); for a single callable of n input elements
    a sample 2 n B queries, 2 B if elementwise, with forward differences half of it. Where ``f`` repeats, a base
    evaluation checks that it did; the first pass of a shape has one more that checks that samples are apart. Inputs
    that require no gradient cost nothing. Trainable parameters inside ``f``, and tensors that all samples share, are
    perturbed one by one, a query of B samples for each element and direction (2 with central differences).

    Raises:
        InputError: options that do not fit; a changed output shape, or one without the batch first.
        QueryError, QueryTimeoutError, NonFiniteError: what ``f`` did, and in which query.
        NondeterministicError: it gave two results for one input, and no noise is declared.
        CoupledSamplesError: samples influence each other. DerivativeError: a second derivative was asked for.
        StructureError: a promise does not hold.
        StepError: the error estimate exceeds ``max_error``, or a step is lost in rounding.
        PlanError: a target that cannot be reached. Parameters and buffers are as before.
    """
    options_shown = _shown_options(locals())
    check_smoothing(mu, draws, check_scheme(scheme))
    check_not_modelled(mu, modelled=noise is not None)
    _check_options(timeout, batched, parameters, noise, max_error)
    one_of("on_failure", on_failure, ("pass", "raise", "zero"))
    one_of("integers", integers, ("floating", "kept"))
    one_of("batch_dim", batch_dim, ("found", 0, None))
    said = (promises,) if isinstance(promises, (str, Local)) else tuple(promises)
    known = (*(("elementwise",) if elementwise else ()), *(p for p in said if p != "inferred"))
    whole_plan = noise is not None or isinstance(f, (Chain, list, tuple))
    if (known and isinstance(f, (list, tuple))) or ((known or said) and isinstance(f, Chain)):
        raise InputError("promises are made of one callable; give those of a chain one by one: hzo.declare(part, …)")
    _check_idle(
        not whole_plan and not isinstance(f, BlackBox),
        {"target_cosine": target_cosine is not None, "budget": budget is not None, "tree": tree != "planned"},
    )
    if relative and (step is None or step == MEASURED):
        raise InputError("relative=True says what step= is a share of; give step=, a number, too")
    steps, limits = Steps(step, relative), Bounds(bounds)
    if mu is not None and bounds is not None:
        raise InputError(
            "mu= takes differences at random points on all sides, and cannot stay inside bounds=; give step= in place "
            "of mu=, or clamp inside the part and leave bounds= out"
        )
    length = float(step) if isinstance(step, (int, float)) and not isinstance(step, bool) else None
    if whole_plan:
        _check_single(
            {
                "step (other than a number)": step is not None and length is None,
                "relative": relative,
                "bounds": bounds is not None,
                "max_error": max_error is not None,
                "batch_dim": batch_dim != "found",
                "on_failure": on_failure != "pass",
                "workers": workers is not None,
                "executor": executor is not None,
            }
        )
    pool = _pool(workers, executor, retries, hedge)
    if pool is not None and state not in ("found", None):
        raise InputError(
            "a part that runs in other workers cannot keep a state: give it and return it, f(x, state) -> (y, state)"
        )

    def guard(part: Part, of: str, last: bool) -> nn.Module:
        if isinstance(part, BlackBox):
            return part
        _check_part(part)
        guarded = Guarded(
            part, of, numpy=numpy, batched=batched, timeout=timeout, ignores=parameters == "ignored", noisy=noise is not
            None, state=state, floats=last and integers == "floating", pool=pool,
        )  # fmt: skip
        module = part if isinstance(part, nn.Module) else None
        own = (*known, *(declared(module) or ()))
        # Declared, the step holds in an hzo chain, too; where noise is planned for, the error model must know of it.
        return declare(guarded, *own, step=declared_step(module) or (length if noise is None else None))

    if isinstance(f, Chain):
        stages: nn.Module = f.model
    else:
        parts: list[Any] = list(f) if isinstance(f, (list, tuple)) else [f]
        if not parts:
            raise InputError("hzo.blackbox got an empty list; give a callable, or several")
        names = [name or _name(part) for part in parts]
        if name and len(parts) > 1:
            names = [f"{name}[{k}]" for k in range(len(parts))]
        stages = Stages([guard(part, of, part is parts[-1]) for part, of in zip(parts, names, strict=True)])
    settings = None
    if not whole_plan and not isinstance(f, BlackBox):
        settings = Settings(
            steps, limits, scheme=scheme, mu=mu, draws=draws, memory=memory, integers=integers, on_failure=on_failure,
            batch_dim=batch_dim, max_error=max_error, check_promises=check_promises, inferred="inferred" in said,
        )  # fmt: skip
    options: dict[str, Any] = {"tree": tree, "assume": assume, "scheme": scheme, "step": length}
    options |= {"mu": mu, "draws": draws} if mu is not None else {}
    options |= {
        key: value for key, value in (("target_cosine", target_cosine), ("budget", budget)) if value is not None
    }
    if noise is not None and noise != "measured":
        options["noise"] = noise
    return BlackBox(
        stages,
        options,
        settings,
        measured=noise == "measured",
        inferred="inferred" in said,
        check_promises=check_promises,
        memory=memory,
        options_shown=options_shown,
    )


def _check_part(part: Any) -> None:
    if not callable(part):
        raise InputError(f"expected something that can be called, got a {type(part).__name__}")
    refuse_all_wrappers(part, "make a black box of the module inside of it, and wrap the model that holds the box")


def _shown_options(arguments: Mapping[str, Any]) -> str:
    """The options of ``blackbox`` that somebody gave, as the box's repr shows them."""
    defaults = {name: option.default for name, option in signature(blackbox).parameters.items()}
    given = {name: arguments[name] for name, default in defaults.items() if arguments[name] is not default}
    return "".join(f", {name}={_short(value)}" for name, value in given.items() if name not in ("f", "name"))


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


def _check_options(timeout: Any, batched: Any, parameters: Any, noise: Any, max_error: Any) -> None:
    if timeout is not None:
        positive("timeout in seconds", timeout, "None waits for ever")
    if not isinstance(batched, bool):
        whole("batched, a number of samples a call,", batched, "True takes any number, False one")
    if parameters not in ("perturbed", "ignored"):
        raise InputError(f"expected parameters='perturbed' or 'ignored', got {parameters!r}")
    if isinstance(noise, str) and noise != "measured":
        raise InputError(f"expected noise to be a number, an hzo.Noise, 'measured' or None, got {noise!r}")
    if max_error is not None:
        positive("max_error", max_error)


_MOST_WORKERS = 4096


def _pool(workers: int | None, executor: Any, retries: int, hedge: float | None) -> Pool | None:
    if workers is not None and executor is not None:
        raise InputError("workers= makes an executor of its own; give it, or executor=, not both")
    if hedge is not None:
        positive("hedge", hedge, "None asks no call twice")
    if workers is not None:
        if whole("workers", workers) > _MOST_WORKERS:
            raise InputError(
                f"expected workers up to {_MOST_WORKERS:,}, each of which is a process of this machine, got "
                f"{workers:,}; for more, give executor= that spans machines"
            )
        executor = partial(processes, workers)
    if executor is not None:
        return Pool(executor, whole("retries", retries) if retries else 0, hedge, divides=workers)
    for option, given in {"retries": retries != 3, "hedge": hedge is not None}.items():
        if given:
            raise InputError(f"{option}= is about calls in other workers; give workers= or executor=, too")
    return None


def _check_idle(single: bool, given: Mapping[str, bool]) -> None:
    """Options that would do nothing here: whoever gives them expects that they do."""
    for option, there in given.items():
        if there and single:
            raise InputError(
                f"{option}= plans a list of parts, or repeats against noise: a single callable without noise= is asked "
                f"once for each direction. Leave {option}= out, or say how noisy the part is: noise='measured'"
            )


def _check_single(given: Mapping[str, bool]) -> None:
    """Options that a box which is planned as a whole does not have."""
    for option, there in given.items():
        if there:
            raise InputError(
                f"{option} is an option of a single callable without noise=; of a list of parts make a box of each part"
            )


def _tensors_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not kwargs and all(isinstance(item, Tensor) for item in args)


def _name(f: Any) -> str:
    return str(getattr(f, "__name__", type(f).__name__))


class BlackBox(nn.Module):
    """An ``nn.Module`` around a callable, made by ``hzo.blackbox``: call it as the callable, differentiate through it.

    In a network that hzo plans for, its parts are operations of the network: what was promised of them and their step
    hold there, and that plan decides all else.
    """

    def __init__(
        self,
        stages: nn.Module,
        options: Mapping[str, Any],
        settings: Settings | None,
        *,
        measured: bool,
        inferred: bool,
        check_promises: bool,
        memory: int | None,
        options_shown: str,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.options_shown = options_shown
        self.options = dict(options)
        self.settings = settings
        self.measured = measured
        self.inferred = inferred
        self.check_promises = check_promises
        self.memory = memory
        self.failed: Tensor | None = None
        self._known: dict[Any, Any] = {}
        self._to_infer = inferred  # until the first forward pass
        self._history = StateHistory()

    def __repr__(self) -> str:
        parts = [part.name if isinstance(part, Guarded) else repr(part) for part in self.stages.children()]
        what = parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"
        return f"BlackBox({what}{self.options_shown})"

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        recorder = current_recorder()
        if recorder is not None and recorder.opaque is not None and _tensors_alone(args, kwargs):
            _check_inputs(args)  # an hzo chain: the parts are operations of it
            self._know(args, {})
            return in_dtype_of(args, self.stages(*args))
        if self.settings is None:
            return self._whole(args, kwargs)
        guard = self._guard
        self._know(args, kwargs)
        call, tensors, parameters = self._call(args, kwargs)
        wanted = [t for t in (*tensors, *parameters) if requires_grad(t)]
        state: list[Tensor] = []
        if torch.is_grad_enabled():
            keys, state = self._history.reaching(guard)
            call = replace(call, state_keys=keys, names=[*call.names, *(f"state {key[-1]}" for key in keys)])
        if torch._C._functorch.peek_interpreter_stack() is not None:
            guard.check_held()
        if not torch.is_grad_enabled() or not (wanted or state or _transformed((*tensors, *parameters))):
            return self._plain(call, tensors, parameters)
        call.on_tape = recorder is not None
        found = through(call, [*tensors, *parameters, *state])
        self.failed = _failed(call, [*tensors, *parameters])
        self._history.note(call, guard, found, len(call.result_positions), _transformed(tensors))
        return call.outputs(found[: len(call.result_positions)])

    def _plain(self, call: BoxCall, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Any:
        """Without a gradient: nothing is checked, and nothing counted."""
        if _transformed((*tensors, *parameters)):
            found = through(call, [*tensors, *parameters])
        else:
            check_untraced(call)
            with torch.no_grad():
                found = call.plain([*tensors, *parameters])
        self.failed = _failed(call, [*tensors, *parameters])
        return call.outputs(found)

    @property
    def _guard(self) -> Guarded:
        (found,) = (part for part in self.stages.children() if isinstance(part, Guarded))
        return found

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BoxCall, list[Tensor], list[Tensor]]:
        leaves, structure = flatten((args, kwargs))
        positions = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not positions:
            raise _without_tensor(leaves)
        guard, settings = self._guard, self.settings
        assert settings is not None
        names = argument_names(guard.callable, args, kwargs)
        parameters = {
            name: p
            for name, p in self.stages.named_parameters()
            if p.requires_grad or not torch.is_grad_enabled() or followed(p)
        }
        call = BoxCall(
            guard,
            self.stages,
            self._promised(settings),
            structure,
            [None if k in positions else leaf for k, leaf in enumerate(leaves)],
            positions,
            [*(f"input {names[k]}" for k in positions), *(f"parameter {name}" for name in parameters)],
            tuple(parameters),
            known=self._known,
            watched=not guard.ignores_parameters,
        )
        return call, [leaves[k] for k in positions], list(parameters.values())

    def _promised(self, settings: Settings) -> Settings:
        """The settings with what is promised of the part by now."""
        if self.options["assume"] == "nothing":
            return settings
        guard = self._guard
        said = declared(guard) or ()
        if not said:
            return self._stepping(settings)
        local = any(isinstance(p, Local) or p in ("tokens", "elementwise") for p in said)
        return replace(
            self._stepping(settings),
            elementwise="elementwise" in said,
            affine=self.options["assume"] == "structure" and ("affine" in said or "reindexing" in said),
            reindexing="reindexing" in said,
            symmetric="symmetric" in said,
            links=(lambda value, output: declared_links(said, value, output)) if local else None,
        )

    def _stepping(self, settings: Settings) -> Settings:
        """A step that was declared of the module itself."""
        step = declared_step(self._guard)
        return replace(settings, steps=Steps(step)) if settings.steps.given is None and step is not None else settings

    # -- planned as a whole ---

    def _whole(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _tensors_alone(inputs, kwargs):
            raise InputError(
                "a box that is planned as a whole (a list of parts, noise=) takes tensors with the batch in dimension "
                "0, by position; bind all else to the callable: functools.partial(f, option=value)"
            )
        _check_inputs(inputs)
        self._know(inputs, {})
        if not torch.is_grad_enabled():
            return in_dtype_of(inputs, self.stages(*inputs))
        parameters = {name: p for name, p in self.stages.named_parameters() if p.requires_grad or followed(p)}
        tensors = (*inputs, *parameters.values())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            for part in self.stages.modules():
                if isinstance(part, Guarded):
                    part.check_held()
        if not any(map(requires_grad, tensors)) and not _transformed(tensors):
            with torch.no_grad():
                return in_dtype_of(inputs, self.stages(*inputs))
        this = PlannedCall(
            self.stages,
            self.options,
            self.measured,
            self.memory,
            tuple(requires_grad(t) for t in inputs),
            tuple(parameters),
            check_promises=self.check_promises,
            inferred=self.inferred,
        )
        self._history.refuse([part for part in self.stages.modules() if isinstance(part, Guarded)])
        outputs = through_planned(this, inputs, tuple(parameters.values()))
        self._history.note_whole(this, outputs)
        return pytree.tree_unflatten(list(outputs), this.structure)

    # -- around it ---

    def plan_for(self, *args: Any, **kwargs: Any) -> BoxPlan | ChainPlan:
        """How many queries a backward pass at inputs like these takes, and how long; all inputs require a gradient.

        Runs the part twice, which leaves no trace, and tests at the first input of a shape that samples are apart, and
        what ``promises="inferred"`` finds. Of a list of parts, or with ``noise=``, it is the plan of the whole; where
        the noise is to be measured it is not what follows from it until the first backward pass has done so.

        Raises:
            NondeterministicError: results differ, and how much is to be measured at the first backward pass.
        """
        if self.settings is None:
            _check_inputs(args)
            self._know(args, {})
            x = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in args)
            chain = traced_for(self.stages, x, strict=False)
            plan = planned(chain, self.options, self.measured)
            return ChainPlan(
                name=", ".join(part.name for part in self.stages.modules() if isinstance(part, Guarded)),
                plan=plan,
                elements=sum(t[0].numel() for t in x if t.is_floating_point()),
                parts=len(chain.traced.operations),
                seconds=seconds_of_plan(chain, plan, x),
                graph=chain.traced,
            )
        self._know(args, kwargs)
        with torch.no_grad():
            call, tensors, parameters = self._call(args, kwargs)
            wanted = [floating(t) for t in tensors] + [p.requires_grad for p in parameters]
            return plan_of_call(call, [*tensors, *parameters], wanted)

    def recalibrate(self) -> None:
        """Measure noise, steps, gains and curvature again at the next backward pass: activations change in
        training."""
        forget(self.stages)
        self._known.pop("steps", None)
        self._known.pop("warned", None)
        self._known.pop("warned of noise", None)

    def close(self) -> None:
        """End the workers that were made for this box; the next call makes others."""
        for part in self.stages.modules():
            if isinstance(part, Guarded) and part.pool is not None:
                part.pool.close()

    def detach_state(self) -> None:
        """Let gradients of later calls end at the state that the part is in now (truncated backpropagation in time)."""
        for part in self.stages.modules():
            if isinstance(part, Guarded):
                self._history.end_at(part)
        self._history = StateHistory()

    def _know(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """What the parts must know of a forward pass before they run."""
        tensors = [leaf for leaf in flatten((args, dict(kwargs)))[0] if isinstance(leaf, Tensor)]
        _check_dense(tensors)
        samples = next((t.shape[0] for t in tensors if t.dim()), 1)
        # A chain that is traced through the box has no forward pass of the box's own.
        expect(self.stages, None if counting.being_done() == counting.TRIAL_RUN else samples)
        if self._to_infer:
            self._infer(tensors, self._limits(args, kwargs))
            self._to_infer = False

    def _infer(self, tensors: Sequence[Tensor], limits: tuple[Any, Any]) -> None:
        """Declare of every part what seems to hold of it where it stands."""
        given: Any = tuple(tensors)
        parts = list(self.stages.children())
        with torch.no_grad(), counting.as_checks(), counting.doing("the test of what may be promised"):
            for k, part in enumerate(parts):
                if isinstance(part, Guarded) and (len(parts) == 1 or (len(given) == 1 and given[0].dim() > 1)):
                    found = _inferred(part, given, limits)
                    declare(part, *(declared(part) or ()), *found, step=declared_step(part))
                if k + 1 < len(parts):
                    result = part(*given)
                    given = result if isinstance(result, tuple) else (result,)

    def _limits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The bounds of its one input, (low, high), each a tensor that expands to a sample, or None."""
        leaves = flatten((tuple(args), dict(kwargs)))[0]
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if self.settings is None or self.settings.bounds.given is None or len(places) != 1:
            return None, None
        x, name = leaves[places[0]], argument_names(self._guard.callable, tuple(args), dict(kwargs))[places[0]]
        ((low, high),) = self.settings.bounds.of([name], [tuple(x.shape[1:])])
        return tuple(None if bound is None else torch.as_tensor(bound).to(x.detach()) for bound in (low, high))  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}, "_history": StateHistory(), "failed": None}


def _failed(call: BoxCall, given: Sequence[Tensor]) -> Tensor | None:
    """Which samples came out as NaN or infinity, as a tensor that outlives every transform; None under ``vmap``, where
    a call has other samples than whoever maps it."""
    if any(map(vmapped, given)):
        return None
    failed = call.failed if call.failed is not None else torch.zeros(call.layout.batch, dtype=torch.bool)
    return innermost(failed)


def _transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether a transform of torch.func, or forward mode, is under way."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(map(followed, tensors))


def _inferred(part: Guarded, inputs: Sequence[Tensor], limits: tuple[Any, Any]) -> list[Promise]:
    """What holds near the input and far from it: a part that saturates looks affine where it does not."""
    if len(inputs) != 1:
        raise InputError("promises are inferred of parts with one input; declare those of this one: promises=(…)")
    x = inputs[0].detach()
    if limits != (None, None):
        return _inferred_inside(part, x, *limits)
    found = [infer_structure(part, scale * x) for scale in (1, 10, 1000)]
    return [promise for promise in found[0] if all(promise in list(others) for others in found[1:])]


_REACH = 32.0  # standard deviations that the experiments of infer_structure may go


def _inferred_inside(part: Guarded, x: Tensor, low: Tensor | None, high: Tensor | None) -> list[Promise]:
    """What holds inside bounds: numbers are mapped into them, by one affine map for all, which leaves structure alone.

    In the whole room, and with moves ten times as long, of which those that would leave it end at a bound: nothing
    affine is left then, but elements are as far apart as they were. What is symmetric is not asked for: no later test
    of it stays inside.
    """
    lowest = float(x.min() if low is None else low.max())
    highest = float(x.max() if high is None else high.min())
    room = (highest - lowest) / 2
    if room <= 0:
        return []
    share = room / (float(x.abs().max()) + _REACH * float(x.std(correction=0)) or 1.0)
    found = [infer_structure(_Inside(part, low, high, (lowest + highest) / 2, share * times), x) for times in (1, 10)]
    apart = [promise for promise in found[1] if promise in ("elementwise", "tokens") or isinstance(promise, Local)]
    return [promise for promise in found[0] if promise in apart or promise in ("affine", "stationary")]


class _Inside(nn.Module):
    """A part behind the map ``middle + share · x``, which ends at the bounds."""

    def __init__(self, part: nn.Module, low: Tensor | None, high: Tensor | None, middle: float, share: float) -> None:
        super().__init__()
        self.part, self.low, self.high, self.middle, self.share = part, low, high, middle, share

    def forward(self, x: Tensor) -> Tensor:
        moved = self.middle + self.share * x
        moved = moved if self.low is None else torch.maximum(moved, self.low)
        result: Tensor = self.part(moved if self.high is None else torch.minimum(moved, self.high))
        return result


def _without_tensor(given: Sequence[Any]) -> InputError:
    kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in given)) or "nothing"
    return InputError(f"a black box needs a tensor to work on, got {kinds}; give torch.as_tensor(x)")


def _check_dense(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested:
            raise InputError(
                "a black box takes dense tensors, each of whose elements it can move, got a "
                f"{'nested' if tensor.is_nested else 'sparse'} one; give its values, or x.to_dense()"
            )


def _check_inputs(inputs: Sequence[Any]) -> None:
    if not inputs:
        raise _without_tensor(())
    batch_size(tuple(inputs), {})
