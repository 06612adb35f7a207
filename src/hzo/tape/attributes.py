"""What modules hold beside their tensors' content: attributes, containers of them, flags; noted, and put back."""

from __future__ import annotations

import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from hzo.tape.marks import marks_of
from hzo.tape.state import restorer

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_DICTS = frozenset({dict, OrderedDict, defaultdict, Counter})
_LISTS = frozenset({list, deque})
_OWN = "_hzo"  # begins the names of attributes that hzo keeps on modules
_MOST_HELD = 64  # items of a container that are looked through: those of a data set held by a module are not
_MOST_BYTES = 1 << 20  # of an array that is copied
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_NOTHING: dict[Any, Any] = {}
_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if type(value) in _DICTS)
_OF_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}


class _Memory(NamedTuple):
    """Where a parameter's numbers are. Asking for its ``.data`` would be a call that a recording sees."""

    storage: torch.UntypedStorage
    offset: int | torch.SymInt
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> _Memory:
        return cls(parameter.untyped_storage(), parameter.storage_offset(), parameter.shape, parameter.stride())

    def put_back(self, parameter: Tensor) -> None:
        """Give the parameter its memory back, where the model gave it other numbers by ``.data =``."""
        now = _Memory.of(parameter)
        if now.storage.data_ptr() != self.storage.data_ptr() or now[1:] != self[1:]:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.storage.device).set_(*self)


class Attributes:
    """Notes, when it is made, what modules and plain objects hold; ``restore`` puts that back.

    Noted are the attributes by identity, which are there and which not; lists, dicts, sets and arrays among them with
    what they hold, also one within the other; generators of random numbers; ``requires_grad``, the memory and ``.grad``
    of parameters. Objects of classes of the user's are noted where a module holds them; what these hold in other
    objects, iterators, and what only closures know, is not. The content of tensors is not copied.

    Args:
        gradients: whether ``.grad`` is noted, too.

    Cost: some microseconds a module. Source: ours.
    """

    def __init__(self, gradients: bool = True) -> None:
        self._gradients = gradients
        self._known: dict[int, Any] = {}  # by id, kept alive
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # of modules: their tensors, layers, hooks
        self._others: list[Callable[[], object]] = []
        self._parameters: list[tuple[nn.Parameter, _Memory | None, Tensor | None, bool]] = []

    def knows(self, thing: Any) -> bool:
        """Whether it was noted."""
        return id(thing) in self._known

    def note(self, things: Iterable[Any]) -> None:
        """Note modules, or objects of other classes with attributes, as they are now; those known already stay."""
        for thing in things:
            thing = getattr(thing, "__self__", thing)  # of a method  # noqa: PLW2901
            if id(thing) in self._known or not hasattr(thing, "__dict__"):
                continue
            if isinstance(thing, nn.Module):
                self._module(thing)
            else:
                self._object(thing)

    def _module(self, module: nn.Module) -> None:
        # TorchScript's own hold their tensors elsewhere, under names that cannot change; lazy ones become others.
        if isinstance(module, (torch.jit.ScriptModule, LazyModuleMixin)):
            return
        known = self._known
        known[id(module)] = module
        held = vars(module)
        self._dicts.append((held, held.copy()))
        marks = marks_of(module)
        part = marks is not None and marks.box is not None
        for name, value in held.items():
            if type(value) in _PLAIN:
                continue
            if name in _TABLES:
                self._tables.append((value, dict(value) if value else _NOTHING))
            # In the part of a black box a device may be open; its state is the box's to save.
            elif not part and name not in _OF_EVERY_MODULE and not name.startswith(_OWN):
                self._look(value, 2)
        for parameter in held["_parameters"].values():
            if parameter is not None and id(parameter) not in known and not nn.parameter.is_lazy(parameter):
                known[id(parameter)] = parameter
                memory = _Memory.of(parameter) if type(parameter) is nn.Parameter else None  # others may wrap tensors
                # FSDP's first version keeps views as parameters, which have no .grad of their own.
                gradient = parameter.grad if self._gradients and parameter.is_leaf else None
                self._parameters.append((parameter, memory, gradient, parameter.requires_grad))

    def _object(self, thing: Any) -> None:
        self._known[id(thing)] = thing
        held = vars(thing)
        if type(held) is not dict:  # a class: hold nothing that is this object's alone
            return
        self._note_dict(held)
        for value in [*held.values()]:
            if type(value) not in _PLAIN:
                self._look(value, 0)

    def _note_dict(self, held: dict[Any, Any]) -> None:
        self._dicts.append((held, dict(held)))

    def _look(self, value: Any, objects: int) -> None:
        """Note a container, a source of random numbers, or, where ``objects`` is not zero, an object."""
        kind = type(value)
        if kind in _PLAIN or id(value) in self._known or isinstance(value, (Tensor, nn.Module, type)):
            return
        inner: Iterable[Any] = ()
        if kind in _DICTS:
            self._known[id(value)] = value
            self._note_dict(value)
            inner = value.values()
        elif kind in _LISTS:
            self._known[id(value)] = value
            items = tuple(value)
            self._others.append(lambda: _refill_list(value, items))
            inner = items
        elif kind is set:
            self._known[id(value)] = value
            members = frozenset(value)
            self._others.append(lambda: _refill_set(value, members))
        elif kind is tuple:
            inner = value
        elif (back := restorer(value) or _array_restorer(value)) is not None:
            self._known[id(value)] = value
            self._others.append(back)
        elif objects and _is_users(kind) and hasattr(value, "__dict__"):
            self._object(value)
        if inner and len(inner) <= _MOST_HELD:  # type: ignore[arg-type]
            for item in [*inner]:
                if type(item) not in _PLAIN:
                    self._look(item, objects)

    def restore(self) -> None:
        """Put everything back."""
        for held, before in (*self._dicts, *self._tables):
            _refill_dict(held, before)
        for parameter, memory, gradient, trained in self._parameters:
            if memory is not None:
                memory.put_back(parameter)
            if parameter.requires_grad is not trained:
                parameter.requires_grad_(trained)
            if self._gradients and parameter.is_leaf and parameter.grad is not gradient:
                parameter.grad = gradient
        for back in self._others:
            back()


def _is_users(kind: type) -> bool:
    return kind is types.SimpleNamespace or kind.__module__.partition(".")[0] not in _OF_LIBRARIES


def _array_restorer(value: Any) -> Callable[[], object] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray or value.nbytes > _MOST_BYTES or not value.flags.writeable:
        return None
    copy = value.copy()

    def back() -> None:
        if value.shape == copy.shape:
            value[...] = copy

    return back


def _refill_dict(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Only what differs is touched: other threads may read it."""
    missing = [key for key in held if key not in before and not (isinstance(key, str) and key.startswith(_OWN))]
    for key in missing:
        del held[key]
    for key, value in before.items():
        if key not in held or held[key] is not value:
            held[key] = value
    if [key for key in held if key in before] != [*before]:  # put back at the end
        more = {key: value for key, value in held.items() if key not in before}
        held.clear()
        held.update(before)
        held.update(more)


def _refill_list(held: Any, items: tuple[Any, ...]) -> None:
    if len(held) != len(items) or any(a is not b for a, b in zip(held, items, strict=True)):
        held.clear()
        held.extend(items)


def _refill_set(held: set[Any], members: frozenset[Any]) -> None:
    if held != members:
        held.clear()
        held.update(members)
