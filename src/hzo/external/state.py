"""State that a part keeps between calls: found, saved, put back.

A neuron that remembers its membrane, an environment that moves on: the result of a call depends on those before it.
Queries must all start where the forward pass did, and the forward pass must move the state on once. What a part holds
in attributes, buffers, variables that it closes over and global ones that it names is found here; what it holds
elsewhere (another process, a library in C) needs hooks of the user's.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import InputError
from hzo.external.names import ClosedOver, OfClass, Slots, Some, attributes_of, closed_over, globals_of, slots_of
from hzo.external.signature import flatten

_LARGEST = 64 * 2**20  # bytes of one attribute that are copied at each call; weights are no state
_OBJECTS = 2000
_SHARED = (ClosedOver, OfClass, Some)  # spaces whose names several functions may share
StateKey = tuple[Any, ...]


@dataclass(frozen=True)
class Slot:
    """One attribute, as it was.

    Attributes:
        space: the mapping that holds it. value: the object that was there. content: a copy of what that held, by which
            it is put back in place, so that views of it and other names for it stay what they are.
        items: of a list or dict, its items. counts: it is a whole number, a bool or a text; it may be a mere counter.
    """

    space: Any
    name: Any
    value: Any
    content: Any
    items: tuple[Slot, ...]
    counts: bool
    random: bool


@dataclass(frozen=True)
class Saved:
    """A state as it was at some time. ``spaces``: the mappings that were looked into, with
    the names that were found in each."""

    slots: Mapping[StateKey, Slot]
    spaces: tuple[tuple[Any, frozenset[Any]], ...] = ()
    content: Any = None  # what the hook returned
    leaves: Mapping[StateKey, Any] = field(default_factory=dict)  # numbers that a gradient may flow through


def _numbers_in(key: StateKey, slot: Slot) -> dict[StateKey, Any]:
    """The floating arrays and numbers of one place and of what it contains, by key."""
    found: dict[StateKey, Any] = {}
    value = slot.content if isinstance(slot.value, Tensor) or _array(slot.value) else slot.value
    if isinstance(value, (float, complex)) and isinstance(slot.space, tuple):
        found[key] = _NOTHING  # a number in a tuple cannot be moved
    elif floating(value):
        found[key] = value
    for item in slot.items:
        found |= _numbers_in((*key, item.name), item)
    return found


_PLAIN = frozenset({type(None), bool, int, float, complex, str})  # most of what attributes hold: told without a search
_COUNTED = frozenset({bool, int, str})
_CONTAINERS = frozenset({list, tuple, dict, deque})


def _array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def _generator(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN or kind in _CONTAINERS:
        return False
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    return kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else int(getattr(value, "nbytes", 0))


def _holds(value: Any, depth: int = 0) -> bool:
    """Whether a value can be state: numbers, arrays of them, containers of these."""
    if type(value) in _PLAIN:
        return True
    if depth > 4:
        return False
    if isinstance(value, (list, tuple, dict, deque)):
        items = value.values() if isinstance(value, dict) else value
        return len(value) <= _OBJECTS and all(_holds(item, depth + 1) for item in items)
    if isinstance(value, Tensor) or _array(value):
        return not isinstance(value, nn.Parameter) and _size(value) <= _LARGEST
    scalar = type(value).__module__ == "numpy" and hasattr(value, "dtype") and not hasattr(value, "__len__")
    return value is None or scalar or isinstance(value, (bool, int, float, complex, str)) or _generator(value)


def _counts(value: Any) -> bool:
    if isinstance(value, (list, tuple, deque)):
        return all(_counts(item) for item in value)
    if isinstance(value, dict):
        return all(_counts(item) for item in value.values())
    return isinstance(value, (bool, int, str))


def _slot(space: Any, name: Any, value: Any) -> Slot:
    if type(value) in _PLAIN:
        return Slot(space, name, value, None, (), type(value) in _COUNTED, False)
    content: Any = None
    items: tuple[Slot, ...] = ()
    if isinstance(value, Tensor):
        content = value.detach().clone()
    elif _array(value):
        content = value.copy()
    elif isinstance(value, torch.Generator):
        content = value.get_state()
    elif isinstance(value, random.Random):
        content = value.getstate()
    elif _generator(value):
        content = copy.deepcopy(value.bit_generator.state if hasattr(value, "bit_generator") else value.get_state())
    elif isinstance(value, (list, tuple, deque)):
        content = list(value)
        items = tuple(_slot(value, k, item) for k, item in enumerate(value))
    elif isinstance(value, dict):
        content = dict(value)
        items = tuple(_slot(value, k, item) for k, item in value.items())
    return Slot(space, name, value, content, items, _counts(value), _generator(value))


def _same_content(value: Any, content: Any) -> bool:
    if isinstance(value, Tensor):
        return value.shape == content.shape and value.dtype == content.dtype and bool(torch.equal(value, content))
    return bool(value.shape == content.shape and (value == content).all())


@torch.no_grad()
def _put_back(slot: Slot, random: bool, bind: bool = True) -> None:
    value, content = slot.value, slot.content
    if slot.random and not random:
        return
    if bind and slot.space.get(slot.name, _NOTHING) is not value:
        slot.space[slot.name] = value
    if isinstance(value, Tensor):
        _refill(value, content)
    elif _array(value):
        if not _same_content(value, content) and value.shape == content.shape and value.flags.writeable:
            value[...] = content
        elif not _same_content(value, content) and bind:
            slot.space[slot.name] = content.copy()
    elif slot.random:
        _rewind(value, content)
    elif isinstance(value, (list, deque, dict)):
        _restock(value, content)
    for item in slot.items:
        _put_back(item, random, bind=False)


def _refill(tensor: Tensor, content: Tensor) -> None:
    if tensor.shape != content.shape:
        tensor.set_(content.clone())  # type: ignore[call-overload]
    elif not torch.equal(tensor, content):
        tensor.copy_(content)


def _restock(value: list[Any] | deque[Any] | dict[Any, Any], content: Any) -> None:
    if isinstance(value, dict):
        if not _same_items(value, content):
            value.clear()
            value.update(content)
    elif len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
        value.clear()
        value.extend(content)


def _rewind(generator: Any, content: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(content)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = copy.deepcopy(content)
    else:
        generator.set_state(content)


def _same_items(value: dict[Any, Any], content: dict[Any, Any]) -> bool:
    return value.keys() == content.keys() and all(value[k] is item for k, item in content.items())


_NOTHING = object()


def _differs(before: Slot, after: Slot) -> bool:
    """Whether a slot holds something else than before, by value."""
    a, b = before.value, after.value
    if type(a) is not type(b):
        return True
    if isinstance(a, Tensor) or _array(a):
        return not _same_content(after.content, before.content)
    if after.random:
        return str(before.content) != str(after.content)
    if before.items or after.items:
        return len(before.items) != len(after.items) or any(
            p.name != q.name or _differs(p, q) for p, q in zip(before.items, after.items, strict=True)
        )
    return a is not b and not bool(a == b)


# ---- what a callable holds
# --------------------------------------------------------------------------------------------


def owners_of(f: Any) -> Iterator[Any]:
    """The objects within reach of a callable that may hold its state: what it is, is a method of, was bound to, closes
    over or names; their own attributes included."""
    todo: list[tuple[Any, int]] = [(f, 0), (_what_runs(f), 1)]
    seen: set[int] = set()
    while todo and len(seen) < _OBJECTS:
        item, depth = todo.pop(0)
        if id(item) in seen or depth > 5:
            continue
        seen.add(id(item))
        if isinstance(item, functools.partial):
            todo += [(held, depth + 1) for held in (item.func, *item.args, *item.keywords.values())]
        elif isinstance(item, types.MethodType):
            todo += [(item.__self__, depth), (item.__func__, depth + 1)]
        elif isinstance(item, types.FunctionType):
            if _users_module(item.__module__):
                yield item
            todo += [(held, depth + 1) for held in _held_by(item)]
        elif isinstance(item, nn.Module):
            yield from (inner for inner in item.modules() if id(inner) == id(item) or id(inner) not in seen)
            seen |= {id(inner) for inner in item.modules()}
            for inner in item.modules():
                todo += [(held, depth + 1) for name, held in vars(inner).items() if not name.startswith("_")]
        elif isinstance(item, (list, tuple, deque)) and len(item) <= 100:
            todo += [(held, depth + 1) for held in item]
        elif isinstance(item, dict) and len(item) <= 100:
            todo += [(held, depth + 1) for held in item.values()]
        elif _of_the_user(item):
            yield item
            if not isinstance(item, type):
                todo += [(held, depth + 1) for space in _spaces(item) for held in space.values()]
                todo += [(type(item), depth + 1)]


def tensors_held(f: Any) -> Iterator[Tensor]:
    """Tensors that a callable holds, closes over, names or was bound to; parameters of modules left out."""
    bound = [*f.args, *f.keywords.values()] if isinstance(f, functools.partial) else []
    spaces = [list(space.items()) for owner in owners_of(f) for space in _spaces(owner)]
    for value in (*bound, *(value for items in spaces for name, value in items if name not in _OF_TORCH)):
        kept = isinstance(value, (Tensor, list, tuple, dict))
        yield from (leaf for leaf in (flatten(value)[0] if kept else ()) if isinstance(leaf, Tensor))


def _what_runs(f: Any) -> Any:
    """The function of its class that a call of an object runs."""
    return getattr(type(f), "forward" if isinstance(f, nn.Module) else "__call__", None)


def _held_by(function: types.FunctionType) -> Iterator[Any]:
    if not _users_module(function.__module__):
        return
    yield from ClosedOver(closed_over(function)).values()
    for held in Some(function.__globals__, globals_of(function)).values():
        if not isinstance(held, (list, tuple, dict)):
            yield held


def _users_module(name: str | None) -> bool:
    top = (name or "").partition(".")[0]
    return top == "__main__" or top not in {"torch", "numpy", "hzo", "builtins", *sys.stdlib_module_names}


def _of_the_user(item: Any) -> bool:
    if isinstance(item, type):
        return _users_module(item.__module__)
    if isinstance(item, (types.ModuleType, Tensor)) or _generator(item):
        return False
    if not hasattr(item, "__dict__") and not slots_of(type(item)):
        return False
    return _users_module(type(item).__module__)


_OF_TORCH = frozenset(vars(nn.Module()))


def _spaces(owner: Any) -> Iterator[Any]:
    """The mappings from names to values in which an object or a function keeps what it remembers."""
    if isinstance(owner, nn.Module):
        yield owner._buffers
    if isinstance(owner, type):
        yield OfClass(owner)
        return
    if hasattr(owner, "__dict__"):
        yield vars(owner)
    if isinstance(owner, types.FunctionType):
        yield ClosedOver(closed_over(owner))
        named = Some(owner.__globals__, globals_of(owner))
        yield named
        for held in named.values():  # variables of a module that it names: module.level = …
            if isinstance(held, types.ModuleType) and _users_module(held.__name__):
                yield Some(vars(held), attributes_of(owner))
        yield dict(enumerate(owner.__defaults__ or ()))  # a list there outlives the call
    elif slots_of(type(owner)):
        yield Slots(owner)


def _place(space: Any, name: Any) -> Any:
    """What tells a variable that several functions share from others."""
    return space.place(name) if isinstance(space, _SHARED) else None


class FoundState:
    """The state that a callable holds in attributes and buffers."""

    opaque = False

    def __init__(self, f: Callable[..., Any], noisy: bool) -> None:
        self.f = f
        self.noisy = noisy

    def save(self) -> Saved:
        """Copies of all of it."""
        slots: dict[StateKey, Slot] = {}
        spaces = []
        shared: set[Any] = set()  # variables of several functions are one state
        for owner in owners_of(self.f):
            for k, space in enumerate(_spaces(owner)):
                names = set()
                for name, value in list(space.items()):
                    place = _place(space, name)
                    if place in shared:
                        names.add(name)
                    elif name not in _OF_TORCH and _holds(value):
                        shared.update([place] if place is not None else [])
                        # A variable is the same whichever function, and whichever box, looks at it.
                        key = (id(owner), k, name) if place is None else (("variable", place), 0, name)
                        slots[key] = _slot(space, name, value)
                        names.add(name)
                spaces.append((space, frozenset(names)))
        return Saved(slots, tuple(spaces))

    def reach(self) -> set[Any]:
        """The places that it can be in: objects, each with one of its mappings, and variables."""
        found: set[Any] = set()
        for owner in owners_of(self.f):
            for k, space in enumerate(_spaces(owner)):
                shared = isinstance(space, _SHARED)
                found |= {("variable", space.place(name)) for name in space} if shared else {(id(owner), k)}
        return found

    def load(self, saved: Saved, counters: bool = True) -> None:
        """Put it back; ``counters``: whole numbers, too."""
        for slot in saved.slots.values():
            # An empty list counts nothing: what has come into it since says what it is.
            if counters or not slot.counts or not _counts(slot.space.get(slot.name)):
                _put_back(slot, random=not self.noisy)
        for space, known in saved.spaces:  # what has come since goes
            for name in [n for n, v in space.items() if n not in known and n not in _OF_TORCH and _holds(v)]:
                if counters or not _counts(space[name]):
                    del space[name]

    def changed(self, before: Saved, after: Saved) -> tuple[list[StateKey], list[StateKey]]:
        """What a call has changed: state for certain, and what may be a mere counter."""
        keys = [
            key
            for key in {**before.slots, **after.slots}
            if key not in before.slots or key not in after.slots or _differs(before.slots[key], after.slots[key])
        ]
        slots = {**before.slots, **after.slots}
        if self.noisy:
            keys = [key for key in keys if not slots[key].random]
        certain = [k for k in keys if not slots[k].counts]
        return certain, [k for k in keys if slots[k].counts]

    def numbers(self, saved: Saved, keys: Sequence[StateKey]) -> dict[StateKey, Any]:
        """The floating arrays and numbers among these slots, by key; containers are looked into."""
        found: dict[StateKey, Any] = {}
        for key in dict.fromkeys(key[:3] for key in keys):
            if key in saved.slots:
                found |= _numbers_in(key, saved.slots[key])
        return found

    def move(self, saved: Saved, key: StateKey, content: Any) -> None:
        """Write other numbers into one place, behind a ``load``."""
        slot = saved.slots[key[:3]]
        for name in key[3:]:
            slot = next(item for item in slot.items if item.name == name)
        value = slot.value
        if isinstance(value, Tensor):
            with torch.no_grad():
                value.copy_(content)
        elif _array(value) and value.flags.writeable:
            value[...] = content.cpu().numpy()
        elif _array(value):
            slot.space[slot.name] = content.cpu().numpy()
        else:
            slot.space[slot.name] = type(value)(content.item())

    def same(self, saved: Saved, other: Saved, key: StateKey) -> bool:
        """Whether a place holds what it held, in the same object: nobody has reset it in between."""
        if key[:3] not in saved.slots or key[:3] not in other.slots:
            return False
        a, b = saved.slots[key[:3]], other.slots[key[:3]]
        return (a.value is b.value or isinstance(a.value, float)) and not _differs(a, b)

    def names(self, keys: Sequence[StateKey]) -> str:
        return ", ".join(dict.fromkeys(str(key[2]) for key in keys))


class Hooked:
    """The state that ``save()`` returns and ``load(state)`` puts back, of the user's."""

    def __init__(self, save: Callable[[], Any], load: Callable[[Any], Any]) -> None:
        self._save, self._load = save, load
        self.opaque = False

    def save(self) -> Saved:
        content = self._save()
        leaves, structure = flatten(content)
        kept = [_copied(leaf) for leaf in leaves]
        slots = {("state", k): Slot(None, k, leaf, leaf, (), _counts(leaf), False) for k, leaf in enumerate(kept)}
        self.opaque = not any(floating(leaf) for leaf in leaves)
        return Saved(slots, content=structure)

    def load(self, saved: Saved, counters: bool = True) -> None:  # noqa: ARG002
        self._put(saved, {})

    def _put(self, saved: Saved, moved: Mapping[StateKey, Any]) -> None:
        leaves = [moved.get(key, _copied(slot.value)) for key, slot in saved.slots.items()]
        self._load(saved.content.build(leaves))

    def changed(self, before: Saved, after: Saved) -> tuple[list[StateKey], list[StateKey]]:
        keys = [
            key
            for key in {**before.slots, **after.slots}
            if key not in before.slots or key not in after.slots or not _equal(before.slots[key], after.slots[key])
        ]
        return keys, []

    def numbers(self, saved: Saved, keys: Sequence[StateKey]) -> dict[StateKey, Any]:
        return {key: saved.slots[key].value for key in keys if key in saved.slots and floating(saved.slots[key].value)}

    def move(self, saved: Saved, key: StateKey, content: Any) -> None:
        value = saved.slots[key].value
        if not isinstance(value, Tensor):
            content = content.cpu().numpy() if _array(value) else type(value)(content.item())
        self._put(saved, {key: content})

    def same(self, saved: Saved, other: Saved, key: StateKey) -> bool:
        return key in saved.slots and key in other.slots and _equal(saved.slots[key], other.slots[key])

    def names(self, keys: Sequence[StateKey]) -> str:  # noqa: ARG002
        return "what its hook saves"


