"""Recording: every call of an ATen operator that autograd would differentiate becomes an operation of the tape.

The recorder is a dispatch mode: it sees calls below autograd, in the order in which they run, whatever was written above
them (layers, functionals, TorchScript, ``vmap``, in-place code). What is constant is what autograd says is constant: a
call without an argument that requires a gradient, or under ``no_grad``, runs and leaves no trace, and its result is a
constant when a recorded call reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from hzo.errors import TapeError
from hzo.tape.aliases import Geometry, constant_content, geometry_of, pass_through, read_window, write_window
from hzo.tape.functions import out_of_place
from hzo.tape.opaque import Form, Opaque, State, random_state
from hzo.tape.operations import Operation, Value, ref
from hzo.tape.tape import Tape
from hzo.tape.undo import Undo

aten = torch.ops.aten

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


@dataclass(frozen=True)
class _Operator:
    """What the schema of an operator says, looked up once."""

    writes: tuple[int | str, ...]  # positions or names of the arguments that it changes
    in_place: bool  # returns what it changed, or nothing
    view: bool
    detach: bool
    constant: bool  # reads shapes alone: its result carries no gradient
    functional: Callable[..., Any]


_OPERATORS: dict[Any, _Operator] = {}


def _operator(func: Any) -> _Operator:
    writes: list[int | str] = list(_HIDDEN_WRITES.get(func, ()))
    view = False
    for k, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            writes.append(argument.name if argument.kwarg_only else k)
        elif alias is not None:
            view = True
    returns = func._schema.returns
    in_place = func not in _HIDDEN_WRITES and (
        not returns or any(r.alias_info is not None and r.alias_info.is_write for r in returns)
    )
    about = _Operator(
        tuple(writes),
        in_place,
        view and not writes,
        func is aten.detach.default,
        func._schema.name.partition("::")[2] in _SHAPES_ALONE,
        out_of_place(func, tuple(writes)) if writes else func,
    )
    _OPERATORS[func] = about
    return about


class Recorder(TorchDispatchMode):
    """Writes a tape while it is active; made and entered by ``hzo.record``.

    Args:
        keep: keep the content of every value, also where code writes over it: for plans that run operations again.
            Without, what PyTorch's own derivatives would save is kept, which is all that rules read.
    """

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.tape = Tape()
        self._keep_all = keep
        self._alive: list[Tensor] = []  # whose ids are in use
        self._saved: set[int] = set()  # values whose content must survive a write
        self._unpacked: list[int] = []  # values that autograd asked back, for a derivative inside the model
        self._unpacking: tuple[int, int] | None = None  # what autograd asked back last: id of its tensor, value
        self._detached: dict[int, int] = {}  # id of a tensor that autograd detached -> the value behind it
        self._frozen: set[int] = set()  # ids of views of parameters that are not trained
        self._storages: dict[int, list[int]] = {}  # storage -> ids of tensors with values, in order
        self._objects: dict[int, Tensor] = {}  # id -> the tensor
        self._registered = 0
        self._contents: dict[int, int] = {}  # storage -> value of its content, once windows of it were written to
        self._stale: set[int] = set()  # ids whose value must be read from that content
        self._passed: set[int] = set()  # ids whose content changed under no_grad
        self._fresh: set[int] = set()  # storages of constants that were made meanwhile
        self._resolved: set[int] = set()  # ids of copies of lazy conjugates, which PyTorch makes below autograd
        self.undo = Undo()
        self.paused = False  # what runs is inside one operation
        self._touched: dict[int, Tensor] = {}  # trainable tensors that it has used
        self.opaque: Callable[[nn.Module], str | None] | None = None  # the name of a module that is one operation
        self._taint: dict[int, Tensor] | None = None  # storages of what depends on the tensors followed, kept alive
        self.altered: Callable[[int, Tensor], Tensor] | None = None  # what an operation hands on in place of a result

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Mark as tainted, from here on, whatever is computed from these tensors."""
        self._taint = {_storage(t): t for t in tensors}

    # -- values -------------------------------------------------------------------------------------------------------

    def new_value(self, tensor: Tensor, requires: bool, producer: int, weight: bool) -> int:
        """A value for what ``tensor`` holds now."""
        tape = self.tape
        index = len(tape.values)
        if producer < 0 and self._taint is not None and _storage(tensor) in self._taint:
            tape.tainted.add(index)
        tape.values.append(Value(tensor.shape, tensor.dtype, requires, producer, weight))
        tape.tensors.append(tensor)
        key = id(tensor)
        tape._index[key] = index
        self._alive.append(tensor)
        return index

    def read(self, tensor: Tensor) -> int:
        """The value that a tensor holds now."""
        key = id(tensor)
        index = self.tape._index.get(key)
        if index is not None and key not in self._stale and key not in self._passed:
            value = self.tape.values[index]
            if value.requires is tensor.requires_grad or key in self._resolved:
                return index
        return self._read_anew(tensor, index)

    def seen(self) -> list[Tensor]:
        """The tensors that have had a value."""
        return self._alive

    def settle(self, tensor: Tensor) -> None:
        """A new value of this tensor is about to be written: what was said of its old content holds no more."""
        self._stale.discard(id(tensor))
        self._passed.discard(id(tensor))

    def _read_anew(self, tensor: Tensor, index: int | None) -> int:
        key = id(tensor)
        if key in self._stale and _storage(tensor) in self._contents:
            return self._read_window(tensor)
        if key in self._passed and index is not None:
            self._passed.discard(key)
            return self._passed_through(tensor, index)
        if index is not None and tensor.requires_grad and not tensor.is_leaf and not self.tape.values[index].requires:
            return self._foreign(tensor)
        if index is None and tensor.requires_grad and not tensor.is_leaf:
            return self._unknown(tensor)
        if index is None and self._contents and _storage(tensor) in self._contents and tensor.requires_grad:
            return self._read_window(tensor)
        # A leaf: a parameter, an input, a constant; or what autograd detached in the meantime.
        weight = isinstance(tensor, nn.Parameter) or key in self._frozen
        new = self.new_value(tensor, tensor.requires_grad, -1, weight)
        self._stale.discard(key)
        self._passed.discard(key)
        if tensor.requires_grad:
            self.tape.leaves[new] = tensor
        return new

    def _unknown(self, tensor: Tensor) -> int:
        """A tensor with a history that was not recorded under this object."""
        for index in reversed(self._unpacked):
            known = self.tape.tensors[index]
            if known is not None and known.data_ptr() == tensor.data_ptr() and _looks_like(known, tensor):
                self.tape._index[id(tensor)] = index
                self._alive.append(tensor)
                return index
        storage = _storage(tensor)
        if storage in self._contents:
            return self._read_window(tensor)
        self._register()
        if any(self.tape.values[self.tape._index[key]].requires for key in self._storages.get(storage, ())):
            self._contents[storage] = self._content(tensor, storage)
            return self._read_window(tensor)
        return self._foreign(tensor)

    def _foreign(self, tensor: Tensor) -> int:
        index = self.new_value(tensor, True, -1, False)
        function = tensor.grad_fn
        self.tape.values[index].foreign = "an unknown function" if function is None else type(function).__name__
        return index

    def operation(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        writes: tuple[int | None, ...] = (),
    ) -> Operation:
        """Append an operation."""
        operation = Operation(len(self.tape.operations), target, args, kwargs, writes)
        self.tape.operations.append(operation)
        return operation

    # -- calls --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            self._touch(args)
            return func(*args, **kwargs)
        if self._taint is None:
            return self._call(func, args, kwargs)
        operands = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        tainted = any(_storage(t) in self._taint for t in operands)
        result = self._call(func, args, kwargs)
        about = _OPERATORS[func]
        if tainted and not about.constant:
            written = _written(about, args, kwargs) if about.writes else []
            self._taint.update((_storage(t), t) for t in (*_tensors(result), *written))
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        about = _OPERATORS.get(func) or _operator(func)
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
        if about.writes:
            generator = kwargs.get("generator")
            if generator is not None:
                self.undo.remember_generator(generator)
            return self._write(func, about, args, kwargs, differentiable)
        if not differentiable:
            result = func(*args, **kwargs)
            if about.view:
                if isinstance(args[0], Tensor):
                    self._constant_view(args[0], result)
            elif isinstance(result, Tensor):
                self._fresh.add(_storage(result))
            elif result is not None:
                self._fresh.update(_storage(t) for t in _tensors(result))
            return result
        refs, named = self._refs(args), self._named(kwargs)
        self._remember_state(func, args)
        result = func(*args, **kwargs)
        if self.altered is not None and isinstance(result, Tensor):
            result = self.altered(len(self.tape.operations), result)
        op = self.operation(func, refs, named)
        op.writes = self._results(op, result)
        if func is aten.clone.default and (args[0].is_conj() or args[0].is_neg()):
            self._resolved.add(id(result))
        return result

    def _remember_state(self, func: Any, args: tuple[Any, ...]) -> None:
        """Kernels that draw inside: whoever runs one again needs the numbers of the first time."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            devices = dict.fromkeys(t.device for t in _tensors(args))
            self.tape.states[len(self.tape.operations)] = State(random_state(devices))

    # -- calls that are one operation whatever they do inside ---------------------------------------------------------

    def call_opaque(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a callable out of sight, and append it as one operation.

        Raises:
            TapeError: it uses trainable tensors that are not parameters of its own.
        """
        target = Opaque(function, name)
        form, tensors = Form.of(args, kwargs)
        parameters = target.parameters()
        read = tuple([ref(self.read(t)) for t in tensors])
        own = tuple([ref(self.read(p)) for p in parameters])
        state = State(
            random_state(dict.fromkeys(t.device for t in (*tensors, *parameters))),
            tuple((buffer, buffer.clone()) for buffer in target.buffers()),
        )
        self.paused, self._touched = True, {}
        try:
            with _without_hooks():
                result = target.run(form, tensors, parameters)
        finally:
            self.paused = False
        self._check_touched(target, parameters)
        after = random_state(torch.device(d) for d in state.random)
        state = replace(
            state,
            drew=any(not torch.equal(after[d], before) for d, before in state.random.items()),
            moved=any(not torch.equal(buffer, copy) for buffer, copy in state.buffers),
        )
        op = self.operation(target, (form, read, own), {})
        self.tape.states[op.index] = state
        flat_result, structure = pytree.tree_flatten(result)
        writes: list[int] = []
        tainted = self._taint is not None and any(_storage(t) in self._taint for t in tensors)
        for k, leaf in enumerate(flat_result):
            if isinstance(leaf, Tensor):
                made = leaf
                if self.altered is not None:
                    made = self.altered(op.index, made)
                if made.dtype.is_floating_point or made.dtype.is_complex:
                    self.paused = True
                    try:  # no leaf, since code may write to what it is given
                        made = made.requires_grad_().clone()
                    finally:
                        self.paused = False
                flat_result[k] = made
                writes.append(self.new_value(made, made.requires_grad, op.index, False))
                if tainted and self._taint is not None:
                    self._taint[_storage(made)] = made
        op.writes = tuple(writes)
        return pytree.tree_unflatten(flat_result, structure)

    def _touch(self, args: tuple[Any, ...]) -> None:
        for tensor in _tensors(args):
            if tensor.requires_grad and tensor.is_leaf:
                self._touched[id(tensor)] = tensor

    def _check_touched(self, target: Opaque, parameters: list[nn.Parameter]) -> None:
        """Trainable tensors inside that the operation does not answer for would lose their gradient."""
        if getattr(target.function, "hzo_ignores_parameters", False):
            return
        known = {id(p) for p in parameters}
        for key, tensor in self._touched.items():
            if key not in known and (isinstance(tensor, nn.Parameter) or key in self.tape._index):
                raise TapeError(
                    f"{target.name} uses a trainable tensor of shape {tuple(tensor.shape)} that it does not hold, so "
                    "its gradient would be lost; register it as an nn.Parameter of the module that uses it, freeze "
                    "it, or see to its gradient yourself and put its part into hzo.blackbox(f, parameters='ignored')"
                )

    def _results(self, op: Operation, result: Any) -> tuple[int | None, ...]:
        values = self.tape.values
        weight = True
        for v in op.reads():
            if not values[v].weight:
                weight = False
                break
        if isinstance(result, Tensor):
            return (self._result(result, op.index, weight),)
        return tuple([self._result(r, op.index, weight) for r in flat(result)])

    def _result(self, tensor: Any, producer: int, weight: bool) -> int | None:
        if not isinstance(tensor, Tensor):
            return None
        dtype = tensor.dtype
        return self.new_value(tensor, dtype.is_floating_point or dtype.is_complex, producer, weight)

    def _refs(self, args: Iterable[Any]) -> tuple[Any, ...]:
        return tuple([ref(self.read(a)) if isinstance(a, Tensor) else self._refs_of(a) for a in args])

    def _named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: self._refs_of(value) for name, value in kwargs.items()} if kwargs else {}

    def _refs_of(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return ref(self.read(argument))
        if isinstance(argument, (list, tuple)):
            return self._refs(argument)
        return argument

    def _detach(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A detached tensor is a constant; what autograd saves of a result comes by here, too."""
        result: Tensor = func(*args, **kwargs)
        key = id(args[0])
        unpacking, self._unpacking = self._unpacking, None
        if unpacking is not None and unpacking[0] == key:  # autograd gives it its history back, also that of a leaf
            self.tape._index[id(result)] = unpacking[1]
            self._alive.append(result)
            return result
        behind = self._detached.get(key, self.tape._index.get(key))
        if behind is not None:
            self._detached[id(result)] = behind
            self._alive.append(result)
        elif isinstance(args[0], nn.Parameter) or key in self._frozen:
            self._constant_view(args[0], result)
        return result

    def _constant_view(self, source: Tensor, result: Any) -> None:
        """A view of a parameter that is not trained is a weight as well."""
        if isinstance(source, nn.Parameter) or id(source) in self._frozen:
            for tensor in _tensors(result):
                self._frozen.add(id(tensor))
                self._alive.append(tensor)

    # -- what autograd saves ------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """What autograd saves is on the tape already: it keeps the number of the value."""
        key = id(tensor)
        index = self._detached.get(key)
        if index is None:
            index = self.tape._index.get(key) if not tensor.requires_grad or tensor.is_leaf else None
            if index is None or key in self._stale or key in self._passed:
                index = self.read(tensor)
        self._saved.add(index)
        return index

    def unpack(self, index: int) -> Tensor:
        """What a derivative inside the model asks back."""
        self._unpacked.append(index)
        tensor = self.tape.tensor(index)
        if self.tape.values[index].requires:
            self._unpacking = id(tensor), index
        return tensor

    # -- writes -------------------------------------------------------------------------------------------------------

    def _write(
        self, func: Any, about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any], differentiable: bool
    ) -> Any:
        """A call that changes some of its arguments."""
        written = _written(about, args, kwargs)
        self._register()
        if not differentiable:
            self._before_write(written)
            result = func(*args, **kwargs)
            self._changed(written)
            return result
        if not about.in_place:  # statistics that a layer keeps, noise that a call draws: read as they are afterwards
            self._before_write(written)
            self._remember_state(func, args)
            result = func(*args, **kwargs)
            self._changed(written)
            op = self.operation(about.functional, self._refs(args), self._named(kwargs))
            op.writes = self._results(op, result)
            return result
        refs, named = self._refs(args), self._named(kwargs)
        shared = {id(t): self._content_before(t) for t in written}
        self._keep_saved_copy()
        self._before_write(written)
        result = func(*args, **kwargs)
        op = self.operation(about.functional, refs, named)
        values = self.tape.values
        weight = all(values[v].weight for v in op.reads())
        writes: list[int | None] = []
        for tensor in _tensors(result):
            if all(tensor is not w for w in written):
                writes.append(self._result(tensor, op.index, weight))
        for tensor in written:
            self._changed_aliases(tensor, stale=True)
            writes.append(self._result(tensor, op.index, weight))
            self._stale.discard(id(tensor))
            self._passed.discard(id(tensor))
        op.writes = tuple(writes)
        for tensor in written:
            content = shared.get(id(tensor))
            if content is not None:
                self._put(content, tensor)
        return result

    def _before_write(self, written: list[Tensor]) -> None:
        """Keep what must survive of the content that is about to change."""
        tensors, index = self.tape.tensors, self.tape._index
        for tensor in written:
            storage = _storage(tensor)
            keys = self._aliases(tensor)
            if storage not in self._fresh and all(self.tape.values[index[key]].producer < 0 for key in keys):
                self.undo.remember(tensor)
            for key in keys:
                value = index[key]
                held = tensors[value]
                if held is not None and held is self._objects[key]:
                    tensors[value] = held.clone() if self._keep_all or value in self._saved else None
            # Detached aliases of a value are read through the value.

    def _keep_saved_copy(self) -> None:
        """Autograd saves a copy of what a call in place is about to change, where its derivative needs it: keep that."""
        last = self.tape.operations[-1] if self.tape.operations else None
        if last is not None and last.target is aten.clone.default:
            (copied,) = last.reads()
            (copy,) = last.writes
            if copy is not None and copy in self._saved:
                self.tape.tensors[copied] = self.tape.tensors[copy]

    def _changed(self, written: list[Tensor]) -> None:
        """A write that autograd does not see: constants are read anew, what carries a gradient keeps its path."""
        for tensor in written:
            self._changed_aliases(tensor, stale=False)
            key = id(tensor)
            if key in self.tape._index:
                self._forget(key)

    def _forget(self, key: int) -> None:
        if self.tape.values[self.tape._index[key]].requires and self._objects[key].requires_grad:
            self._passed.add(key)
        else:
            del self.tape._index[key]

    def _changed_aliases(self, tensor: Tensor, stale: bool) -> None:
        for key in self._aliases(tensor):
            if key == id(tensor) or key not in self.tape._index:
                continue
            if stale:
                self._stale.add(key)
            else:
                self._forget(key)

    def _passed_through(self, tensor: Tensor, old: int) -> int:
        constant = self.new_value(tensor, False, -1, False)
        op = self.operation(pass_through, (ref(old), ref(constant)), {})
        new = self.new_value(tensor, True, op.index, self.tape.values[old].weight)
        op.writes = (new,)
        return new

    # -- storages -----------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        """Note the storages of all tensors with values; done when a write makes it matter."""
        for tensor in self._alive[self._registered :]:
            key = id(tensor)
            self._objects[key] = tensor
            keys = self._storages.setdefault(_storage(tensor), [])
            if key not in keys:
                keys.append(key)
        self._registered = len(self._alive)

    def _aliases(self, tensor: Tensor) -> list[int]:
        """Ids of the tensors with values that share the memory of this one, itself included."""
        return [key for key in self._storages.get(_storage(tensor), ()) if key in self.tape._index]

    def _content_before(self, tensor: Tensor) -> int | None:
        """The content of the storage as a value, where other tensors may look into it; None where nobody else does."""
        storage = _storage(tensor)
        if storage in self._contents:
            return storage
        others = [key for key in self._aliases(tensor) if key != id(tensor)]
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        if not others and whole and tensor._base is None:
            return None
        self._contents[storage] = self._content(tensor, storage)
        return storage

    def _content(self, tensor: Tensor, storage: int) -> int:
        """A value for the whole content of a storage: its windows that carry a gradient, put into a constant."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        content = constant_content(0 if not self._keep_all else size, tensor)
        if self._keep_all:
            content.copy_(tensor.detach().as_strided((size,), (1,), 0))
        value = self.new_value(content, False, -1, False)
        self.tape.values[value].shape = torch.Size((size,))
        if not self._keep_all:
            self.tape.tensors[value] = None
        for key in self._storages.get(storage, ()):
            index = self.tape._index.get(key)
            if index is None or key in self._stale or not self.tape.values[index].requires:
                continue
            window = self._objects[key]
            if window.dtype == tensor.dtype and 0 not in window.stride():
                value = self._replace(value, self.read(window), geometry_of(window))
        return value

    def _replace(self, content: int, window: int, geometry: Geometry) -> int:
        size, stride, offset = geometry
        op = self.operation(write_window, (ref(content), ref(window), size, stride, offset), {})
        about = self.tape.values[content]
        new = len(self.tape.values)
        requires = about.requires or self.tape.values[window].requires
        self.tape.values.append(Value(about.shape, about.dtype, requires, op.index, False))
        self.tape.tensors.append(None)
        op.writes = (new,)
        if self._keep_all:
            before, put = self.tape.tensors[content], self.tape.tensors[window]
            if before is not None and put is not None:
                self.tape.tensors[new] = write_window(before, put.detach(), size, stride, offset)
        return new

    def _put(self, storage: int, tensor: Tensor) -> None:
        """After a write: the storage's content has this window replaced."""
        self._contents[storage] = self._replace(
            self._contents[storage], self.tape._index[id(tensor)], geometry_of(tensor)
        )

    def _read_window(self, tensor: Tensor) -> int:
        content = self._contents[_storage(tensor)]
        size, stride, offset = geometry_of(tensor)
        if tensor.dtype != self.tape.values[content].dtype:
            return self._foreign(tensor)
        op = self.operation(read_window, (ref(content), size, stride, offset), {})
        new = self.new_value(tensor, tensor.requires_grad, op.index, False)
        op.writes = (new,)
        self._stale.discard(id(tensor))
        return new


def current_recorder() -> Recorder | None:
    """The innermost recorder that is active in this thread, or None."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, Recorder):
            return None if mode.paused else mode
    return None


def hooks_allowed() -> bool:
    """Whether autograd takes hooks on what it saves; transforms of ``torch.func`` do not."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def _without_hooks() -> contextlib.AbstractContextManager[Any]:
    if not hooks_allowed():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _written(about: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes."""
    return [
        tensor
        for slot in about.writes
        for tensor in _tensors(args[slot] if isinstance(slot, int) and slot < len(args) else kwargs.get(str(slot)))
    ]


def _storage(tensor: Tensor) -> int:
    with contextlib.suppress(NotImplementedError, RuntimeError):
        return int(tensor.untyped_storage()._cdata)
    return -id(tensor)  # no storage to share: sparse tensors and wrappers


def _looks_like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _requires(args: Iterable[Any]) -> bool:
    for argument in args:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif isinstance(argument, (list, tuple)) and _requires(argument):
            return True
    return False


def flat(result: Any) -> list[Any]:
    """Results in order: of a call that returns one, several, or lists of them."""
    if isinstance(result, (list, tuple)):
        return [leaf for item in result for leaf in flat(item)]
    return [result]


def _tensors(argument: Any) -> list[Tensor]:
    return [leaf for leaf in flat(argument) if isinstance(leaf, Tensor)]
