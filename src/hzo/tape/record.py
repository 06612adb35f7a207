"""Recording: every call of an ATen operator that autograd would differentiate becomes an operation of the tape.

The recorder is a dispatch mode: it sees calls below autograd, in the order in which they run, whatever was written
above them (layers, functionals, TorchScript, ``vmap``, in-place code). What is constant is what autograd says is
constant: a call without an argument that requires a gradient, or under ``no_grad``, runs and leaves no trace, and its
result is a constant when a recorded call reads it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_stack_at, _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode

from hzo.distributed import collective_in, is_collective, refuse_share
from hzo.errors import TapeError
from hzo.tape.aliases import geometry_of, overlaps_itself, pass_through, restride, restride_scatter
from hzo.tape.foreach import on_lists, singles
from hzo.tape.functions import operator_of, out_of_place
from hzo.tape.history import History, grad_fn, is_leaf, requires_grad
from hzo.tape.memory import WRITTEN_TWICE, Memory, alone, storage_of
from hzo.tape.operations import Operation, Value, ref
from hzo.tape.state import OperationState, random_state
from hzo.tape.tape import Tape
from hzo.tape.undo import Undo

aten = torch.ops.aten
_CLONE, _EFFICIENT_ZEROS = aten.clone.default, aten._efficientzerotensor.default
_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = frozenset((int, float, bool, type(None)))  # told apart by type first: isinstance of Tensor takes longer
_CONJUGATE, _NEGATIVE = torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative

# Writes that the schema does not declare.
_HIDDEN_WRITES: dict[Any, tuple[int, ...]] = {
    aten.native_batch_norm.default: (3, 4),
    aten.cudnn_batch_norm.default: (3, 4),
    aten.miopen_batch_norm.default: (3, 4),
}

_SHAPES_ALONE = frozenset(
    (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
        "new_zeros", "new_ones", "new_full", "new_empty_strided",
    )
)  # fmt: skip

NESTED = (
    "a nested tensor carries a gradient, which hzo does not follow; pad it (x.to_padded_tensor(0.0)), or work on its "
    "values and lengths. PyTorch's transformer encoders make one of a padding mask where nothing in them is trained: "
    "run those under torch.no_grad()"
)

_CARRIES = "the recording, on a tensor that carries a gradient"
_BY_FUNCTION = (
    "the gradients of the other processes' losses would be lost. Put it into a torch.autograd.Function whose backward "
    "sends them back (as those of torch.distributed.nn.functional do), which hzo follows, or under torch.no_grad() "
    "where its result is data"
)

_UNINITIALIZED = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)

_CANDIDATES = 8  # as many new results are looked at together: few, since what is not needed is held as long


_DRAWS_NOISE = (aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default)

_LAYOUTS = frozenset(("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_"))


@dataclass(frozen=True)
class _Operator:
    """What the schema of an operator says, looked up once."""

    func: Any
    writes: tuple[int | str, ...]  # positions or names of the arguments that it changes
    in_place: bool  # returns what it changed, or nothing
    view: bool
    detach: bool
    constant: bool  # reads shapes alone: its result carries no gradient
    layout: bool  # changes how a tensor lies in memory, and no content
    restrides: bool  # reads memory beside its operand
    on_lists: bool  # does one thing to each tensor of a list
    collective: bool  # talks to other processes
    functional: Callable[..., Any]
    rule: int  # id of the operator by which rules know it; 0 where the tape writes down another one


_OPERATORS: dict[int, _Operator] = {}  # by id: operators hash by a function in Python, and those here live on


def _operator(func: Any) -> _Operator:
    writes: list[int | str] = list(_HIDDEN_WRITES.get(func, ()))
    view = False
    for k, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            writes.append(argument.name if argument.kwarg_only else k)
        elif alias is not None:
            view = True
    name = func._schema.name.partition("::")[2]
    returns = func._schema.returns
    in_place = func not in _HIDDEN_WRITES and (
        not returns or any(r.alias_info is not None and r.alias_info.is_write for r in returns)
    )
    functional = out_of_place(func, tuple(writes)) if writes else func
    about = _Operator(
        func,
        tuple(writes),
        in_place,
        view and not writes,
        func is aten.detach.default,
        name in _SHAPES_ALONE,
        name in _LAYOUTS,
        name.startswith("as_strided"),
        on_lists(func),
        is_collective(func),
        functional,
        id(operator_of(functional)) if not name.startswith("as_strided") else 0,
    )
    _OPERATORS[id(func)] = about
    return about


def _about(func: Any) -> _Operator:
    return _OPERATORS.get(id(func)) or _operator(func)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator below autograd.

    Operators made of others may use lazy conjugates, which PyTorch does not resolve inside a dispatch mode (their
    results are wrong there, seen with ``linalg.pinv`` in 2.13): for complex operands it is told to.
    """
    for argument in args:
        if type(argument) not in _NUMBERS and isinstance(argument, Tensor) and argument.is_complex():
            include = torch._C._dispatch_tls_local_include_set()
            exclude = torch._C._dispatch_tls_local_exclude_set().remove(_CONJUGATE).remove(_NEGATIVE)
            with torch._C._ForceDispatchKeyGuard(include, exclude):
                return func(*args, **kwargs)
    return func(*args, **kwargs)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a tape while it is active; made and entered by ``hzo.record``.

    Args:
        keep: keep the content of every value, also where code writes over it: for plans that run operations again.
            Without, what PyTorch's own derivatives would save is kept, which is all that rules read.
        lean: ids of operators whose rules read no more than PyTorch's own derivative saves. What only they touch, and
            nobody else holds any more, is released while the recording runs.
    """

    supports_higher_order_operators = True

    def __init__(self, keep: bool = False, lean: Collection[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.keeps_all = keep
        self.hooks_off = False  # whether autograd does not tell what it saves just now
        self.hooks_were_off = False  # whether that was ever so
        self._lean = frozenset() if keep else frozenset(lean)
        self._candidates: list[int] = []  # results of lean calls that nothing is known to need
        self._enough = _CANDIDATES  # as many of them are worth a look
        self._needed: set[int] = set()  # values that some other call touches
        self._older: dict[int, list[int]] = {}  # id of a tensor -> its values before the newest
        self._results_of_last: tuple[int | None, ...] = ()
        self._values_before = 0  # values that there were when the last operation was recorded: others no one reads yet
        self.applying: Any = None  # the custom Function whose ``apply`` is seen just now
        self.unseen: dict[int, Callable[[Tensor], int]] = {}  # by the id of others' nodes: the value of a result
        self.wrappers: list[nn.Module] = []  # of distributed training, whose hooks average gradients
        self.hooked: list[Tensor] = []  # tensors with hooks
        self.alive: dict[int, Tensor] = {}  # by id: tensors whose ids are in use
        self.unnoted: list[int] = []  # ids of those that nobody has looked at where they lie in memory
        self._saved: set[int] = set()  # values whose content must survive a write
        self._versions: dict[int, int] = {}  # of values, when the block was over
        self._unpacked: list[int] = []  # values that autograd asked back, for a derivative inside the model
        self._unpacking: tuple[int, int] | None = None  # what autograd asked back last: id of its tensor, value
        self._detached: dict[int, int] = {}  # id of a tensor that autograd detached -> the value behind it
        self._frozen: set[int] = set()  # ids of views of parameters that are not trained
        self._packed_ids: dict[int, int] = {}  # id and address of what autograd saved under another object
        self._copies: list[tuple[Tensor, Tensor]] = []  # tensors that were just cloned, and their copies
        self._fresh: set[int] = set()  # storages of constants that were made meanwhile
        self._resolved: set[int] = set()  # ids of copies of lazy conjugates, which PyTorch makes below autograd
        self.undo = Undo()
        self.memory = Memory(self)
        self._stale, self._passed = self.memory.stale, self.memory.passed
        self.paused = False  # what runs is inside one operation
        self.touched: dict[int, Tensor] = {}  # trainable tensors that it has used
        self.opaque: Callable[[nn.Module], str | None] | None = None  # the name of a module that is one operation
        self.taint: dict[int, Tensor] | None = None  # storages of what depends on the tensors followed, kept alive
        self.history: History | None = None  # of tensors whose inputs stand in for data
        self.altered: Callable[[int, Tensor], Tensor] | None = None  # what an operation hands on in place of a result
        self.after_calls: Callable[[], None] | None = None  # called when operations were appended

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Mark as tainted, from here on, whatever is computed from these tensors."""
        self.taint = {storage_of(t): t for t in tensors}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap every call of ``__torch_dispatch__``, and import its compiler (seconds) for that."""
        return False

    # -- values -------------------------------------------------------------------------------------------------------

    def new_value(self, tensor: Tensor, requires: bool, producer: int, weight: bool) -> int:
        """A value for what ``tensor`` holds now."""
        if tensor.is_nested:
            raise TapeError(NESTED)
        if requires and type(tensor) not in _PLAIN and _wraps(tensor):
            if type(tensor).__name__ == "AsyncCollectiveTensor":
                raise collective_in(_CARRIES, "torch.distributed._functional_collectives", _BY_FUNCTION)
            raise TapeError(
                f"a {type(tensor).__name__}, a tensor that wraps others, carries a gradient, which hzo does not "
                "follow; compute with the tensors inside of it"
            )
        tape = self.tape
        index = len(tape.values)
        if self.taint is not None and producer < 0 and storage_of(tensor) in self.taint:
            tape.tainted.add(index)
        tape.values.append(Value(tensor.shape, tensor.dtype, tensor.device, requires, producer, weight))
        tape.tensors.append(tensor)
        key = id(tensor)
        before = tape._index.get(key)
        if before is not None:
            self._older.setdefault(key, []).append(before)
        tape._index[key] = index
        self.alive[key] = tensor
        self.unnoted.append(key)
        return index

    def expect(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, producer: int) -> int:
        """A value whose tensor comes by later (``bind``)."""
        self.tape.values.append(Value(shape, dtype, device, True, producer, False))
        self.tape.tensors.append(None)
        return len(self.tape.values) - 1

    def bind(self, tensor: Tensor, index: int) -> None:
        """Say of a tensor which value it holds."""
        self.tape._index[id(tensor)] = index
        self.keep_alive(tensor)
        if self.tape.tensors[index] is None:
            self.tape.tensors[index] = tensor

    def keep_alive(self, tensor: Tensor) -> None:
        """Note a tensor by its id, which must not come again for another."""
        key = id(tensor)
        self.alive[key] = tensor
        self.unnoted.append(key)

    def forget(self, key: int) -> None:
        """A tensor was freed all the same: its id may come again, for another."""
        self.memory.forget(key)
        self._older.pop(key, None)
        self.tape._index.pop(key, None)
        self._detached.pop(key, None)
        self._frozen.discard(key)
        self._resolved.discard(key)

    def read(self, tensor: Tensor) -> int:
        """The value that a tensor holds now."""
        key = id(tensor)
        index = self.tape._index.get(key)
        if index is not None and key not in self._stale and key not in self._passed:
            value = self.tape.values[index]
            if value.requires is requires_grad(tensor) or key in self._resolved:
                return index
        return self._read_anew(tensor, index)

    def stands_in(self, tensor: Tensor) -> bool:
        """Whether a tensor that requires a gradient does so for inputs alone that stand in for data (``history``)."""
        if self.history is None:
            return False
        key = id(tensor)
        unknown = key not in self.tape._index and self.memory.has_content(tensor)
        if unknown or key in self._stale or key in self._passed:  # written to: it may hang on something else now
            self.read(tensor)
        return not self.history.of(tensor)

    def seen(self) -> list[Tensor]:
        """The tensors that have had a value."""
        return [*self.hooked, *self.alive.values()]

    def read_by_derivatives(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Of these tensors those in whose memory lies what a derivative reads: autograd told so, or might not have."""
        values = range(len(self.tape.values)) if self.keeps_all or self.hooks_were_off else self._saved
        held = {storage_of(t) for t in (self.tape.tensors[v] for v in values) if t is not None}
        return [t for t in tensors if storage_of(t) in held]

    def seal(self) -> None:
        """The block is over: note the versions of what is held, as autograd does of what it saves."""
        self._versions = {
            v: tensor._version
            for v, tensor in enumerate(self.tape.tensors)
            if tensor is not None and not tensor.is_inference()
        }

    def is_as_it_was(self, value: int) -> bool:
        """Whether a value's tensor has not been written to in place behind the block."""
        tensor = self.tape.tensors[value]
        return tensor is None or tensor._version == self._versions.get(value, tensor._version)

    def written_since(self) -> int | None:
        """A value that a derivative reads, and that code has written to behind the block; None if there is none."""
        unknown = self.keeps_all or self.hooks_were_off  # what a derivative reads
        looked_at: Iterable[int] = self._versions if unknown else self._saved
        for v in looked_at:
            if not self.is_as_it_was(v):
                return v
        for v, leaf in self.tape.leaves.items():  # which ``.data =`` may make another tensor
            if leaf.shape != self.tape.values[v].shape or leaf.dtype != self.tape.values[v].dtype:
                return v
        return None

    def release(self) -> None:
        """The recording is over: only the tape holds what it recorded, and of that what rules may read."""
        for v in self._candidates:
            if v not in self._needed and v not in self._saved:
                self.tape.tensors[v] = None
        self._candidates = []
        self.alive, self.unnoted, self.hooked, self.unseen = {}, [], [], {}
        self._detached, self._older, self.tape._index = {}, {}, {}
        self.memory.release()

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Keep these alive no longer; whether the user's code does shows when they are freed."""
        for tensor in tensors:
            self.memory.track(tensor)
            self.alive.pop(id(tensor), None)

    def settle(self, tensor: Tensor) -> None:
        """A new value of this tensor is about to be written: what was said of its old content holds no more."""
        self._stale.discard(id(tensor))
        self._passed.discard(id(tensor))

    def _read_anew(self, tensor: Tensor, index: int | None) -> int:
        key = id(tensor)
        if key in self._stale and self.memory.has_content(tensor):
            return self.memory.read_window(tensor)
        if key in self._passed and index is not None:
            self._passed.discard(key)
            return self._passed_through(tensor, index)
        if requires_grad(tensor) and not is_leaf(tensor):
            if index is None:
                return self._unknown(tensor)
            if not self.tape.values[index].requires:
                return self.foreign(tensor)
        # A leaf: a parameter, an input, a constant; or what autograd detached in the meantime.
        if type(tensor) is not Tensor:
            refuse_share(tensor)
        weight = _is_parameter(tensor) or key in self._frozen
        new = self.new_value(tensor, requires_grad(tensor), -1, weight)
        self._stale.discard(key)
        self._passed.discard(key)
        if requires_grad(tensor):
            self.tape.leaves[new] = tensor
        if self._packed_ids and self._packed_ids.get(key) == tensor.data_ptr():
            self._saved.add(new)
        return new

    def _unknown(self, tensor: Tensor) -> int:
        """A tensor with a history that was not recorded under this object."""
        for index in reversed(self._unpacked):
            known = self.tape.tensors[index]
            if known is not None and known.data_ptr() == tensor.data_ptr() and _looks_like(known, tensor):
                self.bind(tensor, index)
                return index
        unseen = self.unseen.get(id(grad_fn(tensor))) if self.unseen else None
        if unseen is not None:
            return unseen(tensor)
        if self.memory.has_content(tensor) or self.memory.reconstruct(tensor):
            return self.memory.read_window(tensor)
        return self.foreign(tensor)

    def foreign(self, tensor: Tensor, what: str = "") -> int:
        """A value whose history is not on the tape: a gradient that leads there is an error, which says ``what``."""
        index = self.new_value(tensor, True, -1, False)
        self.tape.values[index].foreign = what or _unrecorded(tensor)
        return index

    def operation(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        writes: tuple[int | None, ...] = (),
    ) -> Operation:
        """Append an operation."""
        if self.after_calls is not None:
            self.after_calls()
        self._values_before = len(self.tape.values)
        operation = Operation(len(self.tape.operations), target, args, kwargs, writes)
        self.tape.operations.append(operation)
        return operation

    # -- calls --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        about = _OPERATORS.get(id(func))
        if about is None:
            if isinstance(func, torch._ops.HigherOrderOperator):  # inside of a Function, which is what is recorded
                return func(*args, **kwargs)
            about = _operator(func)
        if about.collective:
            return self._collective(func, args, kwargs)
        if self.paused:
            self._touch(args)
            return func(*args, **kwargs)
        if self.after_calls is not None:
            self.after_calls()
        if self.taint is None:
            return self._dispatch(func, about, args, kwargs)
        tainted = any(storage_of(t) in self.taint for t in (*_tensors(args), *_tensors(tuple(kwargs.values()))))
        result = self._dispatch(func, about, args, kwargs)
        if tainted and not about.constant:
            written = _written(about, args, kwargs) if about.writes else []
            self.taint.update((storage_of(t), t) for t in (*_tensors(result), *written))
        return result

    def _dispatch(self, func: Any, about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if about.detach:
            return self._detach(func, args, kwargs)
        self._unpacking = None
        differentiable = (
            not about.constant
            and torch.is_grad_enabled()
            and (
                _requires(args)
                or (bool(kwargs) and _requires(tuple(kwargs.values())))
                or (bool(self._resolved) and any(id(t) in self._resolved for t in _tensors(args)))
            )
        )
        copies = self._copies
        if copies:
            self._copies = []
        if kwargs and (generator := kwargs.get("generator")) is not None:
            self.undo.remember_generator(generator)
        if about.writes:
            if differentiable and about.on_lists:
                for single in singles(func, args, kwargs):
                    self._write(single[0], _about(single[0]), single[1], single[2], True, copies)
                return None
            return self._write(func, about, args, kwargs, differentiable, copies)
        if func is _CLONE:
            return self._clone(args, kwargs, differentiable, copies)
        if differentiable:
            return self._call(func, about, args, kwargs)
        return self._constant(func, about, args, kwargs)

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A collective is no operation of the tape: as for autograd, what it returns is data.

        An error where its result would carry a gradient all the same, which no rule could take to other processes, and
        where queries would run it again. Inside of a custom Function, which has a backward of its own, it runs as ever.
        """
        if self.history is not None and (self.paused or self.applying is not None):
            raise collective_in(
                "a custom Function or an operation that hzo does not look into, of which a plan asks queries",
                func,
                "processes would perturb its result all at once. Leave out plan and options: hzo.backward(model, "
                "loss_fn, x, y), which takes the backward of a custom Function",
            )
        # Those of c10d write to their first argument, but for send; others return what they made.
        carries = args if func.namespace != "c10d" else args[:1] if "send" not in func._schema.name else ()
        if not self.paused and torch.is_grad_enabled() and _requires(carries):
            raise collective_in(_CARRIES, func, _BY_FUNCTION)
        return func(*args, **kwargs)

    def _constant(self, func: Any, about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that autograd does not differentiate and that writes to nothing: no trace of it."""
        if func is _EFFICIENT_ZEROS:  # forward mode: calls with these go below autograd, and unseen
            func = aten.zeros.default
        result = _run(func, args, kwargs)
        if self.keeps_all and func._schema.name in _UNINITIALIZED:  # what is compared later must not be chance
            result.zero_()
        if about.view:
            if isinstance(args[0], Tensor):
                self._constant_view(args[0], result)
        elif isinstance(result, Tensor):
            self._fresh.add(storage_of(result))
        elif result is not None:
            self._fresh.update(storage_of(t) for t in _tensors(result))
        return result

    def _call(self, func: Any, about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that autograd differentiates and that writes to nothing."""
        if about.on_lists:
            return [
                self._call(single[0], _about(single[0]), single[1], single[2]) for single in singles(func, args, kwargs)
            ]
        reads: list[int] = []
        refs = self._refs(args, reads)
        named = self._named(kwargs, reads)
        if self.keeps_all:
            self._remember_state(func, args)
        result = _run(func, args, kwargs)
        if self.altered is not None and isinstance(result, Tensor):
            result = self.altered(len(self.tape.operations), result)
        op = self._restrided(func, refs, args, kwargs, result) if about.restrides else self.operation(func, refs, named)
        self._made(about, op, reads, result)
        return result

    def _remember_state(self, func: Any, args: tuple[Any, ...]) -> None:
        """Kernels that draw inside: whoever runs one again needs the numbers of the first time."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            devices = dict.fromkeys(t.device for t in _tensors(args))
            self.tape.states[len(self.tape.operations)] = OperationState(random_state(devices))

    def _touch(self, args: tuple[Any, ...]) -> None:
        for tensor in _tensors(args):
            if requires_grad(tensor) and is_leaf(tensor):
                self.touched[id(tensor)] = tensor

    def _clone(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], differentiable: bool, copies: list[tuple[Tensor, Tensor]]
    ) -> Any:
        """A copy. Autograd makes one of what a call in place is about to change, and to read a lazy conjugate."""
        func = _CLONE
        source: Tensor = args[0]
        result: Tensor = self._call(func, _about(func), args, kwargs) if differentiable else _run(func, args, kwargs)
        if not differentiable:
            self._fresh.add(storage_of(result))
        elif source.is_conj() or source.is_neg():
            self._resolved.add(id(result))
            self._needed.add(self.tape._index[id(result)])
            if self.tape._index[id(source)] in self._saved:
                self._saved.add(self.tape._index[id(result)])
        self._copies = [*copies, (source, result)]
        return result

    def _restrided(
        self, func: Any, refs: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Operation:
        """``as_strided`` reads memory: on the tape it says how its operand lay there."""
        source = args[0]
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        layout, offset = geometry_of(source), given.get("storage_offset")
        window = tuple(given["size"]), tuple(given["stride"]), layout[2] if offset is None else int(offset)
        if "src" in given:
            return self.operation(restride_scatter, (refs[0], refs[1], layout, *window), {})
        seen = result.detach()
        return self.operation(restride, (refs[0], ref(self.new_value(seen, False, -1, True)), layout, *window), {})

    def _made(self, about: _Operator, op: Operation, reads: list[int], result: Any) -> None:
        """Note what an operation made of the values that it read."""
        weight = self._of_weights(reads)
        if isinstance(result, Tensor):
            op.writes = (self._result(result, op.index, weight),)
        else:
            op.writes = tuple([self._result(r, op.index, weight) for r in flat(result)])
        self._written_down(about, op, reads)

    def _written_down(self, about: _Operator, op: Operation, reads: list[int]) -> None:
        """An operation is complete: what calls of its kind make may be released, or others need what it read."""
        self._results_of_last = op.writes
        if about.rule in self._lean and not self.hooks_off:
            self._candidates += [v for v in op.writes if v is not None]
            if len(self._candidates) >= self._enough:
                self._release_unneeded(op)
        elif self._lean:
            self._needed.update(reads)

    def _of_weights(self, reads: list[int]) -> bool:
        """Whether what is read was computed from parameters alone."""
        values = self.tape.values
        for value in reads:  # noqa: SIM110  a generator would take longer than most lists do
            if not values[value].weight:
                return False
        return True

    def _result(self, tensor: Any, producer: int, weight: bool) -> int | None:
        if not isinstance(tensor, Tensor):
            return None
        dtype = tensor.dtype
        return self.new_value(tensor, dtype.is_floating_point or dtype.is_complex, producer, weight)

    def _refs(self, args: Iterable[Any], reads: list[int]) -> tuple[Any, ...]:
        """Arguments with a reference in place of every tensor; appends the values that these hold to ``reads``."""
        found: list[Any] = []
        for argument in args:
            if type(argument) in _NUMBERS:
                found.append(argument)
            elif isinstance(argument, Tensor):
                value = self.read(argument)
                reads.append(value)
                found.append(ref(value))
            elif isinstance(argument, (list, tuple)):
                numbers = bool(argument) and type(argument[0]) is int  # then all are
                found.append(tuple(argument) if numbers else self._refs(argument, reads))
            else:
                found.append(argument)
        return tuple(found)

    def _named(self, kwargs: dict[str, Any], reads: list[int]) -> dict[str, Any]:
        return dict(zip(kwargs, self._refs(kwargs.values(), reads), strict=True)) if kwargs else {}

    def _detach(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A detached tensor is a constant; what autograd saves of a result comes by here, too."""
        result: Tensor = func(*args, **kwargs)
        key = id(args[0])
        unpacking, self._unpacking = self._unpacking, None
        if unpacking is not None and unpacking[0] == key:  # autograd gives it its history back, also that of a leaf
            self.tape._index[id(result)] = unpacking[1]
            self.keep_alive(result)
            return result
        behind = self._detached.get(key, self.tape._index.get(key))
        if behind is not None:
            self._detached[id(result)] = behind
            self.keep_alive(result)
        elif _is_parameter(args[0]) or key in self._frozen:
            self._constant_view(args[0], result)
        return result

    def _constant_view(self, source: Tensor, result: Any) -> None:
        """A view of a parameter that is not trained is a weight as well."""
        if _is_parameter(source) or id(source) in self._frozen:
            for tensor in _tensors(result):
                self._frozen.add(id(tensor))
                self.keep_alive(tensor)

    def _release_unneeded(self, op: Operation) -> None:
        """Release what lean calls made, autograd did not save, and the user's code has dropped."""
        tape, last = self.tape, set(op.writes)
        kept: list[int] = []
        dropped: list[Tensor] = []
        for v in self._candidates:
            tensor = tape.tensors[v]
            if tensor is None or v in self._needed or v in self._saved:
                continue
            # Known by the tape, by the list of tensors that are alive, and here; one more is the call's argument.
            if sys.getrefcount(tensor) > 4 or v in last or tape._index.get(id(tensor)) != v:
                kept.append(v)
                continue
            tape.tensors[v] = None
            dropped.append(tensor)
        self._candidates = kept
        self._enough = len(kept) + _CANDIDATES  # what was kept is not looked at again for every call
        while dropped:
            key = id(dropped[-1])
            for known in (self.alive, self._older, self._detached, tape._index):
                known.pop(key, None)
            self._frozen.discard(key)
            self._resolved.discard(key)
            dropped.pop()

    # -- what autograd saves ------------------------------------------------------------------------------------------

    def packer(self) -> Any:
        """The function that autograd calls with what it saves: that is on the tape already, its number is enough.

        Autograd's nodes keep the function, and tensors on the tape their nodes: it must not lead back to the tape.
        """
        behind = weakref.ref(self)
        index_of, values = self.tape._index, self.tape.values
        stale, passed, detached, saved = self._stale, self._passed, self._detached, self._saved

        def pack(tensor: Tensor) -> int:
            key = id(tensor)
            index = index_of.get(key)
            if (
                index is None
                or values[index].requires is not requires_grad(tensor)
                or key in stale
                or key in passed
                or key in detached
            ):
                recorder = behind()
                assert recorder is not None
                index = recorder._packed(tensor, index)
            saved.add(index)
            return index

        return pack

    def _packed(self, tensor: Tensor, known: int | None) -> int:
        """The same where what the tensor holds is not simply what is ``known`` of it."""
        key = id(tensor)
        index = self._detached.get(key)
        if index is None and known is not None and known in self._results_of_last:
            return known  # statistics that the call made, to which autograd gives no history
        if index is None and known is None and not _is_parameter(tensor):
            for v in self._results_of_last:  # a result comes as another object with the same content
                result = None if v is None else self.tape.tensors[v]
                if result is not None and _looks_like(result, tensor) and result.data_ptr() == tensor.data_ptr():
                    index = v
        if index is None:
            return self.read(tensor)
        self._packed_ids[key] = tensor.data_ptr()  # it may be the user's own, and be read as a constant next
        return index

    def unpack(self, index: int) -> Tensor:
        """What a derivative inside the model asks back."""
        self._unpacked.append(index)
        if self.tape.tensors[index] is None and current_recorder() is not self:
            raise TapeError(
                "autograd went into what hzo recorded, behind the sweep that released it. Where a backward of yours "
                "takes a derivative of what was recorded, say tape.backward(loss, retain_graph=True). Where the loss "
                "was made of a tensor that a module made by hzo.module left elsewhere (a forward hook's list, a "
                "global), return it, or keep it in an attribute of the module"
            )
        tensor = self.tape.tensor(index)
        if self.tape.values[index].requires:
            self._unpacking = id(tensor), index
        return tensor

    # -- writes -------------------------------------------------------------------------------------------------------

    def _write(
        self,
        func: Any,
        about: _Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        differentiable: bool,
        copies: list[tuple[Tensor, Tensor]],
    ) -> Any:
        """A call that changes some of its arguments."""
        written = _written(about, args, kwargs)
        if about.layout:
            return self._relayout(func, about, args, kwargs, written[0], differentiable)
        if not differentiable:
            self._before_write(written)
            result = _run(func, args, kwargs)
            self._after_hidden_write(written)
            return result
        if not about.in_place:  # statistics that a layer keeps, noise that a call draws: read as they are afterwards
            lone = self._before_write(written, read=False)
            if self.keeps_all:
                self._remember_state(func, args)
            result = self._drawn(func, args, kwargs)
            self._after_hidden_write([t for t in written if not (id(t) in lone and self._is_saved_for_next(t))])
            reads: list[int] = []
            op = self.operation(about.functional, self._refs(args, reads), self._named(kwargs, reads))
            self._made(about, op, reads, result)
            return result
        reads = []
        refs, named = self._refs(args, reads), self._named(kwargs, reads)
        lone = [not self.keeps_all and not self.hooks_off and alone(t) for t in written]
        if not all(lone):
            self.memory.register()
        shared = [not one and self.memory.content_before(t) for t, one in zip(written, lone, strict=True)]
        self._keep_saved_copies(written, copies)
        self._before_write(written)
        result = self._drawn(func, args, kwargs)
        op = self.operation(about.functional, refs, named)
        weight = self._of_weights(reads)
        results = [t for t in _tensors(result) if all(t is not w for w in written)] + written
        op.writes = tuple([self._result(t, op.index, weight) for t in results])
        for tensor, put, one in zip(written, shared, lone, strict=True):
            if overlaps_itself(tensor.shape, tensor.stride()):
                self.foreign(tensor, WRITTEN_TWICE)
            if one and alone(tensor):
                self.settle(tensor)
            else:
                self.memory.register()
                self.memory.after_write(tensor, put)
        self._written_down(about, op, reads)
        return result

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that writes. The noise that it draws autograd saves before, and means what it is afterwards."""
        noise = self.tape._index.get(id(args[1])) if func in _DRAWS_NOISE else None
        result = _run(func, args, kwargs)
        if noise is not None:
            self.tape.tensors[noise] = args[1]
        return result

    def _relayout(
        self, func: Any, about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, record: bool
    ) -> Any:
        """A call that gives a tensor another shape in the same memory."""
        reads: list[int] = []
        refs = self._refs(args, reads) if record else ()
        self.memory.register()
        self.memory.before_relayout(tensor)
        layout = geometry_of(tensor)
        result = func(*args, **kwargs)
        for key, _ in self.memory.sharing(tensor):
            self._detached.pop(key, None)
        if not record:
            self.tape._index.pop(id(tensor), None)
            self.settle(tensor)
            return result
        if about.restrides:
            shown = ref(self.new_value(tensor.detach(), False, -1, True))
            op = self.operation(restride, (refs[0], shown, layout, *geometry_of(tensor)), {})
        else:
            op = self.operation(about.functional, refs, self._named(kwargs, reads))
        op.writes = (self._result(tensor, op.index, self.tape.values[refs[0].value].weight),)
        return result

    def _before_write(self, written: list[Tensor], read: bool = True) -> list[int]:
        """Keep what must survive of the content that is about to change; ``read``: whether the call reads that.

        Returns the ids of tensors that share their memory with no other one.
        """
        shared: list[Tensor] = []
        lone: list[int] = []
        for tensor in written:
            if self._before_lone_write(tensor, read):
                lone.append(id(tensor))
            else:
                shared.append(tensor)
        if not shared:
            return lone
        self.memory.register()
        index, values = self.tape._index, self.tape.values
        for tensor in shared:
            keys = [key for key, _ in self.memory.sharing(tensor)]
            known = [key for key in keys if key in index]
            if storage_of(tensor) not in self._fresh and (
                not known or any(values[index[key]].producer < 0 for key in known)  # views of it were made meanwhile
            ):
                self.undo.remember(tensor)
            for key in keys:
                self._detached.pop(key, None)
                self._packed_ids.pop(key, None)
            self.memory.before_write(tensor, self._saved)
        return lone

    def _is_saved_for_next(self, tensor: Tensor) -> bool:
        """Whether the newest value of a tensor is what autograd saved of it for the call that runs just now."""
        value = self.tape._index.get(id(tensor))
        return value is not None and value >= self._values_before and value in self._saved

    def _before_lone_write(self, tensor: Tensor, read: bool) -> bool:
        """The same for a tensor that shares its memory with no other one; returns whether it is such a tensor.

        Most writes are to those (statistics, activations in place), and nobody else has to be looked for.
        """
        if self.keeps_all or self.hooks_off or not alone(tensor):
            return False
        key, tensors = id(tensor), self.tape.tensors
        newest = self.tape._index.get(key)
        if (newest is None or self.tape.values[newest].producer < 0) and storage_of(tensor) not in self._fresh:
            self.undo.remember(tensor)
        self._detached.pop(key, None)
        self._packed_ids.pop(key, None)
        shown_by = self._older.pop(key, [])
        if newest is not None:
            shown_by.insert(0, newest)
        for value in shown_by:
            if tensors[value] is not tensor:
                continue
            if value not in self._saved:
                tensors[value] = None
            elif read or value < self._values_before:
                tensors[value] = tensor.clone()
            elif value != newest:  # autograd saved it for this very call, and means what it is afterwards
                self._older.setdefault(key, []).append(value)
        return True

    def _keep_saved_copies(self, written: list[Tensor], copies: list[tuple[Tensor, Tensor]]) -> None:
        """Where its derivative needs what a call in place is about to change, autograd saves a copy: keep that."""
        if self.keeps_all:
            return
        index, tensors = self.tape._index, self.tape.tensors
        for source, copy in copies:
            saved = index.get(id(copy))
            if saved is not None and saved in self._saved and any(source is t for t in written):
                self._saved.add(index[id(source)])
                tensors[index[id(source)]] = tensors[saved]

    def _after_hidden_write(self, written: list[Tensor]) -> None:
        for tensor in written:
            if not self.keeps_all and alone(tensor):
                self.memory.content_changed(id(tensor), tensor)
            else:
                self.memory.register()
                self.memory.after_hidden_write(tensor)

    def _passed_through(self, tensor: Tensor, old: int) -> int:
        constant = self.new_value(tensor, False, -1, False)
        op = self.operation(pass_through, (ref(old), ref(constant)), {})
        new = self.new_value(tensor, True, op.index, self.tape.values[old].weight)
        op.writes = (new,)
        return new


def current_recorder() -> Recorder | None:
    """The innermost recorder that is active in this thread, or None."""
    for k in range(_len_torch_dispatch_stack() - 1, -1, -1):
        mode = _get_dispatch_stack_at(k)
        if isinstance(mode, Recorder):
            return None if mode.paused else mode
    return None


def _written(about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes."""
    return [
        tensor
        for slot in about.writes
        for tensor in _tensors(args[slot] if isinstance(slot, int) and slot < len(args) else kwargs.get(str(slot)))
    ]


def _unrecorded(tensor: Tensor) -> str:
    """What made a tensor whose history the recording has not seen, and the way on."""
    node = grad_fn(tensor)
    function = "an unknown function" if node is None else type(node).__name__
    if function == "CppFunction":
        return (
            "TorchScript, whose executor has begun to differentiate by itself (it does after some runs with autograd); "
            "flush what it has compiled, scripted._debug_flush_compilation_cache(), or train by hzo from the start"
        )
    custom = getattr(node, "_forward_cls", None)
    if custom is not None:
        name = custom.__qualname__
        return (
            f"{function}, the custom Function {name}, which ran before the recording began or in another thread; begin "
            "the recording earlier (hzo.record around all that has a part in the loss), or detach the tensor where its "
            "history does not matter"
        )
    return (
        f"{function}, which ran before the recording began, in another thread, or in code that PyTorch does not show; "
        "begin the recording earlier (hzo.record around all that has a part in the loss), or detach the tensor where "
        "its history does not matter"
    )


def _wraps(tensor: Tensor) -> bool:
    """Whether calls of this tensor go on to others inside of it, where autograd does not see them."""
    kind = type(tensor)
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl and not issubclass(kind, nn.Parameter)


def _is_parameter(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)  # the second takes time for plain tensors


def _looks_like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _requires(args: Iterable[Any]) -> bool:
    for argument in args:
        if type(argument) in _NUMBERS:
            continue
        if isinstance(argument, Tensor):
            if requires_grad(argument):
                return True
        elif isinstance(argument, (list, tuple)) and _requires(argument):
            return True
    return False


def flat(result: Any) -> list[Any]:
    """Results in order: of a call that returns one, several, or lists of them."""
    if not isinstance(result, (list, tuple)):
        return [result]
    found: list[Any] = []
    for item in result:
        if isinstance(item, (list, tuple)):
            found += flat(item)
        else:
            found.append(item)
    return found


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [leaf for leaf in flat(argument) if isinstance(leaf, Tensor)]
