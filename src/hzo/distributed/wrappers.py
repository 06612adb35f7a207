"""Wrappers of distributed training: their gradients are averaged by hooks of autograd, which hzo does not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import DistributedError

DDP = "DistributedDataParallel"


def refuse_wrappers(model: Any) -> None:
    """An error where a model is, or holds, a wrapper whose work hzo cannot do: one that shards parameters.

    A ``DistributedDataParallel`` around the whole model is fine: run it inside ``forward_of`` and average what comes
    out with ``averaged``. Cost: one look at each module and parameter. Source: ours.

    Raises:
        DistributedError: names the wrapper, and the way that works.
    """
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None or (kind == DDP and not name):
            continue
        where = f"the module {name!r} of the model" if name else "the model"
        if kind == DDP:
            raise DistributedError(
                f"{where} is wrapped in {DDP}, whose gradients are averaged over the processes by hooks of autograd; "
                "hzo averages where the whole model is wrapped. Wrap the whole model, or call loss.backward() and let "
                "hzo work inside of the wrapper (hzo.blackbox)"
            )
        raise DistributedError(
            f"{where} is wrapped in {kind}, which gathers parameters and shards gradients by hooks of autograd; hzo "
            "does not run them, and each process would keep a part of the gradient. Make boxes of the parts that need "
            "it (hzo.blackbox) inside of the wrapped model, and call loss.backward()"
        )
    for name, parameter in model.named_parameters():
        if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
            raise DistributedError(
                f"the parameter {name} is a DTensor, a share of one that is spread over processes, and hzo sees this "
                "share alone. Make boxes of the parts that need it (hzo.blackbox), and call loss.backward()"
            )


@contextmanager
def forward_of(model: Any) -> Iterator[None]:
    """Inside, a ``DistributedDataParallel`` runs forward without waiting for a backward pass of autograd's."""
    if isinstance(model, nn.Module) and _kind(model) == DDP:
        with model.no_sync():  # type: ignore[operator]
            yield
        return
    yield


def _kind(module: nn.Module) -> str | None:
    """The name of the wrapper that a module is; by name, since importing the wrappers takes a second."""
    for cls in type(module).__mro__:
        source = cls.__module__
        if cls.__name__ == DDP and source.startswith("torch.nn.parallel"):
            return cls.__name__
        if cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") and source.startswith("torch.distributed"):
            return "FSDP"
        if cls.__name__ in ("DeepSpeedEngine", "PipelineEngine") and source.startswith("deepspeed"):
            return cls.__name__
    return None


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
    if not (isinstance(model, nn.Module) and _kind(model) == DDP and model.require_backward_grad_sync):
        return list(gradients)
    distributed, group = torch.distributed, model.process_group
    size = distributed.get_world_size(group)  # type: ignore[arg-type]
    own = {id(p): p for p in model.parameters() if p.requires_grad}
    found = {id(p): g for p, g in gradients}
    rest = [(p, g) for p, g in gradients if id(p) not in own]
    if size == 1 or not own:
        return list(gradients)
    there = torch.tensor([float(key in found) for key in own], device=next(iter(own.values())).device)
    distributed.all_reduce(there, group=group)
    result = []
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for (_, p), anywhere in zip(own.items(), there.tolist(), strict=True):
        if anywhere:
            groups.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, _), parameters in groups.items():
        flat = torch.cat([found.get(id(p), torch.zeros_like(p)).reshape(-1).to(dtype) for p in parameters])
        distributed.all_reduce(flat, group=group)
        flat /= size
        parts = torch.split(flat, [p.numel() for p in parameters])
        result += [(p, part.view(p.shape)) for p, part in zip(parameters, parts, strict=True)]
    return result + rest
