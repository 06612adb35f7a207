"""A network that autograd takes for one function: recorded in its forward pass, swept in its backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hzo._compiler import uncompiled
from hzo.distributed import refuse_all_wrappers
from hzo.errors import DerivativeError, InputError, TapeError
from hzo.external.autograd import first_derivative_only
from hzo.reverse import Pullback, recorded_call
from hzo.tape import current_recorder
from hzo.tracing import map_output, output_leaves, tensors_in

M = TypeVar("M", bound=nn.Module)


def module(model: M) -> M:
    """Make ``loss.backward()`` of a module take its gradient by forward passes, as ``hzo.record`` does.

    ::

        model = DistributedDataParallel(hzo.module(model))  # or fully_shard, Accelerate, Lightning, the HF Trainer
        criterion(model(x), y).backward()

    In place: the module stays the object that it is, with its parameters, names and hooks, and gets a class derived
    from its own (as ``torch.distributed.fsdp.fully_shard`` does it); ``hzo.plain(model)`` undoes that. For autograd a
    call of it is one function of its inputs and of all parameters that it uses, whose backward pass sweeps what the
    forward pass recorded. So wrappers that work by hooks of parameters and modules do with it what they do with any
    module: averaging, sharding, scaling, accumulation, clipping. Outside of it autograd runs as ever.

    Without gradients (``torch.no_grad``), and inside of ``hzo.record``, it runs as it is.

    Cost: as ``hzo.record``. All gradients of the module arrive together at the end of its backward pass: a wrapper that
    sends some while others are computed has nothing to overlap with inside of one module. Source: ours.

    Raises:
        InputError: not a module, or one of TorchScript's.
        DistributedError: it is wrapped, or a part of it shards parameters: the wrapper belongs around this module.
        In a call, what ``hzo.record`` raises; TapeError where the module writes to its input in place.
        DerivativeError: in a call under ``torch.func`` or forward mode.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"expected an nn.Module written in Python, got a {type(model).__name__}; a function or a program is a "
            "black box: hzo.blackbox(f)"
        )
    refuse_all_wrappers(model, "the wrapper belongs around it: DistributedDataParallel(hzo.module(model))")
    if not isinstance(model, Recorded):
        model.__class__ = _recorded(type(model))
    return model


def plain(model: M) -> M:
    """Undo ``hzo.module``: the module has its own class again, and autograd differentiates what it does."""
    if isinstance(model, Recorded):
        model.__class__ = type(model).hzo_class  # type: ignore[assignment]
    return model


class Recorded(nn.Module):
    """What ``hzo.module`` puts in front of a class."""

    hzo_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, recorded."""
        run = super().forward
        if not torch.is_grad_enabled() or current_recorder() is not None:
            return run(*args, **kwargs)
        return _forward(self, run, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As its own class would be; read again, it is recorded as before."""
        made: Any = super().__reduce_ex__(protocol)
        return (_new, (self.hzo_class,), *made[2:])


_derived: dict[type[nn.Module], type[Any]] = {}


