"""Recording one forward pass: which modules and functions a model calls, on what.

The model runs on real tensors; every torch function that it calls outside a torch layer is seen by a
``TorchFunctionMode``, every torch layer by a patch of ``nn.Module.__call__`` that lasts as long as the recording. So
any Python that does not look at the values of tensors (loops, keyword arguments, helpers) runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from hzo.chain import Attribute, Ref, leaves, map_arguments, tensors_in
from hzo.errors import TraceError
from hzo.side_effects import devices_of, random_state

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
        self.stale: dict[int, str] = {}
        self.keep: list[Any] = []  # identities stay valid while the objects live
        self.names = {id(module): name for name, module in model.named_modules()}
        self.know_tensors_of(model)

    def know_tensors_of(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.known.setdefault(id(tensor), Attribute(module, name))

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
        if leaf.requires_grad and leaf.is_leaf and id(leaf) not in self.known:
            raise TraceError(
                f"the forward pass uses a trainable tensor of shape {tuple(leaf.shape)} that no module holds, so its "
                "gradient would be lost; register it as an nn.Parameter"
            )
        return self.known.get(id(leaf), leaf)

    def varies(self, leaf: Any) -> bool:
        noted = self.known.get(id(leaf))
        return isinstance(noted, Attribute) or (isinstance(noted, Ref) and noted.value in self.varying)

    def record(self, target: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call and note it, if it makes or changes a tensor."""
        tensors = {p: leaf for p, leaf in enumerate(leaves((args, kwargs))) if isinstance(leaf, Tensor)}
        versions = {p: leaf._version for p, leaf in tensors.items()}
        noted_args, noted_kwargs = map_arguments(self.refer, (args, kwargs))
        before = random_state(devices_of(tensors.values()))
        result = target(*args, **kwargs)
        after = random_state(devices_of(tensors.values()))
        random = any(not torch.equal(before[device], after[device]) for device in before)
        mutates = tuple(p for p, leaf in tensors.items() if leaf._version != versions[p])
        changed = [tensors[p] for p in mutates]
        results = tensors_in(result)
        made = [*results, *(c for c in changed if all(c is not r for r in results))]
        if not made:
            return result
        self.mark_aliases(changed, name)
        self.keep.append((args, kwargs, made))
        varying = random or any(self.varies(leaf) for leaf in tensors.values())
        owner = getattr(target, "named_parameters", None)
        varying = varying or (owner is not None and next(iter(owner()), None) is not None)
        writes = tuple(self.new_value(tensor, varying=varying) for tensor in made)
        self.recording.calls.append(Call(target, name, noted_args, noted_kwargs, writes, mutates, random))
        return result

    def mark_aliases(self, changed: list[Tensor], name: str) -> None:
        """Views of a tensor changed in place change with it, which a chain of values cannot express."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in changed}
        if not storages:
            return
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
                f"the forward pass calls {name.split('.', 1)[0]}: finite differences see through it, autograd does not; "
                "remove it, or make the part that does so a stage of its own and accept that: hzo.blackbox"
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
        original = nn.Module.__call__

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if self.paused:
                return original(module, *args, **kwargs)
            inner = getattr(module, "_orig_mod", None)
            if isinstance(inner, nn.Module):  # compiled: the cotangents inside it need its operations
                return __call__(inner, *args, **kwargs)
            if not is_layer(module) and id(module) not in self.opaque:
                self.know_tensors_of(module)
                return original(module, *args, **kwargs)
            with self.pause():
                return self.record(module, self.names.get(id(module)) or type(module).__name__, args, kwargs)

        nn.Module.__call__ = __call__  # type: ignore[method-assign]
        try:
            with self:
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):  # a property: say which
        return f"{getattr(getattr(func, '__self__', None), '__name__', '')}.{name}"
    return (resolve_name(func) or name).rsplit(".", 1)[-1]
