"""What hzo does stays out of the sight of ``torch.compile``: a compiled training step breaks its graph there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

from hzo.errors import TapeError

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: where PyTorch's compiler is at work, it does not look into the function.

    The compiler takes seconds to import, so that nothing of it is touched where nobody else has imported it.
    """
    hidden: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not hidden:
            hidden.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return hidden[0](*args, **kwargs)

    return call


class Uncompiled(AbstractContextManager[R]):
    """A context manager, entered once; the compiler does not look into entry and exit, but may into the block."""

    def __init__(self, manager: AbstractContextManager[R]) -> None:
        self._manager = manager
        self._entered = False

    @uncompiled
    def __enter__(self) -> R:
        if self._entered:
            raise TapeError("this recording was entered before; make a new one for each step, with hzo.record()")
        self._entered = True
        return self._manager.__enter__()

    @uncompiled
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._manager.__exit__(kind, error, trace)
