"""Wrappers of distributed training: their gradients are averaged by hooks of autograd, which hzo does not run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import DistributedError

DDP = "DistributedDataParallel"


def refuse_wrappers(model: Any) -> None:
    """An error where a model is, or holds, a wrapper whose work hzo cannot do: one that shards parameters.

    A ``DistributedDataParallel`` around the whole model is fine: run what ``unwrapped`` gives, and average what comes
    out with ``averaged``. Cost: one look at each module and parameter. Source: ours.

    Raises:
        DistributedError: names the wrapper, and the way that works.
    """
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        kind = kind_of_wrapper(module)
        if kind is None:
            continue
        where = f"the module {name!r} of the model" if name else "the model"
        if kind == DDP and not name:
            if more := _beyond_averaging(module):
                raise DistributedError(
                    f"{where} is wrapped in {DDP} {more}, and hzo, which calls the model inside and takes the plain "
                    f"mean of gradients, would do something else. Have it work inside of the wrapper: "
                    f"{DDP}(hzo.module(model)), then loss.backward()"
                )
            continue
        if kind == DDP:
            raise DistributedError(
                f"{where} is wrapped in {DDP}, whose gradients are averaged over the processes by hooks of autograd; "
                "hzo averages where the whole model is wrapped. Wrap the whole model, or have hzo work inside of the "
                f"wrapper: {DDP}(hzo.module(model)), then loss.backward()"
            )
        raise _refusal(where, kind)
    for name, parameter in model.named_parameters():
        if is_shared(parameter):
            raise DistributedError(f"the parameter {name} {_A_SHARE}")
        if owner := _owner(parameter):
            raise sharded(f"the parameter {name} belongs to {owner}, which")


def _beyond_averaging(model: Any) -> str | None:
    """What a ``DistributedDataParallel`` does besides calling its model, averaging gradients and sending buffers."""
    owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    hooked = model._comm_hooks or model._get_ddp_logging_data().get("comm_hook")
    found = {
        "with mixed_precision=": model.mixed_precision is not None,
        "with a communication hook for gradients (register_comm_hook)": bool(hooked),
        "with a communication hook for buffers": hasattr(model, "buffer_hook"),
        "with delay_all_reduce_named_params=": bool(model._delay_all_reduce_params),
        "inside of its join()": model._join_config.enable,
        "with hooks of modules on the wrapper itself": any(getattr(model, hooks) for hooks in _HOOKS),
        "with a forward() of its own": "forward" in vars(model) or owner.__name__ != DDP,
    }
    return next((what for what, is_so in found.items() if is_so), None)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


# What wrappers put on the parameters that they spread, by which their inner modules are known, too.
_FIRST_FSDP = "FullyShardedDataParallel (FSDP's first version)"
_REPLICATE, _THREADS = "replicate", "DataParallel over several devices"
_MARKS = {"_fsdp_flattened": _FIRST_FSDP, "ds_id": "DeepSpeed (ZeRO, stage 3)"}


def wraps_shares(model: Any) -> bool:
    """Whether modules swap their parameters while they run, as those do that gather what is spread."""
    return isinstance(model, nn.Module) and any(
        kind_of_wrapper(m) not in (None, DDP, _THREADS) for m in model.modules()
    )


def refuse_all_wrappers(model: Any, instead: str) -> None:
    """As ``refuse_wrappers``, and an error for a ``DistributedDataParallel``, too, with the way that works."""
    refuse_wrappers(model)
    if isinstance(model, nn.Module) and kind_of_wrapper(model) == DDP:
        raise DistributedError(
            f"the model is wrapped in {DDP}, whose gradients are averaged over the processes by hooks of autograd; "
            f"{instead}"
        )


def refuse_wrapped_loss(loss_fn: Any) -> None:
    """An error where a loss is a module that is spread over processes: its gradients would be left as they are here."""
    kinds = (kind_of_wrapper(m) for m in loss_fn.modules()) if isinstance(loss_fn, nn.Module) else ()
    if kind := next((kind for kind in kinds if kind is not None), None):
        raise DistributedError(
            f"the loss is wrapped in {kind}, or a part of it is, and hzo averages gradients of the model alone; make "
            f"the loss a part of the model: {DDP}(model_with_loss), and loss_fn=lambda loss: loss"
        )


def _refusal(where: str, kind: str) -> DistributedError:
    """The error for a wrapper that is no ``DistributedDataParallel``."""
    if kind == _THREADS:
        return DistributedError(
            f"{where} is wrapped in {kind}, which runs copies of it in threads that hzo does not see; take "
            f"{DDP}, one process for each device, and hzo.backward(wrapped, loss_fn, x, y) averages as it would"
        )
    if kind == _REPLICATE:
        return DistributedError(
            f"{where} was given to {kind}(), which averages gradients over the processes by hooks of autograd; hzo "
            f"does not run them. Have hzo work inside: {kind}(hzo.module(model)), then loss.backward(); or take "
            f"{DDP}(model), where hzo.backward(wrapped, loss_fn, x, y) averages as it would"
        )
    return sharded(f"{where} is wrapped in {kind}, which")


def refuse_running(module: nn.Module) -> None:
    """An error where a module that is about to run in a recording is a wrapper whose hooks wait for other processes."""
    kind = kind_of_wrapper(getattr(module, "_orig_mod", module))  # of what torch.compile was given
    if kind is not None and kind != DDP:
        raise _refusal("a module that ran inside the recording", kind)


def sharded(what: str) -> DistributedError:
    """The error for a wrapper that shards parameters."""
    instead = "Have hzo work inside of the wrapper"
    if _FIRST_FSDP in what or "DeepSpeed" in what:
        instead = "Take FSDP2 (torch.distributed.fsdp.fully_shard), and have hzo work inside of it"
    return DistributedError(
        f"{what} gathers parameters and shards gradients by hooks of autograd; hzo does not run them, and each process "
        f"would keep a part of the gradient. {instead}: wrap hzo.module(model), or hzo.module(part) for each part that "
        "is wrapped by itself, and call loss.backward()"
    )


_A_SHARE = (
    "is a DTensor, a share of one that is spread over processes, and hzo sees this share alone. Train it by "
    "loss.backward(), and let hzo do the parts that are not spread: hzo.module(part), hzo.blackbox(part)"
)


def refuse_share(tensor: Tensor) -> None:
    """An error where a tensor is a share of one that is spread over processes."""
    if is_shared(tensor):
        raise DistributedError(f"a tensor of shape {tuple(tensor.shape)} {_A_SHARE}")
    if owner := _owner(tensor):
        raise sharded(f"a parameter of shape {tuple(tensor.shape)} belongs to {owner}, which")


def _owner(tensor: Tensor) -> str | None:
    """The wrapper that has spread a parameter, by its mark."""
    if type(tensor) is Tensor:
        return None
    return next((who for mark, who in _MARKS.items() if hasattr(tensor, mark)), None)


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, or a parameter that holds one."""
    kind = type(tensor)
    if kind is Tensor or "torch.distributed.tensor" not in sys.modules:  # asking for .data takes time in a recording
        return False
    return kind.__name__ == "DTensor" or (isinstance(tensor, nn.Parameter) and type(tensor.data).__name__ == "DTensor")


