"""Recording: every call of an ATen operator that autograd would differentiate becomes an operation of the tape.

The recorder is a dispatch mode: it sees calls below autograd, in the order in which they run, whatever was written
above them (layers, functionals, TorchScript, ``vmap``, in-place code). What is constant is what autograd says is
constant: a call without an argument that requires a gradient, or under ``no_grad``, runs and leaves no trace, and its
result is a constant when a recorded call reads it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from hzo.tape.aliases import Geometry, constant_content, geometry_of, pass_through, read_window, write_window
from hzo.tape.functions import OutOfPlace, out_of_place
from hzo.tape.operations import Operation, Value, ref
from hzo.tape.tape import Tape
from hzo.tape.undo import Undo

aten = torch.ops.aten

_DRAWS_NOISE = (aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default)

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

_CANDIDATES = 16  # as many results are looked at together


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


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a tape while it is active; made and entered by ``hzo.record``.

    Args:
        keep: keep the content of every value, also where code writes over it: for plans that run operations again.
            Without, what PyTorch's own derivatives would save is kept, which is all that rules read.
        lean: operators whose rules read no more than PyTorch's own derivative saves. What only they touch, and nobody
            else holds any more, is let go while the recording runs.
    """

    def __init__(self, keep: bool = False, lean: Collection[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self._keep_all = keep
        self.hold_all = False  # while autograd does not tell what it saves
        self._lean = frozenset() if keep else frozenset(lean)
        self._candidates: list[int] = []  # results of lean calls that nothing is known to need
        self._needed: set[int] = set()  # values that some other call touches
        self._results_of_last: tuple[int | None, ...] = ()
        self.hooked: list[Tensor] = []  # tensors with hooks
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
        self._dropped: set[int] = set()  # ids that are free again
        self._fresh: set[int] = set()  # storages of constants that were made meanwhile
        self._resolved: set[int] = set()  # ids of copies of lazy conjugates, which PyTorch makes below autograd
        self.undo = Undo()

    # -- values -------------------------------------------------------------------------------------------------------

    def new_value(self, tensor: Tensor, requires: bool, producer: int, weight: bool) -> int:
        """A value for what ``tensor`` holds now."""
        tape = self.tape
        index = len(tape.values)
        tape.values.append(Value(tensor.shape, tensor.dtype, tensor.device, requires, producer, weight))
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
        return [*self.hooked, *self._alive]

    def release(self) -> None:
        """The recording is over: only the tape holds what it recorded."""
        self._alive, self._objects, self.hooked = [], {}, []
        self._storages, self._detached = {}, {}
        self.tape._index = {}

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
        result = func(*args, **kwargs)
        op = self.operation(func, refs, named)
        op.writes = self._results(op, result)
        self._results_of_last = op.writes
        if self._lean:
            self._let_go(op)
        if func is aten.clone.default and (args[0].is_conj() or args[0].is_neg()):
            self._resolved.add(id(result))
            self._needed.update(v for v in op.writes if v is not None)
        return result

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

    def _let_go(self, op: Operation) -> None:
        """Every now and then: forget what lean calls made, autograd did not save, and the user's code has dropped."""
        target = op.target.func if isinstance(op.target, OutOfPlace) else op.target
        if target not in self._lean or self.hold_all:
            self._needed.update(op.reads())
            return
        self._candidates.extend(v for v in op.writes if v is not None)
        if len(self._candidates) < _CANDIDATES:
            return
        tape, last = self.tape, set(op.writes)
        kept: list[int] = []
        for v in self._candidates:
            tensor = tape.tensors[v]
            if tensor is None or v in self._needed or v in self._saved or tensor._is_view():
                continue  # a view takes no memory of its own
            # The tape holds it, the list of those alive, perhaps the one by id, this; one more is the call's argument.
            held = 5 if id(tensor) in self._objects else 4
            if sys.getrefcount(tensor) > held or v in last or tape._index.get(id(tensor)) != v:
                kept.append(v)
                continue
            tape.tensors[v] = None
            self._dropped.add(id(tensor))
            del tape._index[id(tensor)]
        self._candidates = kept
        if self._dropped:
            noted = [t for t in self._alive[: self._registered] if id(t) not in self._dropped]
            self._alive = noted + [t for t in self._alive[self._registered :] if id(t) not in self._dropped]
            self._registered = len(noted)
            for keys in self._storages.values():
                keys[:] = [key for key in keys if key not in self._dropped]
            for key in self._dropped:
                self._objects.pop(key, None)
                self._detached.pop(key, None)
            for ids in (self._frozen, self._stale, self._passed, self._resolved):
                ids.difference_update(self._dropped)
            self._dropped.clear()

    # -- what autograd saves ------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """What autograd saves is on the tape already: it keeps the number of the value."""
        index = self._packed(tensor)
        self._saved.add(index)
        return index

    def _packed(self, tensor: Tensor) -> int:
        key = id(tensor)
        if key not in self.tape._index:
            for index in self._results_of_last:  # a result comes as another object with the same content
                result = None if index is None else self.tape.tensors[index]
                if index is None or result is None or key in self._detached or not _looks_like(result, tensor):
                    continue
                if result.data_ptr() == tensor.data_ptr():
                    return index
        index = self._detached.get(key)
        if index is not None:
            return index
        index = self.tape._index.get(key) if not tensor.requires_grad or tensor.is_leaf else None
        if index is None or key in self._stale or key in self._passed:
            index = self.read(tensor)
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
        written = [
            tensor
            for slot in about.writes
            for tensor in _tensors(args[slot] if isinstance(slot, int) and slot < len(args) else kwargs.get(str(slot)))
        ]
        self._register()
        if not differentiable:
            self._before_write(written)
            result = func(*args, **kwargs)
            self._changed(written)
            return result
        if not about.in_place:  # statistics that a layer keeps, noise that a call draws: read as they are afterwards
            self._before_write(written)
            result = self._drawn(func, args, kwargs)
            self._changed(written)
            op = self.operation(about.functional, self._refs(args), self._named(kwargs))
            op.writes = self._results(op, result)
            self._results_of_last = op.writes
            if self._lean:
                self._let_go(op)
            return result
        refs, named = self._refs(args), self._named(kwargs)
        shared = {id(t): self._content_before(t) for t in written}
        self._keep_saved_copy()
        self._before_write(written)
        result = self._drawn(func, args, kwargs)
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
        op.writes = self._results_of_last = tuple(writes)
        if self._lean:
            self._let_go(op)
        for tensor in written:
            content = shared.get(id(tensor))
            if content is not None:
                self._put(content, tensor)
        return result

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that writes. The noise that it draws autograd saves before, and means what it is afterwards."""
        noise = self.tape._index.get(id(args[1])) if func in _DRAWS_NOISE else None
        result = func(*args, **kwargs)
        if noise is not None:
            self.tape.tensors[noise] = args[1]
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
        """Autograd saves a copy of what a call in place will change, where its derivative needs it: keep that."""
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
        self.tape.values.append(Value(about.shape, about.dtype, about.device, requires, op.index, False))
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
            return mode
    return None


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
