"""A tensor without content: a shape and a dtype, with which nothing can be computed.

Tensors of PyTorch's "meta" device do not serve: many kernels read them beside real ones as if memory were there
(``torch.mm``, indexing, convolutions) and return what happens to lie in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hzo.errors import TapeError


class Absent(Tensor):
    """Stands for what the tape did not keep. Views of it are absent, too; with a real tensor beside it, it raises."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor) -> Absent:
        made: Absent = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("meta")
        )
        return made

    def __init__(self, like: Tensor) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def shape_of(argument: Any) -> Any:
            if isinstance(argument, Absent):
                return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")
            if isinstance(argument, Tensor) and argument.dim():
                raise TapeError(
                    f"{func} read a value whose content was not kept: PyTorch's own derivative would not have read it. "
                    "Please report this, with the model; until it is mended, record with keep=True"
                )
            return type(argument)(map(shape_of, argument)) if isinstance(argument, (list, tuple)) else argument

        result = func(*map(shape_of, args), **{k: shape_of(v) for k, v in (kwargs or {}).items()})
        if isinstance(result, (list, tuple)):
            return type(result)(Absent(r) if isinstance(r, Tensor) else r for r in result)
        return Absent(result) if isinstance(result, Tensor) else result
