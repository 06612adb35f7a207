"""What a rule is: the vector-Jacobian product (VJP) of one ATen operator, for each of its operands.

A rule is a function from a ``Call`` to the cotangents of the operands. It reads what the step left on the tape:
operands and results, no more of them than PyTorch's own derivative saves. **No weight is read to carry a cotangent to
an activation**: where one operand of a product is a weight (``call.weight(k)``), the rule runs the operator again on
small inputs of its own (``call.measure``) and takes the Jacobian from what came back; those runs are queries and
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hzo.tape import Operation, Tape
from hzo.tape.operations import Ref, refs_in

Key = int | str
"""The place of an operand: a position among the arguments, or a keyword."""

Cotangents = Mapping[Key, Any]
"""By place: a tensor of the operand's shape, or a list of them (None for those not asked for) where it is a list."""


@dataclass(frozen=True)
class Engine:
    """What a rule may ask of the sweep that applies it.

    Attributes:
        measure: run a call's operation on other arguments, counted: ``measure(call, args, kwargs, size)``.
        again: the cotangents of a call through another function that computes the same, recorded for the purpose.
        divides: large probes are divided among the processes that share queries, where there are any.
    """

    measure: Callable[[Call, tuple[Any, ...], dict[str, Any], Tensor | tuple[int, ...]], Any]
    again: Callable[[Call, Callable[..., Any]], Cotangents]
    divides: bool = False


class Call:
    """One operation as it ran, and the cotangents of its results.

    Attributes:
        args, kwargs: its arguments; tensors hold what they held when it ran.
        out: its results in order (lists flattened). grads: their cotangents; None for those without.
        wanted: the values of which cotangents are asked for; None for all that require one.
    """

    __slots__ = ("args", "engine", "grads", "kwargs", "op", "out", "schema", "tape", "wanted")

    def __init__(
        self,
        tape: Tape,
        op: Operation,
        grads: list[Tensor | None],
        engine: Engine,
        wanted: frozenset[int] | None = None,
    ) -> None:
        self.tape = tape
        self.op = op
        self.args = tape.resolve(op.args)
        self.kwargs = {k: tape.resolve(v) for k, v in op.kwargs.items()} if op.kwargs else op.kwargs
        self.grads = grads
        self.out = [None if v is None else tape.tensors[v] for v in op.writes]
        self.engine = engine
        self.wanted = wanted
        self.schema: dict[str, tuple[int, Any]] | None = None  # arguments by name, once somebody asks (schema.py)

    @property
    def grad(self) -> Tensor:
        """The cotangent of the first result.

        Results are never without one here: a rule of an operator with several results asks ``grads``.
        """
        grad = self.grads[0]
        assert grad is not None
        return grad

    @property
    def result(self) -> Tensor:
        """The first result."""
        out = self.out[0]
        assert out is not None
        return out

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, wherever it stands; its default where the call left it out."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def _template(self, key: Key) -> Any:
        if isinstance(key, str):
            return self.op.kwargs.get(key)
        return self.op.args[key] if key < len(self.op.args) else None

    def needs(self, key: Key) -> bool:
        """Whether a cotangent of this operand is asked for; of a list, whether one of any of its tensors is."""
        args = self.op.args
        template = args[key] if type(key) is int and key < len(args) else self._template(key)
        if type(template) is Ref:
            return self._asked(template.value)
        return type(template) is tuple and any(self._asked(v) for v in refs_in(template))

    def _asked(self, value: int) -> bool:
        return self.tape.values[value].requires and (self.wanted is None or value in self.wanted)

    def each(self, key: Key) -> list[bool]:
        """For a list of tensors: of which of them a cotangent is asked for."""
        return [type(leaf) is Ref and self._asked(leaf.value) for leaf in self._template(key)]

    def weight(self, key: Key) -> bool:
        """Whether this operand was computed from parameters alone, so that a rule may not read it for an activation."""
        template = self._template(key)
        return type(template) is Ref and self.tape.values[template.value].weight

    def leaf(self, key: Key) -> bool:
        """Whether this operand was there before the recording, so that its cotangent goes to ``.grad`` as it is."""
        template = self._template(key)
        return type(template) is Ref and self.tape.values[template.value].producer < 0

    def measure(self, replaced: Mapping[Key, Any], size: Tensor | tuple[int, ...]) -> Any:
        """Run the operator again with some arguments replaced; its results.

        Args:
            size: what tells the price, a replaced operand or the shape of one: as many queries are counted as it has
                rows.
        """
        args = list(self.args)
        kwargs = dict(self.kwargs)
        for key, argument in replaced.items():
            if isinstance(key, str):
                kwargs[key] = argument
            else:
                args[key] = argument
        return self.engine.measure(self, tuple(args), kwargs, size)


@dataclass(frozen=True)
class Rule:
    """The VJP of one operator.

    Attributes:
        vjp: from a call to the cotangents of its operands.
        measures: whether it runs the operator again where an operand is a weight.
        lean: it reads no more than PyTorch's own derivative saves, which is tried: what else such a call makes may be
            released while the step runs.
    """

    vjp: Callable[[Call], Cotangents]
    measures: bool = False
    lean: bool = False


rules: dict[Any, Rule] = {}
"""The table: by operator with its overload."""


def vjp(*targets: Any, measures: bool = False, lean: bool = False) -> Callable[[Callable[[Call], Cotangents]], Any]:
    """Register a rule for operators; used as a decorator. ``measures`` and ``lean`` as in ``Rule``."""

    def register(function: Callable[[Call], Cotangents]) -> Callable[[Call], Cotangents]:
        for target in targets:
            if target in rules:
                raise AssertionError(f"{target} has a rule already")
            rules[target] = Rule(function, measures, lean)
        return function

    return register


def present(*names: str) -> list[Any]:
    """Of operators that only some versions of PyTorch have ("aten::cholesky"), those of the version that runs."""
    found = (getattr(getattr(torch.ops, space), name, None) for space, name in (n.split("::") for n in names))
    return [packet.default for packet in found if packet is not None]


def unbroadcast(grad: Tensor, like: Tensor) -> Tensor:
    """The cotangent of an operand that was broadcast: summed over what was repeated."""
    return grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
