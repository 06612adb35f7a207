"""The history of a part's state: which calls left it, so that gradients flow back through time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor

from hzo.errors import InputError
from hzo.external.call import BoxCall
from hzo.external.guard import Guarded
from hzo.external.state import FoundState, Saved, StateKey
from hzo.tape.history import grad_fn, requires_grad


class StateHistory:
    """What the last call of a box left, as autograd knows it.

    It ends where a backward pass has been through it (its graph is gone), where the state was reset by others, and
    where the user says so.
    """

    def __init__(self) -> None:
        self.tensors: dict[StateKey, Tensor] = {}
        self.call: Any = None
        self.ends: list[tuple[Guarded, Saved, tuple[StateKey, ...]]] = []
        self.stuck = False
        self.grad_fn: Any = None

    def note(self, call: BoxCall, guard: Guarded, found: Sequence[Tensor], results: int, transformed: bool) -> None:
        """A call has run; ``found`` are its outputs, numbers of its state behind the first ``results``."""
        kept = StateHistory()
        if call.moved_on and guard.remembers.end is not None:
            if transformed and any(requires_grad(t) for t in found):
                kept.stuck = True
            kept.call = call
            kept.tensors = {
                key: t
                for key, t in zip(call.left, found[results:], strict=True)
                if requires_grad(t) and not transformed
            }
            kept.ends = [(guard, guard.remembers.end, call.moved_on)]
            kept.stuck = kept.stuck or (call.stuck and any(requires_grad(t) for t in found))
        self.__dict__ = kept.__dict__
        if self.call is not None:
            _histories.add(self)
            self.grad_fn = next((node for t in found if (node := grad_fn(t)) is not None), None)

    def _alive(self) -> bool:
        """Whether a gradient may still flow back into the last call."""
        if self.call is None or not getattr(self.call, "consumed", False):
            return self.call is not None
        if getattr(self.call, "on_tape", False) or self.grad_fn is None:
            return False
        try:
            _ = self.grad_fn.saved_tensors
        except RuntimeError:
            return False
        return True

    def reaching(self, guard: Guarded) -> tuple[tuple[StateKey, ...], list[Tensor]]:
        """The places of the state that still hold what the last call left, and what autograd knows them as.

        Raises:
            InputError: a gradient would have to flow through what is no number.
        """
        found: dict[StateKey, Tensor] = {}
        now = None
        for history in (self, *self._of_others(guard)):
            if not history.ends or not history._alive():
                continue
            now = now or guard.state.save()
            (_, end, moved) = history.ends[0]
            if history.stuck and all(guard.state.same(now, end, key) for key in moved if len(key) <= 3):
                raise self._error(guard, moved)
            found |= {key: t for key, t in history.tensors.items() if guard.state.same(now, end, key)}
        return tuple(found), list(found.values())

    def _of_others(self, guard: Guarded) -> Iterator[StateHistory]:
        """Those of other boxes whose parts may share attributes with this one: methods of one object."""
        if isinstance(guard.state, FoundState):
            for other in list(_histories):
                if other is not self and other.ends and isinstance(other.ends[0][0].state, FoundState):
                    yield other

    def end_at(self, guard: Guarded) -> None:
        """Let gradients end at the state that a part is in now, also where another box has left it."""
        now = None
        for other in self._of_others(guard):
            now = now or guard.state.save()
            end = other.ends[0][1]
            other.tensors = {key: t for key, t in other.tensors.items() if not guard.state.same(now, end, key)}

    def note_whole(self, this: Any, outputs: Sequence[Tensor]) -> None:
        """A box that is planned as a whole has run."""
        ends = []
        for part, start in this.states.items():
            if part.remembers.end is not None and (moved := part.changed(start, part.remembers.end)[0]):
                ends.append((part, part.remembers.end, tuple(moved)))
        if ends:  # else nothing holds on to the graph
            self.ends, self.call = ends, this
            self.grad_fn = next((node for t in outputs if (node := grad_fn(t)) is not None), None)

    def refuse(self, parts: Sequence[Guarded]) -> None:
        """Through a box that is planned as a whole no gradient follows a state from call to call.

        Raises:
            InputError: a part is still in the state that a call of the same graph has left it in.
        """
        if not self._alive():
            return
        for part, end, moved in self.ends:
            if part in parts:
                now = part.state.save()
                if all(part.state.same(now, end, key) for key in moved if len(key) <= 3):
                    raise self._error(part, moved)

    @staticmethod
    def _error(part: Guarded, moved: Sequence[StateKey]) -> InputError:
        return InputError(
            f"{part} keeps a state ({part.state.names(moved)}) that its last call has moved on, and the gradient "
            "cannot follow it from call to call here. Give the state to it and have it returned, f(x, state) -> (y, "
            "state); or let the gradient end there: box.detach_state() between the calls. A state is no noise"
        )


_histories: WeakSet[StateHistory] = WeakSet()
"""Of all boxes whose parts have moved a state on."""