def _recorded(cls: type[nn.Module]) -> type[Any]:
    """The class derived from ``cls`` whose forward pass is recorded; under the same name, by which others know it."""

    @functools.wraps(cls.forward)  # libraries look at its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Recorded.forward(self, *args, **kwargs)

    if cls not in _derived:
        about = {"forward": forward, "hzo_class": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _derived[cls] = type(cls.__name__, (Recorded, cls), about)
    return _derived[cls]


def _new(cls: type[nn.Module]) -> Any:
    return object.__new__(_recorded(cls))


@uncompiled
def _forward(model: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = output_leaves((args, kwargs))
    _check_plain_mode(leaves)
    inner: dict[int, Tensor] = {}  # by the identity of an input, what stands for it in the recording
    outer: dict[int, Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in inner:
            made = leaf.detach().requires_grad_()
            inner[id(leaf)], outer[id(made)] = made, leaf
    given_args, given_kwargs = map_output(lambda leaf: inner.get(id(leaf), leaf), (args, kwargs))
    try:
        result, pullback = recorded_call(run, given_args, given_kwargs, lambda r: _results(model, r), [model])
    except RuntimeError as error:
        if inner and "leaf Variable that requires grad" in str(error):
            raise TapeError(
                f"{type(model).__name__} writes in place to an input that requires a gradient, which the rest of the "
                "model would not see; say inplace=False there, or make a larger part of the model one hzo.module"
            ) from error
        raise
    stands = dict(outer)  # by the identity of a tensor inside, what stands for it outside
    if pullback is not None:
        sources = [outer.get(id(leaf), leaf) for leaf in pullback.leaves]
        if not sources:
            raise TapeError(
                f"what {type(model).__name__} returned requires a gradient, but all that it was made of has a history "
                "from before the call, which hzo does not see, and nothing would be trained: so it is with the "
                "parameters of FSDP's first version (FullyShardedDataParallel), which are views of one flat tensor; "
                "take fully_shard. A tensor computed elsewhere is an argument of the module, not an attribute"
            )
        outputs = _Network.apply(pullback, outer, *sources)  # type: ignore[no-untyped-call]
        stands |= {id(t): made for t, made in zip(pullback.outputs, outputs, strict=True)}
    for made in inner.values():
        made.register_hook(functools.partial(_left_elsewhere, type(model).__name__))  # type: ignore[no-untyped-call]
    for attributes, name, value in _attributes(model):
        attributes[name] = _with_outer(value, stands)
    return map_output(lambda leaf: stands.get(id(leaf), leaf), result)


def _results(model: nn.Module, returned: Any) -> list[Tensor]:
    """The tensors that were returned, and that are in attributes: an auxiliary loss, a feature, a state.

    Leaves are left out: an input or a parameter that is returned stays what it is.
    """
    kept = [leaf for *_, value in _attributes(model) for leaf in tensors_in(value)]
    found = [leaf for leaf in (*output_leaves(returned), *kept) if isinstance(leaf, Tensor) and not leaf.is_leaf]
    return list({id(leaf): leaf for leaf in found}.values())


def _attributes(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """All attributes that are tensors, or containers in which some may be: where, name, value."""
    return [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (Tensor, list, tuple, dict)) and name not in _OF_MODULES
    ]


def _with_outer(value: Any, stands: dict[int, Tensor]) -> Any:
    """An attribute with the tensors that stand for others; lists and dicts stay the objects that they are."""
    if isinstance(value, tuple):
        made = [_with_outer(item, stands) for item in value]
        if all(a is b for a, b in zip(made, value, strict=True)):
            return value
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, (list, dict)):
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, item in items:
            made = _with_outer(item, stands)
            if made is not item:
                value[key] = made
        return value
    return stands.get(id(value), value) if isinstance(value, Tensor) else value


_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module holds: parameters, buffers, hooks, modules inside."""


def _left_elsewhere(name: str, _: Tensor) -> None:
    raise TapeError(
        f"a loss was made of a tensor that {name} left somewhere else than in what it returns or in an attribute (a "
        "list of a forward hook, a global): for autograd it is no result of this hzo.module, and the gradient of the "
        "module's input would miss it. Return it, keep it in an attribute of the module, or take hzo.record() around "
        "the step"
    )


class _Network(torch.autograd.Function):
    """Outputs of a recorded call, as a function of the leaves that they depend on."""

    @staticmethod
    def forward(ctx: Any, pullback: Pullback, outer: dict[int, Tensor], *sources: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.pullback = pullback
        ctx.set_materialize_grads(False)
        made = [t.detach() for t in pullback.outputs]
        stands = {id(t): d for t, d in zip(pullback.outputs, made, strict=True)}
        # What the sweep reads, so that autograd notices where somebody writes to it in between.
        ctx.save_for_backward(*(stands.get(id(t), outer.get(id(t), t)) for t in pullback.read))
        return tuple(made)

    @staticmethod
    @first_derivative_only(
        "hzo.module",
        "a second derivative of a module made by hzo.module was asked for (a gradient penalty, forces that are "
        "trained), which it does not have; take hzo.record() around the step, in which derivatives may be taken, or "
        "hzo.plain(model)",
    )
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        return (None, None, *ctx.pullback(cotangents, keep=keep))


def _check_plain_mode(leaves: Sequence[Any]) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None or (
        forward_ad._current_level >= 0
        and any(
            forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
            for t in leaves
            if isinstance(t, Tensor)
        )
    ):
        raise DerivativeError(
            "a module made by hzo.module was called under torch.func or in forward mode, whose derivatives it does not "
            "have; call hzo.plain(model) first, or take hzo.grad_and_value of it"
        )
