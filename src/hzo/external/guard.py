"""A callable of the user's, seen from outside: what goes in are copies, what comes out is checked and copied.

One operation of a chain, whatever it does inside: PyTorch, NumPy, a simulator in another process. An error says which
query met it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hzo.distributed import without_collectives
from hzo.errors import HzoError, InputError, NonFiniteError, QueryError, QueryTimeoutError, TraceError
from hzo.execution import RandomState, counting, devices_of, random_state, set_random_state
from hzo.external.scratch import counters_matter, scratch
from hzo.external.signature import flatten
from hzo.external.state import FoundState, PartState, Saved, StateKey, state_of, tensors_held
from hzo.pools import Pool
from hzo.tape.marks import Marks

_seeds = count(0x9E3779B9)  # one for every part: no two of them draw the same noise


@dataclass
class PartMemory:
    """How a part's state stands; apart from its options, by which a traced chain is recognized.

    Attributes:
        start, end: the states that the last forward pass began with and left.
        counters: whole numbers that a call changes matter to its result. inside: queries are being asked.
        scratch: for places that a call changed whether they are no state, since nothing depends on what they held.
        apart: samples are, since queries were asked for copies of a batch.
    """

    start: Saved | None = None
    end: Saved | None = None
    counters: bool = False
    inside: bool = False
    apart: bool = False
    scratch: dict[StateKey, bool] = field(default_factory=dict)


class Guarded(nn.Module):
    """``f`` as a module that a recorder takes for one operation.

    Args:
        name: in messages and in ``count.boxes``.
        numpy: ``f`` takes and returns NumPy arrays.
        batched: True where ``f`` takes any number of samples; a number where it takes exactly so many, to which its
            input is split and padded; False for as many as its caller says (``samples``).
        timeout: seconds that a call may take; None for any time.
        ignores: trainable tensors that ``f`` uses are no parameters of this module.
        noisy: random numbers of torch's that ``f`` draws are noise, new in every call, out of its own stream.
            Else they belong to the forward pass, and every query draws the same.
        state: what ``f`` remembers from call to call; ``"found"`` looks for it.
        floats: whole numbers and truth values that come out become floating, so that autograd carries a gradient.
        pool: runs the calls elsewhere, several at a time.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        name: str,
        *,
        numpy: bool,
        batched: bool | int,
        timeout: float | None,
        ignores: bool = False,
        noisy: bool = False,
        state: Any = "found",
        floats: bool = False,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        if ignores:
            self._held = (f,)  # in a tuple, where nn.Module does not find its parameters
        else:
            self.f = f
        self.hzo_marks = Marks(box=name, ignores_parameters=ignores, pooled=pool is not None)
        self.numpy = numpy
        self.batched = batched
        self.timeout = timeout
        self.noisy = noisy
        self.floats = floats
        self.pool = pool
        self._given_state = state
        self._stream: RandomState = {}
        self.samples: int | None = None  # of a forward pass
        # Shapes of a sample: those that come out for those that go in.
        self._shapes: dict[tuple[torch.Size, ...], list[torch.Size]] = {}
        self.remembers = PartMemory(counters=noisy)  # no repeat of a noisy part would show that they matter
        if isinstance(self.state, FoundState):  # one that cannot be read is found out at once
            _stateful.add(self)

    @property
    def name(self) -> str:
        """What messages and counts call it."""
        return self.hzo_marks.box or type(self).__name__

    @property
    def ignores_parameters(self) -> bool:
        """Whether the trainable tensors that it uses get no gradient."""
        return self.hzo_marks.ignores_parameters

    @property
    def callable(self) -> Callable[..., Any]:
        """What the user gave."""
        found: Callable[..., Any] = self._held[0] if self.ignores_parameters else self.f
        return found

    @property
    def runs_here(self) -> bool:
        """Whether calls run in this process, and draw from its random numbers."""
        return self.pool is None or not self.pool.elsewhere

    @cached_property
    def state(self) -> PartState:
        """What ``f`` remembers."""
        return state_of(self.callable, self._given_state, self.noisy)

    # -- as one operation of a chain: tensors with the batch first, in and out ---

    def extra_repr(self) -> str:
        return self.name

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        samples = inputs[0].shape[0]
        size = self._size(samples)
        fixed = self.batched is not True
        pieces = [
            [rows_of(t, k, size if fixed else min(size, samples - k)) for t in inputs] for k in range(0, samples, size)
        ]
        if self.moves_on or self.pool is not None:

            def ask() -> list[Tensor | tuple[Tensor, ...]]:
                return self._calls(pieces)

            moves_on = self.moves_on
            with self.remembered():
                results = ask()
            if moves_on:
                self.check_split(len(pieces), lambda: pytree.tree_leaves(ask()), pytree.tree_leaves(results))
        else:
            results = []
            for piece in pieces:
                with self.remembered():
                    results += self._calls([piece])
        if size == samples:
            return results[0]
        if isinstance(results[0], Tensor):
            return torch.cat(results)[:samples]  # type: ignore[arg-type]
        return tuple(torch.cat(parts)[:samples] for parts in zip(*results, strict=True))

    def _size(self, samples: int) -> int:
        """Of one call, where so many samples are asked for."""
        if self.batched is True:
            return samples if self.pool is None else self._share(samples, self.pool)
        size = self.samples if self.batched is False else self.batched
        if size is None:
            raise InputError(
                f"{self} takes only as many samples as a forward pass has, which an hzo chain cannot know; say how "
                "many: hzo.blackbox(f, batched=32)"
            )
        return int(size)

    def _share(self, samples: int, pool: Pool) -> int:
        """As many as a forward pass has, so that copies of it go to as many workers; less where some would have none.

        That copies are asked for says that samples are apart; before, a forward pass stays whole.
        """
        whole = self.samples
        if not whole or samples % whole:
            return samples
        self.remembers.apart = self.remembers.apart or samples > whole
        divides = pool.divides if self.remembers.apart else None
        return whole if divides is None else divided(whole, samples // whole, divides)

    def _calls(self, pieces: Sequence[Sequence[Tensor]]) -> list[Tensor | tuple[Tensor, ...]]:
        """What comes out for several pieces that do not wait for each other."""
        results = self.run_all([(tuple(piece), {}, piece[0].shape[0]) for piece in pieces])
        return [self._outputs(result, piece) for result, piece in zip(results, pieces, strict=True)]

    def _outputs(self, result: Any, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        samples = inputs[0].shape[0]
        several = isinstance(result, (tuple, list))
        outputs = self._checked(result if several else (result,), inputs, samples)
        if self.floats:
            outputs = [t if t.is_floating_point() or t.is_complex() else t.to(_floating(inputs)) for t in outputs]
        return tuple(outputs) if several else outputs[0]

    # -- one call ---

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int, *, watched: bool = False) -> Any:
        """What ``f`` returns for copies of these arguments.

        Args:
            samples: for messages. watched: run it with gradients on, so that trainable tensors inside can be told.
        """
        return self.run_all([(args, kwargs, samples)], watched=watched)[0]

    def run_all(
        self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any], int]], *, watched: bool = False
    ) -> list[Any]:
        """The results of several calls that do not wait for each other, in order."""
        given = [(self._copied(args), self._copied(kwargs)) for args, kwargs, _ in calls]
        if self.pool is not None:
            with self._named(calls[0][2]):
                found = self.pool.ask(
                    self.callable, given, self.timeout, answered=lambda k: counting.answered(calls[k][2])
                )
                return [_owned(result, False) for result in found]
        found = []
        for (args, kwargs), (*was, samples) in zip(given, calls, strict=True):
            own = self._own_random_numbers(pytree.tree_leaves(was)) if self.noisy else nullcontext()
            with self._named(samples), own:
                found.append(_owned(self._one(args, kwargs, watched), watched))
            counting.answered(samples)
        return found

    def check_held(self) -> None:
        """Under a transform: what goes in is given to it, and nothing else that the transform follows is used inside.

        Raises:
            TraceError: the callable holds a tensor, closes over it or names it, whose derivative would be lost.
        """
        for tensor in tensors_held(self.callable):
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                self._check_followed(tensor)

    def _check_followed(self, result: Any) -> None:
        mapped = torch._C._functorch.is_batchedtensor
        for leaf in flatten(result)[0]:
            if isinstance(leaf, Tensor) and followed(leaf) and not (self.ignores_parameters and not mapped(leaf)):
                raise TraceError(
                    f"{self} uses a tensor that a transform of torch.func, or forward mode, follows, and that it has "
                    "not been given: its derivative would be lost; give it as an argument, or make f a module that "
                    "holds it as a parameter (torch.func.functional_call)"
                )

    def run_twice(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int) -> tuple[Any, Any]:
        """Two results for one call, one after the other in one worker of its pool."""
        assert self.pool is not None
        with self._named(samples):
            call = (self._copied(args), self._copied(kwargs))
            first, second = self.pool.ask_twice(self.callable, call, self.timeout)
            return _owned(first, False), _owned(second, False)

    @contextmanager
    def _named(self, samples: int) -> Iterator[None]:
        """An error in here says which part met it, in which query."""
        try:
            yield
        except QueryTimeoutError as error:
            raise QueryTimeoutError(
                f"{self}, in {counting.being_done()} ({_counted(samples)} in the call): {error}"
            ) from error
        except HzoError as error:
            error.args = (f"{self}, in {counting.being_done()}: {error}",)
            raise
        except (Exception, SystemExit) as error:
            # SystemExit would end the training, with sys.exit(0) even without a word. As a cause, a StopIteration
            # would be raised in place of this error by contextlib.
            cause = None if isinstance(error, StopIteration) else error
            raise QueryError(
                f"{self} failed in {counting.being_done()} ({_counted(samples)}): {type(error).__name__}: {error}"
            ) from cause

    def _one(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], watched: bool) -> Any:
        def alone(*args: Any, **kwargs: Any) -> Any:
            with without_collectives("a black box"):
                return self.callable(*args, **kwargs)

        if self.timeout is not None:
            return call_within(self.timeout, alone, args, kwargs, watched)
        if forward_ad._current_level < 0 or not self.moves_on:
            with torch.enable_grad() if watched else torch.no_grad():
                return alone(*args, **kwargs)
        # Autograd runs a Function's forward pass with forward mode off, which would hide what follows a tensor inside.
        with torch.enable_grad() if watched else torch.no_grad(), forward_ad._set_fwd_grad_enabled(True):
            result = alone(*args, **kwargs)
            self._check_followed(result)  # copies went in, which nothing follows
            return result

    def _copied(self, arguments: Any) -> Any:
        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            made = leaf.detach().clone().resolve_conj().resolve_neg()
            if not self.numpy:
                return made
            return (made.float() if made.dtype == torch.bfloat16 else made).cpu().numpy()

        leaves, structure = flatten(arguments)
        return structure.build([copied(leaf) for leaf in leaves])

    @contextmanager
    def _own_random_numbers(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Inside, torch's generators go on where this part left them; outside, they have not moved."""
        outside = random_state(devices_of(inputs))
        if not self._stream:
            seed = next(_seeds)
            self._stream = {device: torch.Generator(device).manual_seed(seed).get_state() for device in outside}
        set_random_state(self._stream)
        try:
            yield
        finally:
            self._stream = random_state(devices_of(inputs))
            set_random_state(outside)

    # -- state ---

    @property
    def moves_on(self) -> bool:
        """Whether a call now is the one that moves the state on: a forward pass, and none of the measurements."""
        return counting.being_done() == counting.FORWARD_PASS and not self.remembers.inside

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """What runs inside moves the state on if it is a forward pass, and else leaves it as it was."""
        if self.moves_on:
            start = self.remembers.start = self.state.save()
            try:
                yield
            except BaseException:  # the next step begins where this one did
                self.state.load(start, self.remembers.counters)
                raise
            self.remembers.end = self.state.save()
            return
        if self.remembers.inside:
            assert self.remembers.start is not None
            self.state.load(self.remembers.start, self.remembers.counters)
            yield
            return
        now = self.state.save()
        try:
            yield
        finally:
            self.state.load(now, self.remembers.counters)

    def changed(self, before: Saved, after: Saved) -> tuple[list[StateKey], list[StateKey]]:
        """What a call has changed: state for certain, and what may be a mere counter; scratch is neither."""
        certain, counters = self.state.changed(before, after)
        written = {key for key in certain if self.remembers.scratch.get(key)}
        if written:  # what another part may read is no scratch
            others = [part.state.reach() for part in list(_stateful) if part is not self]  # type: ignore[union-attr]
            written = {key for key in written if not any(_place_of(key) in reach for reach in others)}
        return [key for key in certain if key not in written], counters

    def check_split(self, calls: int, again: Callable[[], Sequence[Tensor]], outputs: Sequence[Tensor]) -> None:
        """Behind a forward pass of so many calls: tell state from scratch, and let no state be moved on twice.

        Args:
            again: runs the forward pass once more. outputs: what it returned.

        Raises:
            InputError: several calls have moved it on.
        """
        memory = self.remembers
        assert memory.start is not None
        assert memory.end is not None
        certain, counters = self.changed(memory.start, memory.end)
        new = [key for key in certain if key not in memory.scratch]
        unknown = [] if memory.counters else [key for key in counters if key not in memory.scratch]
        if (new or unknown) and isinstance(self.state, FoundState) and not self.noisy and self.pool is None:
            kept = memory.start, memory.end
            memory.inside = True  # these calls move nothing on
            try:
                with counting.doing("the test whether it reads what it keeps"):
                    if new:
                        memory.scratch |= scratch(self.state, new, memory.end, outputs, again)
                    if unknown:
                        memory.scratch |= dict.fromkeys(unknown, True)
                        left = memory.end if any(not memory.scratch.get(key) for key in certain) else None
                        memory.counters = counters_matter(self.state, unknown, memory.start, left, outputs, again)
            finally:
                memory.inside = False
                memory.start, memory.end = kept
                self.state.load(memory.end)
        if calls > 1 and self.changed(memory.start, memory.end)[0]:
            self.state.load(memory.start)
            raise InputError(
                f"{self} keeps a state, and its batch was split into {calls} calls (batched={self.batched}), each "
                "of which would move the state on; give it as many samples as it takes at once"
            )

    @contextmanager
    def queries_from(self, start: Saved | None) -> Iterator[None]:
        """Inside, every call begins with this state; afterwards the state is as it was before."""
        now, memory = self.state.save(), self.remembers
        kept = memory.start, memory.inside
        memory.start, memory.inside = start or now, True
        try:
            yield
        finally:
            memory.start, memory.inside = kept
            self.state.load(now, self.remembers.counters)

    # -- what comes out ---

    def tensor(self, result: Any, device: torch.device) -> Tensor:
        """A result as a tensor."""
        try:
            # Python's numbers are double, whatever torch would make of them.
            wide = {float: torch.float64, complex: torch.complex128}.get(type(result))
            if (
                getattr(getattr(result, "dtype", None), "isnative", True) is False
            ):  # an array of another machine's order
                result = result.astype(result.dtype.newbyteorder("="))
            return torch.as_tensor(result, dtype=wide).detach().to(device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self}, in {counting.being_done()}, returned {_kind(result)}; expected tensors or "
                "arrays of a dtype that torch knows"
            ) from error

    def _checked(self, results: Sequence[Any], inputs: Sequence[Tensor], samples: int) -> list[Tensor]:
        where = f"{self}, in {counting.being_done()},"
        outputs = [self.tensor(result, inputs[0].device) for result in results]
        for output in outputs:
            if output.dim() == 0 or output.shape[0] != samples:
                raise InputError(
                    f"{where} returned shape {tuple(output.shape)} for {samples} samples; expected the batch in "
                    "dimension 0"
                )
            if output.is_floating_point() and not bool(output.isfinite().all()):
                raise NonFiniteError(f"{where} returned NaN or infinity; check it at this input")
        shapes = [output.shape[1:] for output in outputs]
        of_inputs = tuple(t.shape[1:] for t in inputs)
        if counting.being_done() == counting.FORWARD_PASS:
            self._shapes[of_inputs] = shapes
        known = self._shapes.setdefault(of_inputs, shapes)
        if known != shapes:
            raise InputError(
                f"{where} returned samples of shape {[tuple(s) for s in shapes]}, and {[tuple(s) for s in known]} "
                "before, for inputs of one shape; make its output's shape depend on its input's alone"
            )
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "state"}  # which holds on to f
        return {**kept, "_shapes": {}, "_stream": {}, "remembers": PartMemory(counters=self.noisy)}

    def __str__(self) -> str:
        return f"the black box {self.name}"


