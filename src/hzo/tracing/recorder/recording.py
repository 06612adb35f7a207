"""Recording one forward pass: which modules and functions a model calls, on what.

The model runs on real tensors; every torch function that it calls outside a torch layer is seen by a
``TorchFunctionMode``, every torch layer by a patch of ``nn.Module.__call__`` that lasts as long as the recording. So
any Python that does not look at the values of tensors (loops, keyword arguments, helpers) runs as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from hzo.errors import TraceError
from hzo.execution import devices_of, random_state
from hzo.tracing import Attribute, Ref, leaves, map_arguments, tensors_in
from hzo.tracing.recorder.decompositions import decomposition, slow_paths

_READS_VALUES = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__complex__",
    "equal", "allclose", "is_nonzero", "__contains__", "nonzero", "unique", "masked_select", "argwhere",
}  # fmt: skip
_STOPS_GRADIENTS = {"detach", "detach_", "data.__get__"}


class ReadsValuesError(TraceError):
    """The forward pass looks at values, so that its operations depend on the data."""


@dataclass
class Call:
    """One recorded call; argument leaves are ``Ref``, ``Attribute`` or what was passed."""

    target: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: tuple[int, ...]
    mutates: tuple[int, ...]
    random: bool


@dataclass
class Recording:
    """The calls of one forward pass, the tensors they made, and after how many calls each stage ended."""

    calls: list[Call] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    output: Any = None
    stages: list[tuple[str, int]] = field(default_factory=list)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is recorded as one operation rather than looked into."""
    if getattr(module, "hzo_opaque", False) or isinstance(module, torch.jit.ScriptModule):
        return True
    if hasattr(module, "parametrizations"):
        return True
    from_torch = type(module).__module__.startswith(("torch.nn.modules", "torch.ao"))
    childless = next(module.children(), None) is None
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return from_torch and not container and (childless or isinstance(module, nn.MultiheadAttention))


