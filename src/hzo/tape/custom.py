"""Custom autograd Functions on the tape: one operation each, with the user's own backward as its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hzo.errors import TapeError
from hzo.tape.history import grad_fn, requires_grad
from hzo.tape.operations import Operation, ref

if TYPE_CHECKING:
    from hzo.tape.record import Recorder


class NodeHooks:
    """Collects the hooks that a module hangs on an autograd node; they run when the tape's sweep comes by."""

    def __init__(self) -> None:
        self.before: list[Callable[..., Any]] = []
        self.after: list[Callable[..., Any]] = []

    @classmethod
    def of(cls, node: Any) -> NodeHooks:
        """The hooks of a node, kept on the node."""
        hooks: NodeHooks | None = node.metadata.get("hzo_hooks")
        if hooks is None:
            hooks = node.metadata["hzo_hooks"] = cls()
        return hooks

    def register_prehook(self, hook: Callable[..., Any]) -> None:
        self.before.append(hook)

    def register_hook(self, hook: Callable[..., Any]) -> None:
        self.after.append(hook)


class CustomFunction:
    """A call of a custom Function: the node that autograd made for it, which holds what its backward needs."""

    def __init__(self, node: Any, objects: dict[int, Any] | None = None) -> None:
        self.node = node
        self.function = node._forward_cls
        self.objects = objects or {}  # arguments that are not on the tape, by position

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """The forward once more, on copies of these tensors: it may write to what it is given."""
        given = [a.clone() if isinstance(a, Tensor) else self.objects.get(k, a) for k, a in enumerate(args)]
        return _results(self.function.apply(*given))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CustomFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @property
    def materializes(self) -> bool:
        """Whether its backward is given zeros for results without a cotangent (``ctx.set_materialize_grads``)."""
        return bool(getattr(self.node, "hzo_materialize", True))

    def carry_back(self, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
        """The user's backward, with the hooks that hang on it; no engine runs."""
        hooks: NodeHooks | None = self.node.metadata.get("hzo_hooks")
        before, after = ((), ()) if hooks is None else (hooks.before, hooks.after)
        given: Any = tuple(cotangents)
        for hook in before:
            changed = hook(given)
            given = given if changed is None else changed if isinstance(changed, tuple) else (changed,)
        result = self.node.apply(*given)
        result = result if isinstance(result, tuple) else (result,)
        for hook in after:
            changed = hook(result, given)
            result = result if changed is None else changed if isinstance(changed, tuple) else (changed,)
        return result

    @staticmethod
    def record(recorder: Recorder, args: tuple[Any, ...], before: dict[int, int], result: Any) -> None:
        """Append the call whose results these are; ``before``: the values of the arguments when it was made."""
        results = _results(result)
        outputs = [t for t in results if isinstance(t, Tensor)]
        nodes = [node for t in outputs if hasattr(node := grad_fn(t), "_forward_cls")]
        memory = recorder.memory
        written = {id(t): memory.before_declared_write(t) for t in outputs if any(t is a for a in args)}
        if not nodes:
            for tensor in outputs:
                if id(tensor) in written and requires_grad(tensor):  # autograd hides the node behind one of its own
                    recorder.foreign(tensor, "a custom Function that writes to a view")
                    memory.after_write(tensor, written[id(tensor)])
            return
        node = nodes[0]

        def place(argument: Any) -> Any:
            if id(argument) in before:
                return ref(before[id(argument)])
            if id(argument) in written:  # a constant until now
                return ref(recorder.new_value(argument, False, -1, False))
            return ref(recorder.read(argument)) if isinstance(argument, Tensor) else _plain(argument)

        refs = tuple(map(place, args))
        op = recorder.operation(CustomFunction(node, _objects(args)), refs, {})
        writes: list[int | None] = []
        for tensor in results:
            if not isinstance(tensor, Tensor):  # has a place among the cotangents, too
                writes.append(None)
                continue
            made = grad_fn(tensor) is node
            recorder.settle(tensor)
            writes.append(recorder.new_value(tensor, made, op.index if made else -1, False))
            if id(tensor) in written:
                memory.after_write(tensor, written[id(tensor)])
        op.writes = tuple(writes)


@dataclass
class UnseenCall:
    """A call of a custom Function that the recording has not seen return: it goes on the tape when a result is read.

    Since PyTorch 2.14 an ``apply`` that was taken before the recording (``f = MyFunction.apply``) is a function of C,
    beneath which only the Function's own methods are Python.

    Attributes:
        function, args: as of the operation to be.
        results: shape, dtype and device of the values to be; None for what is no tensor.
        op: the operation, once a result was read.
    """

    function: CustomFunction
    args: tuple[Any, ...]
    results: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]
    op: Operation | None = None

    @staticmethod
    def arguments(recorder: Recorder, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values that arguments hold now."""
        return tuple(ref(recorder.read(a)) if isinstance(a, Tensor) else _plain(a) for a in args)

    @staticmethod
    def note(recorder: Recorder, node: Any, args: tuple[Any, ...], values: tuple[Any, ...], result: Any) -> None:
        """Keep what is known of a call until a result is read. Raises TapeError where it writes to operands."""
        function = CustomFunction(node, _objects(args))
        if node.dirty_tensors:
            name = node._forward_cls.__qualname__
            raise TapeError(
                f"the custom Function {name} writes to its input, and its apply was taken before the recording "
                f"(f = {name}.apply), which cannot be seen; write {name}.apply(...) where it is called"
            )
        results = tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else None for t in _results(result))
        recorder.unseen[id(node)] = partial(UnseenCall(function, values, results).value_of, recorder)

    def value_of(self, recorder: Recorder, tensor: Tensor) -> int:
        """The value of one of its results, which the tape has from now on."""
        if self.op is None:
            self.op = recorder.operation(self.function, self.args, {})
            index = self.op.index
            self.op.writes = tuple(None if r is None else recorder.expect(*r, index) for r in self.results)
        value = self.op.writes[tensor.output_nr]
        assert value is not None
        recorder.bind(tensor, value)
        return value


_PLAIN = (bool, int, float, str, type(None))


def _objects(args: tuple[Any, ...]) -> dict[int, Any]:
    """Arguments that are neither tensors nor what a fingerprint holds, by position."""
    return {k: a for k, a in enumerate(args) if not isinstance(a, (Tensor, *_PLAIN))}


def _plain(argument: Any) -> Any:
    """An argument that is no tensor, as a fingerprint can hold it."""
    return argument if isinstance(argument, _PLAIN) else type(argument).__name__


def _results(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