_stateful: WeakSet[Guarded] = WeakSet()
"""Parts whose state is looked for; some may share variables."""


def _place_of(key: StateKey) -> Any:
    return key[0] if isinstance(key[0], tuple) else key[:2]


def followed(tensor: Tensor) -> bool:
    """Whether a transform of torch.func, or forward mode, follows what becomes of a tensor."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def innermost(tensor: Tensor) -> Tensor:
    """The ordinary tensor inside of what transforms of torch.func have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def vmapped(tensor: Tensor) -> bool:
    """Whether ``vmap`` gives other values to a tensor in each of its slices."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def _kind(result: Any) -> str:
    dtype = getattr(result, "dtype", None)
    return f"a {type(result).__name__}" + ("" if dtype is None else f" of dtype {dtype}")


def _owned(result: Any, watched: bool) -> Any:
    """Copies of arrays and tensors: a simulator may use its memory again for the next result."""
    leaves, structure = flatten(result)
    owned = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            with torch.enable_grad() if watched else nullcontext():
                owned.append(leaf.clone() if watched else leaf.detach().clone())
        else:
            owned.append(leaf.copy() if type(leaf).__module__ == "numpy" and hasattr(leaf, "copy") else leaf)
    return structure.build(owned)


def _counted(samples: int) -> str:
    return f"{samples} sample{'' if samples == 1 else 's'}"


def _floating(inputs: Sequence[Tensor]) -> torch.dtype:
    return next((t.dtype for t in inputs if t.is_floating_point()), torch.get_default_dtype())


def expect(stages: nn.Module, samples: int | None) -> None:
    """Tell the parts how many samples a forward pass has; None where there is none of their own."""
    for part in stages.modules():
        if isinstance(part, Guarded):
            part.samples = samples


def divided(rows: int, calls: int, workers: int) -> int:
    """Samples of one call, where so many calls of ``rows`` samples each are divided until every worker has one."""
    return -(-rows // max(1, min(rows, workers // calls)))


def rows_of(tensor: Tensor, start: int, size: int) -> Tensor:
    """``size`` rows from ``start`` on; the last one again where there are fewer."""
    rows = tensor[start : start + size]
    missing = size - rows.shape[0]
    return rows if not missing else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def call_within(
    seconds: float,
    f: Callable[..., Any],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
    watched: bool = False,
) -> Any:
    """Call ``f`` in a thread of its own and wait for it so long.

    A thread cannot be stopped: what hangs there hangs on, beside a program that goes on. What must be stopped belongs
    into a process of its own (``hzo.simulator``).

    Raises:
        QueryTimeoutError: it has not returned by then. What it raises itself passes through.
    """
    answer: list[Any] = []
    error: list[BaseException] = []
    context = copy_context()
    # What torch keeps for each thread: autocast, and a recording that may be under way.
    cast = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]

    def work() -> None:
        try:
            # A thread starts with gradients on.
            with ExitStack() as stack, torch.enable_grad() if watched else torch.no_grad():
                for device, dtype in cast:
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                for mode in modes:
                    stack.enter_context(mode)
                answer.append(context.run(f, *arguments, **(keywords or {})))
        except BaseException as raised:  # handed to the thread that waits
            error.append(raised)

    thread = threading.Thread(target=work, name="hzo-query", daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if error:
        raise error[0]
    if not answer:
        raise QueryTimeoutError(
            f"no answer within {seconds:g} seconds; allow more for a call (timeout=), put fewer samples into one "
            "(batched=), or put it into a process of its own that can be stopped (hzo.simulator)"
        )
    return answer[0]
