"""The traces that a module keeps, for shapes and modes that come again."""

from __future__ import annotations

from typing import Any

from torch import nn

from hzo.tracing.chain import Chain

_MOST = 8  # traces a module: shapes and modes that alternate (train and eval, the last smaller batch) stay


class _Traces(dict[tuple[Any, ...], Chain]):
    """Traces of a module, kept on the module: a trace refers to its module, so a table elsewhere would never be freed.

    A copied or unpickled module starts without them.
    """

    name = "_hzo_traces"

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def keep(chain: Chain) -> None:
    """Keep a traced chain with its module; the oldest one goes."""
    kept = chain.model.__dict__.setdefault(_Traces.name, _Traces())
    key = chain.traced.signature, chain.traced.batch == 1
    kept.pop(key, None)
    while len(kept) >= _MOST:
        kept.pop(next(iter(kept)))
    kept[key] = chain


def kept(module: nn.Module, about: tuple[Any, ...], batch: int) -> Chain | None:
    """A trace of the module for inputs of this signature; what was seen of one sample alone says nothing of more."""
    known: _Traces = module.__dict__.get(_Traces.name, _Traces())
    alone = known.get((about, True)) if batch == 1 else None
    return alone or known.get((about, False))