def kind_of_wrapper(module: nn.Module) -> str | None:
    """The name of the wrapper that a module is; by name, since importing the wrappers takes a second."""
    for cls in type(module).__mro__:
        if cls is nn.DataParallel:
            return _THREADS if len(module.device_ids) > 1 else None  # type: ignore[arg-type]
        source = cls.__module__
        for name, start, kind in _WRAPPERS:
            if cls.__name__ == name and source.startswith(start):
                return kind or f"DeepSpeed's {type(module).__name__}"
    return None


_WRAPPERS = (
    (DDP, "torch.nn.parallel", DDP),
    ("FSDPModule", "torch.distributed", "FSDP"),
    ("FullyShardedDataParallel", "torch.distributed", _FIRST_FSDP),
    ("DDP", "torch.distributed._composable.replicate", _REPLICATE),
    ("DeepSpeedEngine", "deepspeed", None),  # and what is derived from it
)


@torch.no_grad()
def unwrapped(model: Any) -> Any:
    """The model inside of a ``DistributedDataParallel`` (or of a ``DataParallel`` without devices), with the buffers of
    the first process where that sends them.

    Every process must call this. Another model comes back as it is. Cost: a broadcast of each buffer. Source: as
    torch's.
    """
    if isinstance(model, nn.DataParallel) and not model.device_ids:  # which calls its model, and nothing else
        return model.module
    if not (isinstance(model, nn.Module) and kind_of_wrapper(model) == DDP):
        return model
    if model.broadcast_buffers and model.require_backward_grad_sync:
        ignored: Any = model.parameters_to_ignore
        for name, buffer in model.module.named_buffers():  # type: ignore[union-attr]
            if name not in ignored:
                _wait(torch.distributed.broadcast, buffer, group=model.process_group, group_src=0)
    return model.module