class Without:
    """No state, by the user's word."""

    opaque = False

    def save(self) -> Saved:
        return Saved({})

    def load(self, saved: Saved, counters: bool = True) -> None:
        pass

    def changed(self, before: Saved, after: Saved) -> tuple[list[StateKey], list[StateKey]]:  # noqa: ARG002
        return [], []

    def numbers(self, saved: Saved, keys: Sequence[StateKey]) -> dict[StateKey, Any]:  # noqa: ARG002
        return {}

    def move(self, saved: Saved, key: StateKey, content: Any) -> None:  # noqa: ARG002
        raise AssertionError

    def same(self, saved: Saved, other: Saved, key: StateKey) -> bool:  # noqa: ARG002
        return False

    def names(self, keys: Sequence[StateKey]) -> str:  # noqa: ARG002
        return ""


PartState = FoundState | Hooked | Without


def floating(value: Any) -> bool:
    """Whether a gradient may flow through it: floating or complex numbers."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    if _array(value) or type(value).__module__ == "numpy":
        return getattr(getattr(value, "dtype", None), "kind", "") in "fc" and hasattr(value, "dtype")
    return isinstance(value, (float, complex))


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf.copy() if _array(leaf) else leaf


def _equal(a: Slot, b: Slot) -> bool:
    if type(a.value) is not type(b.value):
        return False
    if isinstance(a.value, Tensor) or _array(a.value):
        return _same_content(a.value, b.value)
    return bool(a.value is b.value or a.value == b.value)


def state_of(f: Callable[..., Any], given: Any, noisy: bool) -> PartState:
    """What ``state=`` of ``hzo.blackbox`` means.

    Raises:
        InputError: it is nothing that can be saved and loaded.
    """
    if isinstance(given, str) and given == "found":
        return FoundState(f, noisy)
    if given is None:
        return Without()
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(callable(hook) for hook in given):
        return Hooked(*given)
    for save, load in (("save", "load"), ("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if callable(getattr(given, save, None)) and callable(getattr(given, load, None)):
            return Hooked(getattr(given, save), getattr(given, load))
    raise InputError(
        "expected state to be 'found' (attributes and buffers), None (there is none), a pair of functions (save, "
        "load), or an object with save and load, get_state and set_state, or state_dict and load_state_dict; got "
        f"{given!r}"
    )
