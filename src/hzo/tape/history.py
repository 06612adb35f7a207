"""Whether a tensor has a history for autograd, and whether it would have one if inputs of a plan were mere data.

A plan perturbs what depends on the inputs, so their copies require a gradient while it records, whether or not the
user's do. Code that asks a tensor (``x.requires_grad``, ``x.grad_fn``, ``x.is_leaf``) is told what it would be told
without a plan, and goes the same way: fast paths of PyTorch's transformer layers are of this kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hzo.tape.tape import Tape

_has_torch_function: Callable[[Tensor], bool] = torch._C._has_torch_function_unary


def _of_pytorch(name: str) -> Callable[[Tensor], Any]:
    """What PyTorch knows itself, whatever the attribute of this name says: modes and subclasses that overload torch's
    functions (``torch.device`` as a context, for one) would be sent to that attribute."""
    get = getattr(torch._C.TensorBase, name).__get__

    def asked(tensor: Tensor) -> Any:
        if _has_torch_function(tensor):
            with torch._C.DisableTorchFunction():
                return get(tensor)
        return get(tensor)

    return asked


requires_grad: Callable[[Tensor], bool] = _of_pytorch("requires_grad")
is_leaf: Callable[[Tensor], bool] = _of_pytorch("is_leaf")
grad_fn: Callable[[Tensor], Any] = _of_pytorch("grad_fn")


class History:
    """For every value of a tape whether it hangs on a leaf of the user's, or on inputs that stand in for data alone."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._own: list[bool] = []
        self._claimed: set[int] = set()  # leaves of the user's: inputs, and what the model made one by itself
        self.given: set[int] = set()  # inputs that the caller's tensors give a history from before

    def of(self, tensor: Tensor) -> bool:
        """Whether a tensor that requires a gradient would do so without the plan; True where that is not known."""
        value = self._value(tensor)
        return value is None or self._own[value]

    def is_claimed(self, tensor: Tensor) -> bool:
        """Whether it is a leaf in the user's eyes: an input, or what the model said ``requires_grad_()`` of."""
        return self._value(tensor) in self._claimed

    def claim(self, tensor: Tensor, wanted: bool) -> None:
        """Whether a value is to be a leaf that requires a gradient from here on; what was made of it stays as it is."""
        value = self._value(tensor)
        if value is not None:
            self._own[value] = wanted
            (self._claimed.add if wanted else self._claimed.discard)(value)

    def _value(self, tensor: Tensor) -> int | None:
        tape, own = self.tape, self._own
        for value in tape.values[len(own) :]:
            if value.producer < 0:
                own.append(len(own) in tape.leaves or len(own) in self.given or value.foreign is not None)
            else:
                own.append(value.requires and any(own[v] for v in tape.operations[value.producer].reads()))
        return tape.value_of(tensor)