@torch.no_grad()
def averaged(model: Any, gradients: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Gradients of a step, averaged over the processes where ``DistributedDataParallel`` would do so.

    Args:
        model: the model as it was called. gradients: (parameter, its gradient of this step) before they are added to
            ``.grad``; every process must call this.

    Where the model is no ``DistributedDataParallel``, or inside its ``no_sync()``, they come back as they are. A
    parameter without a gradient here and with one elsewhere gets its share. Cost: one all-reduce of all gradients of a
    dtype and device. Source: as torch's.
    """
    parameters = _averages(model)
    return list(gradients) if parameters is None else mean_over(model.process_group, parameters, gradients)


@torch.no_grad()
def average_accumulated(model: Any, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Average what ``.grad`` holds already, before the averaged gradients of a step are added to it.

    ``DistributedDataParallel`` averages the sum: micro-batches inside of its ``no_sync()`` have left each process a sum
    of its own. Every process must call this. Cost: an all-reduce of what is in ``.grad``. Source: as torch's.

    Args:
        model: the model as it was called. gradients: what ``averaged`` gave.
    """
    parameters = _averages(model)
    if parameters is None:
        return
    of_step = {id(p) for p, _ in gradients}
    before = [(p, p.grad) for p in parameters if p.grad is not None and id(p) in of_step]
    for p, g in mean_over(model.process_group, [p for p in parameters if id(p) in of_step], before):
        if p.grad is None:
            p.grad = g.clone()
        elif p.grad is not g:
            p.grad = g.to_sparse(p.grad.sparse_dim()) if p.grad.is_sparse else p.grad.copy_(g)


def _averages(model: Any) -> list[Tensor] | None:
    """The parameters whose gradients a ``DistributedDataParallel`` would average now; None where it would not."""
    if not (isinstance(model, nn.Module) and kind_of_wrapper(model) == DDP and model.require_backward_grad_sync):
        return None
    ignored: Any = model.parameters_to_ignore
    return [p for name, p in model.module.named_parameters() if name not in ignored]  # type: ignore[union-attr]


def _wait(exchange: Callable[..., Any], tensor: Tensor, **options: Any) -> None:
    """Run a collective, for as long as the process group waits.

    Raises:
        DistributedError: another process did not come.
    """
    try:
        exchange(tensor, **options)
    except RuntimeError as error:  # torch.distributed's own errors are of this kind
        raise DistributedError(
            f"another process did not come to the same exchange of {DDP}: it failed, hangs, or called something else "
            f"({str(error).splitlines()[0][-120:]}); nothing was added to .grad here. Look at what the others say; "
            "init_process_group(timeout=) sets how long one waits"
        ) from error


def mean_over(
    group: Any,
    parameters: Any,
    gradients: Sequence[tuple[Tensor, Tensor]],
    weight: float = 1.0,
    add_up: Callable[[Tensor], None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Gradients averaged over the processes of a group, one all-reduce for each dtype and device.

    Args:
        parameters: those that all processes have, in one order. gradients: (tensor, gradient); of others, such as
            inputs, they come back as they are. weight: of this process; the weights of all have the mean 1.
        add_up: adds up a tensor of all processes, in place; None waits for them as long as the group does.
    """
    distributed = torch.distributed
    size = distributed.get_world_size(group)
    own = {id(p): p for p in parameters if p.requires_grad}
    found = {id(p): g for p, g in gradients}
    rest = [(p, g) for p, g in gradients if id(p) not in own]
    if size == 1 or not own:
        return list(gradients)
    there = torch.tensor([float(key in found) for key in own], device=next(iter(own.values())).device)
    add_up = add_up or partial(_wait, distributed.all_reduce, group=group)
    add_up(there)
    result = []
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for (_, p), anywhere in zip(own.items(), there.tolist(), strict=True):
        if anywhere:
            groups.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, _), parts in groups.items():
        flat = torch.cat([found.get(id(p), torch.zeros_like(p)).reshape(-1).to(dtype) for p in parts])
        if weight != 1.0:
            flat *= weight
        add_up(flat)
        flat /= size
        pieces = torch.split(flat, [p.numel() for p in parts])
        result += [(p, piece.view(p.shape)) for p, piece in zip(parts, pieces, strict=True)]
    return result + rest
