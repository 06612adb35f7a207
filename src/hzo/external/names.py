"""Names that hold values apart from an object's attributes, as mappings: closed over, global, in slots."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, MutableMapping, Sequence
from functools import lru_cache
from typing import Any


class ClosedOver(MutableMapping[str, Any]):
    """The variables that a function closes over (``nonlocal``)."""

    def __init__(self, cells: dict[str, types.CellType]) -> None:
        self._cells = cells

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError as error:  # it has no value yet
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self._cells[name].cell_contents

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, cell in self._cells.items() if _is_full(cell)])

    def __len__(self) -> int:
        return sum(map(_is_full, self._cells.values()))

    def place(self, name: str) -> Any:
        """The same for every function that shares this variable."""
        return id(self._cells[name])


class Some(MutableMapping[str, Any]):
    """Some names of a larger mapping: the global variables that a function uses."""

    def __init__(self, whole: MutableMapping[str, Any], names: Sequence[str]) -> None:
        self._whole, self._names = whole, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._whole[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._whole[name] = value

    def __delitem__(self, name: str) -> None:
        del self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._names if name in self._whole])

    def __len__(self) -> int:
        return sum(name in self._whole for name in self._names)

    def place(self, name: str) -> Any:
        """The same for every function that uses this variable."""
        return id(self._whole), name


class Slots(MutableMapping[str, Any]):
    """The attributes of an object that a class with ``__slots__`` gives it."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._names = owner, slots_of(type(owner))

    def __getitem__(self, name: str) -> Any:
        if name not in self._names or not hasattr(self._owner, name):
            raise KeyError(name)
        return getattr(self._owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._names if hasattr(self._owner, name)])

    def __len__(self) -> int:
        return sum(hasattr(self._owner, name) for name in self._names)


class OfClass(MutableMapping[str, Any]):
    """The attributes of a class itself that are values: what its methods and its instances share."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def __getitem__(self, name: str) -> Any:
        return vars(self._kind)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._kind, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in vars(self._kind) if not (name.startswith("__") and name.endswith("__"))])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def place(self, name: str) -> Any:
        """The same for all that share this attribute."""
        return id(self._kind), name


def slots_of(kind: type) -> list[str]:
    """The names in ``__slots__`` of a class and of those it derives from."""
    found: list[str] = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in dict.fromkeys(found) if name not in ("__dict__", "__weakref__")]


def globals_of(function: types.FunctionType) -> tuple[str, ...]:
    """The global variables that a function reads or writes, functions that are written inside of it included."""
    return _globals_in(function.__code__)


@lru_cache(maxsize=4096)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    own = [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")]
    inner = [name for held in code.co_consts if isinstance(held, types.CodeType) for name in _globals_in(held)]
    return tuple(dict.fromkeys((*own, *inner)))


def attributes_of(function: types.FunctionType) -> tuple[str, ...]:
    """The names of attributes that a function reads or writes, of whatever."""
    return _attributes_in(function.__code__)


@lru_cache(maxsize=4096)
def _attributes_in(code: types.CodeType) -> tuple[str, ...]:
    names = ("LOAD_ATTR", "STORE_ATTR", "LOAD_METHOD")
    own = [str(i.argval) for i in dis.get_instructions(code) if i.opname in names]
    inner = [name for held in code.co_consts if isinstance(held, types.CodeType) for name in _attributes_in(held)]
    return tuple(dict.fromkeys((*own, *inner)))


def closed_over(function: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _is_full(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
