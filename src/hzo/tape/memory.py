"""Who shares memory with whom while a step is recorded, and what a write to one of them means for the others.

Tensors that share a storage fall into families: a tensor and those that autograd knows to be views of it. A write that
autograd sees changes, of every member of the family, both what it holds and how a gradient leads there. From the first
such write on, the content of the storage is a value of the tape, and a member that is read later is a window of it. Of
tensors of other families in the same storage (detached ones, ``.data``), and of all where autograd does not see the
write, what they hold changes and the path does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.tape.aliases import disjoint, geometry_of, overlaps_itself, pass_through, read_window, write_window
from hzo.tape.history import requires_grad
from hzo.tape.operations import Operation, Value, ref
from hzo.tape.tape import Tape

WRITTEN_TWICE = "a write to a view that shows memory several times; call clone() on the view before it is written to"

aten = torch.ops.aten
_FIX_WEAKREF = getattr(Tensor, "_fix_weakref", None)


class Seen(weakref.ref[Tensor]):
    """A tensor that the recording knows by its id, without keeping it alive."""

    __slots__ = ("forget", "key")

    def __new__(cls, tensor: Tensor, forget: weakref.WeakMethod[Any]) -> Seen:  # noqa: ARG004
        return super().__new__(cls, tensor, _gone)

    def __init__(self, tensor: Tensor, forget: weakref.WeakMethod[Any]) -> None:
        super().__init__(tensor, _gone)  # type: ignore[call-arg]
        self.key = id(tensor)
        self.forget = forget

    def __call__(self) -> Tensor | None:
        """The tensor, if it lives. Where only C++ held it, Python must hear that it is held again."""
        tensor = super().__call__()
        if tensor is not None and _FIX_WEAKREF is not None:
            _FIX_WEAKREF(tensor)
        return tensor


def _gone(seen: weakref.ref[Tensor]) -> None:
    assert isinstance(seen, Seen)
    forget = seen.forget()
    if forget is not None:
        forget(seen.key)


class Writer(Protocol):
    """What writes the tape: the recorder, as far as it concerns the memory of tensors."""

    tape: Tape
    keeps_all: bool
    hooks_off: bool
    alive: dict[int, Tensor]
    unnoted: list[int]

    def forget(self, key: int) -> None:
        """The tensor with this id was freed."""

    def read(self, tensor: Tensor) -> int:
        """The value that a tensor holds now."""

    def new_value(self, tensor: Tensor, requires: bool, producer: int, weight: bool) -> int:
        """A value for what a tensor holds now."""

    def foreign(self, tensor: Tensor, what: str = "") -> int:
        """A value of which nothing is known but that a gradient would lead into it."""

    def operation(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
        """Append an operation."""


class Memory:
    """Families of tensors, and the contents of storages that were written to.

    Attributes:
        stale: ids of tensors that must be read from the content of their storage.
        passed: ids of tensors whose content changed without autograd's knowledge.
    """

    def __init__(self, recorder: Writer) -> None:
        self._recorder = weakref.ref(recorder)
        self.tape = recorder.tape
        self.stale: set[int] = set()
        self.passed: set[int] = set()
        self._objects: dict[int, Seen] = {}
        self._where: dict[int, int] = {}  # id -> storage
        self._storages: dict[int, dict[int, None]] = {}  # storage -> ids of tensors in it, in order
        self._held: dict[int, list[int]] = {}  # storage -> values whose content lies in it
        self._values = 0  # how many of the tape's values were looked at
        self._contents: dict[int, int] = {}  # root of a family -> value of its storage's content
        self._forget = weakref.WeakMethod(recorder.forget)

    # -- who is there -------------------------------------------------------------------------------------------------

    def track(self, tensor: Tensor) -> int:
        """Note a tensor by its id for as long as it lives; the storage that it lies in."""
        key = id(tensor)
        storage = self._where.get(key)
        if storage is None:
            storage = self._where[key] = storage_of(tensor)
            self._objects[key] = Seen(tensor, self._forget)
            self._storages.setdefault(storage, {})[key] = None
        return storage

    def forget(self, key: int) -> None:
        """A tensor was freed: its id may come again, for another."""
        self._objects.pop(key, None)
        self._contents.pop(key, None)
        storage = self._where.pop(key, None)
        if storage is not None:
            self._storages[storage].pop(key, None)
        self.stale.discard(key)
        self.passed.discard(key)

    def release(self) -> None:
        """The recording is over."""
        self._objects, self._where, self._storages, self._held, self._contents = {}, {}, {}, {}, {}

    def tensor(self, key: int) -> Tensor | None:
        """The tensor with this id, if it lives."""
        seen = self._objects.get(key)
        return None if seen is None else seen()

    def register(self) -> None:
        """Note where all tensors lie; done when a write makes it matter."""
        recorder = self._recorder_now()
        unnoted, recorder.unnoted = recorder.unnoted, []
        for key in unnoted:
            tensor = recorder.alive.get(key)
            if tensor is not None:
                self.track(tensor)
        for value in range(self._values, len(self.tape.tensors)):
            held = self.tape.tensors[value]
            if held is not None:
                self._held.setdefault(self.track(held), []).append(value)
        self._values = len(self.tape.tensors)

    def sharing(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Ids and tensors that lie in the same storage, this one included."""
        storage = storage_of(tensor)
        for key in [*self._storages.get(storage, ())]:
            other = self.tensor(key)
            if other is not None and storage_of(other) == storage:  # it may have been given another one
                yield key, other

    def root_of(self, tensor: Tensor) -> Tensor:
        """The tensor that all of the family are views of."""
        base = tensor._base
        return tensor if base is None else base

    # -- writes -------------------------------------------------------------------------------------------------------

    def before_write(self, tensor: Tensor, saved: Container[int]) -> None:
        """Values keep what they held, where that was saved or everything is kept."""
        recorder = self._recorder_now()
        keeps_all = recorder.keeps_all or recorder.hooks_off
        storage, window = storage_of(tensor), geometry_of(tensor)
        for value in self._held.pop(storage, ()):
            held = self.tape.tensors[value]
            if held is None or storage_of(held) != storage:
                continue
            if held is not tensor and held.dtype == tensor.dtype and disjoint(window, geometry_of(held)):
                self._held.setdefault(storage, []).append(value)
            else:
                self.tape.tensors[value] = held.clone() if keeps_all or value in saved else None

    def before_relayout(self, tensor: Tensor) -> None:
        """The tensor is about to have another shape in the same memory: its value keeps a view of the old one."""
        for value in self._held.get(storage_of(tensor), ()):
            if self.tape.tensors[value] is tensor:
                self.tape.tensors[value] = tensor.detach()

    def content_before(self, tensor: Tensor) -> bool:
        """Before a write that autograd sees: make a value of the content, where others look into it.

        Returns whether there is one.
        """
        root = self.root_of(tensor)
        if id(root) in self._contents:
            return True
        others = (key for key, other in self.sharing(tensor) if key != id(tensor) and self.root_of(other) is root)
        if root is tensor and not any(key in self.tape._index for key in others):
            return False
        self._make_content(root)
        return True

    def before_declared_write(self, tensor: Tensor) -> bool:
        """As ``content_before``, for a write that ran unseen and that autograd was told of behind it."""
        self.register()
        root = self.root_of(tensor)
        for key, other in self.sharing(tensor):
            if self.root_of(other) is root:
                self.passed.discard(key)
        return self.content_before(tensor)

    def after_write(self, tensor: Tensor, put: bool) -> None:
        """After a write that autograd saw: the family reads anew, others keep their path."""
        root, window = self.root_of(tensor), geometry_of(tensor)
        for key, other in self.sharing(tensor):
            if other is tensor:
                continue
            if self.root_of(other) is root:
                if key in self.tape._index:
                    self.stale.add(key)
            elif other.dtype != tensor.dtype or not disjoint(window, geometry_of(other)):
                self.content_changed(key, other)
        self.stale.discard(id(tensor))
        self.passed.discard(id(tensor))
        if put:
            self._put(root, tensor)
        self._refresh(tensor, root)

    def after_hidden_write(self, tensor: Tensor) -> None:
        """After a write that autograd does not see: constants are read anew, what carries a gradient keeps its path."""
        window = geometry_of(tensor)
        for key, other in self.sharing(tensor):
            if other is tensor or other.dtype != tensor.dtype or not disjoint(window, geometry_of(other)):
                self.content_changed(key, other)
        self._refresh(tensor, None)

    def content_changed(self, key: int, tensor: Tensor) -> None:
        """What a tensor holds was changed unseen: a constant is read anew, what carries a gradient keeps its path."""
        index = self.tape._index.get(key)
        if index is None or key in self.stale:
            return
        if self.tape.values[index].requires and requires_grad(tensor):
            self.passed.add(key)
        else:
            del self.tape._index[key]

    def _refresh(self, tensor: Tensor, but: Tensor | None) -> None:
        """Contents of other families have the same numbers now, along the old paths; needed where content is kept."""
        if not self._recorder_now().keeps_all or not self._contents:
            return
        storage = storage_of(tensor)
        for root_key, content in [*self._contents.items()]:
            root = self.tensor(root_key)
            if root is None or root is but or storage_of(root) != storage:
                continue
            now = self._recorder_now().new_value(self._flat(root), False, -1, True)
            self._contents[root_key] = self._step(pass_through, (content, now), (), self.tape.values[content])

    # -- contents -----------------------------------------------------------------------------------------------------

    def has_content(self, tensor: Tensor) -> bool:
        """Whether the family has had a write that autograd saw."""
        return bool(self._contents) and id(self.root_of(tensor)) in self._contents

    def reconstruct(self, tensor: Tensor) -> bool:
        """Make a content for a tensor that was never seen, if relatives carry a gradient; returns whether they do."""
        self.register()
        root = self.root_of(tensor)
        values, index = self.tape.values, self.tape._index
        if any(
            key in index and values[index[key]].requires and self.root_of(other) is root
            for key, other in self.sharing(root)
        ):
            self._make_content(root)
            return True
        return False

    def _flat(self, root: Tensor) -> Tensor:
        size = root.untyped_storage().nbytes() // root.element_size()
        return root.detach().as_strided((size,), (1,), 0).clone()

    def _constant(self, content: Tensor | None, like: Tensor, size: int) -> int:
        """A value that carries no gradient; without content where nothing is kept."""
        if content is not None:
            return self._recorder_now().new_value(content, False, -1, True)
        value = len(self.tape.values)
        self.tape.values.append(Value(torch.Size((size,)), like.dtype, like.device, False, -1, True))
        self.tape.tensors.append(None)
        return value

    def _make_content(self, root: Tensor) -> None:
        """A value for the content of a storage: the windows that carry a gradient, put into a constant."""
        recorder = self._recorder_now()
        size = root.untyped_storage().nbytes() // root.element_size()
        self._contents[id(root)] = self._constant(self._flat(root) if recorder.keeps_all else None, root, size)
        self.track(root)
        seen: Tensor | None = None
        for window in self._windows(root):
            size_, stride, offset = geometry_of(window)
            if window.dtype == root.dtype:
                if seen is None:
                    seen = torch.zeros(size, dtype=torch.bool)
                shown = seen.as_strided(size_, stride, offset)
                if bool(shown.all()):
                    continue
                shown.fill_(True)
            if overlaps_itself(size_, stride):
                recorder.foreign(window, WRITTEN_TWICE)
            else:
                recorder.read(window)
            self._put(root, window)
            if window is root and window.is_contiguous() and window.numel() == size:
                break

    def _windows(self, root: Tensor) -> list[Tensor]:
        """Members of a family that carry a gradient and are up to date, the root and then the largest first."""
        values, index = self.tape.values, self.tape._index
        found = [
            other
            for key, other in self.sharing(root)
            if key in index and key not in self.stale and values[index[key]].requires and self.root_of(other) is root
        ]
        return sorted(found, key=lambda t: (t is not root, -t.numel()))

    def _put(self, root: Tensor, window: Tensor) -> None:
        """The content of the family's storage has this window replaced by what it holds now."""
        content = self._contents[id(root)]
        size, stride, offset = geometry_of(window)
        value = self.tape._index[id(window)]
        about = self.tape.values[content]
        if window.is_conj():
            value = self._step(aten._conj_physical.default, (value,), (), self.tape.values[value])
        if window.is_neg():
            value = self._step(aten.neg.default, (value,), (), self.tape.values[value])
        content = self._as(content, window.dtype)
        content = self._step(write_window, (content, value), (size, stride, offset), self.tape.values[content])
        self._contents[id(root)] = self._as(content, about.dtype)

    def read_window(self, tensor: Tensor) -> int:
        """The value of a tensor as a window of its storage's content."""
        recorder = self._recorder_now()
        content = self._as(self._contents[id(self.root_of(tensor))], tensor.dtype)
        size, stride, offset = geometry_of(tensor)
        weight = self.tape.values[content].weight
        lazy = [aten._conj_physical.default] * tensor.is_conj() + [aten.neg.default] * tensor.is_neg()
        if not lazy:
            op = recorder.operation(read_window, (ref(content), size, stride, offset), {})
        else:
            about = self.tape.values[content]
            value = self._step(read_window, (content,), (size, stride, offset), about, tensor.shape)
            if len(lazy) == 2:
                value = self._step(lazy.pop(0), (value,), (), about, tensor.shape)
            op = recorder.operation(lazy[0], (ref(value),), {})
        new = recorder.new_value(tensor, requires_grad(tensor), op.index, weight)
        op.writes = (new,)
        self.stale.discard(id(tensor))
        self.passed.discard(id(tensor))
        return new

    def _as(self, content: int, dtype: torch.dtype) -> int:
        """The content of a storage as numbers of another type: complex ones as pairs of real ones, or back."""
        about = self.tape.values[content]
        n = about.shape[0]
        if dtype == about.dtype:
            return content
        if about.dtype.is_complex and dtype == about.dtype.to_real():
            pairs = self._step(aten.view_as_real.default, (content,), (), about, torch.Size((n, 2)), dtype)
            return self._step(aten.view.default, (pairs,), ((2 * n,),), about, torch.Size((2 * n,)), dtype)
        if dtype.is_complex and about.dtype == dtype.to_real():
            pairs = self._step(aten.view.default, (content,), ((n // 2, 2),), about, torch.Size((n // 2, 2)))
            return self._step(aten.view_as_complex.default, (pairs,), (), about, torch.Size((n // 2,)), dtype)
        raise TapeError(
            f"expected views of {about.dtype} to be of its own type, or of complex numbers as pairs, got {dtype}; call "
            "clone() before the view is written to"
        )

    def _step(
        self,
        target: Callable[..., Any],
        reads: tuple[int, ...],
        arguments: tuple[Any, ...],
        like: Value,
        shape: torch.Size | None = None,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Append an operation of the tape's own; its value holds something only where all content is kept."""
        recorder = self._recorder_now()
        op = recorder.operation(target, (*(ref(v) for v in reads), *arguments), {})
        values, tensors = self.tape.values, self.tape.tensors
        new = len(values)
        requires = any(values[v].requires for v in reads)
        weight = all(values[v].weight for v in reads)
        values.append(Value(shape or like.shape, dtype or like.dtype, like.device, requires, op.index, weight))
        given = [tensors[v] for v in reads]
        if recorder.keeps_all and all(t is not None for t in given):
            tensors.append(target(*(t.detach() for t in given if t is not None), *arguments))
        else:
            tensors.append(None)
        op.writes = (new,)
        return new

    def _recorder_now(self) -> Writer:
        recorder = self._recorder()
        assert recorder is not None
        return recorder


_uses: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_LONE = torch.empty(1)
_ONE_USE = -1 if _uses is None else _uses(_LONE.untyped_storage()._cdata)  # the tensor, and its storage for Python


def alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares this one's memory: no view, no detached copy, nobody whom autograd keeps."""
    if _uses is None:
        return False
    try:
        return _uses(tensor.untyped_storage()._cdata) == _ONE_USE
    except (NotImplementedError, RuntimeError):
        return False


def storage_of(tensor: Tensor) -> int:
    """Which storage a tensor lies in; a number of its own for one without (sparse tensors, wrappers)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)
