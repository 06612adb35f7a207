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
        if kind is None or (kind == DDP and not name):
            continue
        where = f"the module {name!r} of the model" if name else "the model"
        if kind == DDP:
            raise DistributedError(
                f"{where} is wrapped in {DDP}, whose gradients are averaged over the processes by hooks of autograd; "
                "hzo averages where the whole model is wrapped. Wrap the whole model, or have hzo work inside of the "
                f"wrapper: {DDP}(hzo.module(model)), then loss.backward()"
            )
        raise sharded(f"{where} is wrapped in {kind}, which")
    for name, parameter in model.named_parameters():
        if is_shared(parameter):
            raise DistributedError(f"the parameter {name} {_A_SHARE}")
        if owner := _owner(parameter):
            raise sharded(f"the parameter {name} belongs to {owner}, which")


# What wrappers put on the parameters that they spread, by which their inner modules are known, too.
_FIRST_FSDP = "FullyShardedDataParallel (FSDP's first version)"
_MARKS = {"_fsdp_flattened": _FIRST_FSDP, "ds_id": "DeepSpeed (ZeRO, stage 3)"}


def refuse_all_wrappers(model: Any, instead: str) -> None:
    """As ``refuse_wrappers``, and an error for a ``DistributedDataParallel``, too, with the way that works."""
    refuse_wrappers(model)
    if isinstance(model, nn.Module) and kind_of_wrapper(model) == DDP:
        raise DistributedError(
            f"the model is wrapped in {DDP}, whose gradients are averaged over the processes by hooks of autograd; "
            f"{instead}"
        )


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
        source = cls.__module__
        if cls.__name__ == DDP and source.startswith("torch.nn.parallel"):
            return cls.__name__
        if cls.__name__ == "FSDPModule" and source.startswith("torch.distributed"):
            return "FSDP"
        if cls.__name__ == "FullyShardedDataParallel" and source.startswith("torch.distributed"):
            return _FIRST_FSDP
        if cls.__name__ == "DeepSpeedEngine" and source.startswith("deepspeed"):  # and what is derived from it
            return f"DeepSpeed's {type(module).__name__}"
    return None


@torch.no_grad()
def unwrapped(model: Any) -> Any:
    """The model inside of a ``DistributedDataParallel``, with the buffers of the first process where that sends them.

    Every process must call this. Another model comes back as it is. Cost: a broadcast of each buffer. Source: as
    torch's.
    """
    if not (isinstance(model, nn.Module) and kind_of_wrapper(model) == DDP):
        return model
    if model.broadcast_buffers and model.require_backward_grad_sync:
        ignored = getattr(model, "parameters_to_ignore", ())
        for name, buffer in model.module.named_buffers():  # type: ignore[union-attr]
            if name not in ignored:
                torch.distributed.broadcast(buffer, group=model.process_group, group_src=0)  # type: ignore[arg-type]
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
    if not (isinstance(model, nn.Module) and kind_of_wrapper(model) == DDP and model.require_backward_grad_sync):
        return list(gradients)
    return mean_over(model.process_group, model.parameters(), gradients)


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
    add_up = add_up or partial(distributed.all_reduce, group=group)
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
