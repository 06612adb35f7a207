"""What goes into a part and comes out of it, as a list of tensors and the structure around them.

Tuples, named tuples, lists, dicts and whatever else ``torch.utils._pytree`` knows are looked into, and so are
dataclasses and ``SimpleNamespace``: simulators and neurons return states as such.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class Structure:
    """Everything of a nested value but its leaves.

    Attributes:
        spec: of the containers that pytree knows. inside: for each of its leaves, what it is itself: None for a leaf,
            or the type of an object with the names of its fields and the structures of these.
    """

    spec: Any
    inside: tuple[tuple[type[Any], tuple[str, ...], Structure] | None, ...]

    def build(self, leaves: Sequence[Any]) -> Any:
        """The nested value with these leaves."""
        remaining = iter(leaves)
        return self._build(remaining)

    def _build(self, remaining: Any) -> Any:
        found = []
        for inner in self.inside:
            if inner is None:
                found.append(next(remaining))
                continue
            kind, names, structure = inner
            fields = dict(zip(names, structure._build(remaining), strict=True))
            if kind is SimpleNamespace:
                found.append(SimpleNamespace(**fields))
            else:  # past __init__, which may compute fields of its own
                made = object.__new__(kind)
                for name, value in fields.items():
                    object.__setattr__(made, name, value)
                found.append(made)
        return pytree.tree_unflatten(found, self.spec)


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The leaves of a nested value, in order, and its structure."""
    outer, spec = pytree.tree_flatten(value)
    leaves: list[Any] = []
    inside: list[tuple[type[Any], tuple[str, ...], Structure] | None] = []
    for leaf in outer:
        names = _fields(leaf)
        if names is None:
            leaves.append(leaf)
            inside.append(None)
            continue
        found, structure = flatten([getattr(leaf, name) for name in names])
        leaves += found
        inside.append((type(leaf), names, structure))
    return leaves, Structure(spec, tuple(inside))


def _fields(leaf: Any) -> tuple[str, ...] | None:
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return tuple(f.name for f in dataclasses.fields(leaf) if hasattr(leaf, f.name))
    return tuple(vars(leaf)) if type(leaf) is SimpleNamespace else None


def argument_names(f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """For every leaf of ``(args, kwargs)`` the name of the argument that holds it: ``f``'s own, or its number."""
    try:
        bound = list(inspect.signature(f.forward if isinstance(f, nn.Module) else f).parameters.values())
    except (TypeError, ValueError):  # builtins, and NumPy's functions
        bound = []
    plain = [p.name for p in bound if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = []
    for k, argument in enumerate(args):
        found += [plain[k] if k < len(plain) else str(k)] * len(flatten(argument)[0])
    ordered, _ = pytree.tree_flatten({name: name for name in kwargs})  # in pytree's order of keys
    for name in ordered:
        found += [name] * len(flatten(kwargs[name])[0])
    return found