class Recorder(TorchFunctionMode):
    """Records the calls inside ``with recorder.watching():``. Modules in ``opaque`` are recorded as one call each."""

    def __init__(self, model: nn.Module, opaque: frozenset[int]) -> None:
        super().__init__()
        self.recording = Recording()
        self.opaque = opaque
        self.paused = False
        self.stops_gradients: str | None = None
        self.known: dict[int, Ref | Attribute] = {}
        self.varying: set[int] = set()  # values that depend on an input or a parameter
        self.registered: dict[int, Attribute] = {}  # parameters and buffers, whatever happens to them
        self.touched: dict[int, Tensor] = {}  # trainable tensors that opaque calls use
        self.stale: dict[int, str] = {}
        self.keep: list[Any] = []  # identities stay valid while the objects live
        self.names = {id(module): name for name, module in model.named_modules()}
        self.know_tensors_of(model)

    def know_tensors_of(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self.registered:
                    self.registered[id(tensor)] = Attribute(module, name)
                    self.known.setdefault(id(tensor), Attribute(module, name))
                    self.keep.append(tensor)

    def new_value(self, tensor: Tensor, *, varying: bool) -> int:
        index = len(self.recording.tensors)
        self.recording.tensors.append(tensor)
        self.known[id(tensor)] = Ref(index)
        self.stale.pop(id(tensor), None)
        if varying:
            self.varying.add(index)
        return index

    def refer(self, leaf: Any) -> Any:
        """What stands for an argument in the recording."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.stale:
            raise TraceError(self.stale[id(leaf)])
        if leaf.requires_grad and id(leaf) not in self.known:
            raise _lost(leaf)
        return self.known.get(id(leaf), leaf)

    def varies(self, leaf: Any) -> bool:
        noted = self.known.get(id(leaf))
        return isinstance(noted, Attribute) or (isinstance(noted, Ref) and noted.value in self.varying)

    def record(
        self, target: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], own: bool = False
    ) -> Any:
        """Run a call and note it, if it makes or changes a tensor. ``own``: code of the user's, seen from outside."""
        tensors = {p: leaf for p, leaf in enumerate(leaves((args, kwargs))) if isinstance(leaf, Tensor)}
        versions = {p: leaf._version for p, leaf in tensors.items()}
        # NumPy writes where no version counter looks.
        copies = {p: leaf.clone() for p, leaf in tensors.items()} if own else {}
        noted_args, noted_kwargs = map_arguments(self.refer, (args, kwargs))
        before = random_state(devices_of(tensors.values()))
        self.touched.clear()
        with self.unmoved(target, tensors.values(), name):
            result = target(*args, **kwargs)
        after = random_state(devices_of(tensors.values()))
        random = any(not torch.equal(before[device], after[device]) for device in before)
        mutates = tuple(
            p for p, leaf in tensors.items() if leaf._version != versions[p] or (own and not _same(leaf, copies[p]))
        )
        changed = [tensors[p] for p in mutates]
        results = tensors_in(result)
        made = [*results, *(c for c in changed if all(c is not r for r in results))]
        if not made:
            return result
        if own:
            self.refuse_hidden_parameters(target)
        self.mark_aliases(changed, name)
        self.keep.append((args, kwargs, made))
        varying = random or any(self.varies(leaf) for leaf in tensors.values())
        owner = getattr(target, "named_parameters", None)
        varying = varying or (owner is not None and next(iter(owner()), None) is not None)
        writes = tuple(self.new_value(tensor, varying=varying) for tensor in made)
        self.recording.calls.append(Call(target, name, noted_args, noted_kwargs, writes, mutates, random))
        return result

    @contextlib.contextmanager
    def unmoved(self, target: Callable[..., Any], tensors: Iterable[Tensor], name: str) -> Iterator[None]:
        """Raise, and put it back, where a call changes a parameter: queries would move it again and again."""
        held = [p for p in tensors if isinstance(p, nn.Parameter)]
        if isinstance(target, nn.Module):
            held.extend(target.parameters())
        saved = [(p, p._version, p.detach().clone()) for p in held]
        yield
        moved = [(p, copy) for p, version, copy in saved if p._version != version]
        for parameter, copy in moved:
            parameter.data.copy_(copy)
            where = self.registered.get(id(parameter))
            raise TraceError(
                f"{name} changes its parameter {where.name if where else ''!r} in its forward pass (as max_norm does); "
                "do that after the optimizer's step instead"
            )

    def refuse_hidden_parameters(self, target: Callable[..., Any]) -> None:
        """Raise where an opaque call used a trainable tensor that cannot be perturbed through it."""
        if getattr(target, "hzo_ignores_parameters", False):
            return
        held = {id(p) for p in target.parameters()} if isinstance(target, nn.Module) else set()
        for tensor in self.touched.values():
            if id(tensor) not in held:
                raise _lost(tensor, "inside an opaque part")

    def check_buffers(self) -> None:
        """Raise where the model holds another tensor as its buffer than before: queries could not undo that."""
        for where in self.registered.values():
            held = where.owner._buffers.get(where.name)
            if held is not None and id(held) not in self.registered:
                raise TraceError(
                    f"{type(where.owner).__name__} assigns a new tensor to its buffer {where.name!r} in its forward "
                    "pass, which queries cannot undo; change the buffer in place instead (copy_, add_)"
                )

    def mark_aliases(self, changed: list[Tensor], name: str) -> None:
        """Views of a tensor changed in place change with it, which a chain of values cannot express."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in changed}
        if not storages:
            return
        for tensor in (where.get() for where in self.registered.values()):
            shares = tensor.untyped_storage().data_ptr() in storages
            if shares and tensor.numel() and all(tensor is not c for c in changed):
                raise TraceError(
                    f"{name} changes a parameter or buffer of shape {tuple(tensor.shape)} through a view of it; "
                    "change the buffer itself, by index: buffer[0] = value"
                )
        for tensor in self.recording.tensors:
            shares = tensor.untyped_storage().data_ptr() in storages
            if shares and tensor.numel() and all(tensor is not c for c in changed):
                self.stale[id(tensor)] = (
                    f"{name} changes a tensor in place that shares memory with another one in use (a view); "
                    "write to a clone instead, or give the stages by hand: hzo.Chain([f1, f2, ...])"
                )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            self.touched.update({id(t): t for t in tensors_in((args, kwargs)) if t.requires_grad})
            return func(*args, **kwargs)
        name = _name(func)
        if any(self.varies(tensor) for tensor in tensors_in((args, kwargs))):
            self.refuse(name, args, kwargs)
        if name == "__iter__":
            return iter(self.record(Tensor.unbind, "unbind", args, kwargs))
        return self.record(func, name.removesuffix(".__get__"), args, kwargs)

    def refuse(self, name: str, args: Any, kwargs: Any) -> None:
        """Raise for what a chain of operations cannot express."""
        if name in _READS_VALUES:
            raise ReadsValuesError(
                f"the forward pass reads values out of a tensor ({name}), so what it does depends on the data; "
                "make the part that does so a stage of its own: hzo.Chain([f1, f2, ...]), or wrap it in hzo.blackbox"
            )
        if name.endswith("__set__"):
            raise TraceError(
                f"the forward pass assigns to {name.split('.', 1)[0]} of a tensor; use an out-of-place call instead"
            )
        if name in _STOPS_GRADIENTS and any(tensor.is_floating_point() for tensor in tensors_in((args, kwargs))):
            # A detour through NumPy begins the same way; which of the two it is shows by the end of the stage.
            self.stops_gradients = (
                f"the forward pass calls {name.split('.', 1)[0]}: finite differences see through it, autograd does "
                "not; remove it, or make the part that does so a stage of its own and accept that: hzo.blackbox"
            )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        paused, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = paused

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record inside: torch functions by this mode, torch layers as one operation each."""
        original, recorded = nn.Module.__call__, threading.get_ident()

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if self.paused or threading.get_ident() != recorded:
                return original(module, *args, **kwargs)
            inner = getattr(module, "_orig_mod", None)
            if isinstance(inner, nn.Module):  # compiled: the cotangents inside it need its operations
                return __call__(inner, *args, **kwargs)
            if not is_layer(module) and id(module) not in self.opaque:
                self.know_tensors_of(module)
                return original(module, *args, **kwargs)
            parts = decomposition(module, args, kwargs) if id(module) not in self.opaque else None
            if parts is not None:
                self.know_tensors_of(module)
                return parts()
            own = not type(module).__module__.startswith("torch.")
            name = getattr(module, "hzo_box", None) or self.names.get(id(module)) or type(module).__name__
            with self.pause():
                return self.record(module, name, args, kwargs, own)

        nn.Module.__call__ = __call__  # type: ignore[method-assign]
        try:
            with slow_paths(), self:
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


def _lost(tensor: Tensor, where: str = "that no module holds") -> TraceError:
    return TraceError(
        f"the forward pass uses a trainable tensor of shape {tuple(tensor.shape)} {where}, so its gradient would be "
        "lost; register it as an nn.Parameter of the module that uses it, freeze it, or see to its gradient yourself "
        "and put its part into hzo.blackbox(f, parameters='ignored')"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124  # NaN is what differs from itself


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):  # a property: say which
        return f"{getattr(getattr(func, '__self__', None), '__name__', '')}.{name}"
    return (resolve_name(func) or name).rsplit(".", 1)[-1]
