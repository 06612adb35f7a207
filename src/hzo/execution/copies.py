"""One operation on several perturbed copies of some operands at once, in a new first dimension.

The common calls take that dimension as they are: elementwise ones broadcast, products and convolutions take copies for
samples. All others go through ``torch.vmap``, and what that refuses runs copy by copy. Constants and operands that no
query moves stand there once, whatever sizes the arguments name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hzo.tape import Operation, Tape
from hzo.tape.aliases import pass_through
from hzo.tape.functions import replay_of
from hzo.tape.operations import Ref, refs_in
from hzo.tape.record import flat

aten = torch.ops.aten

READS_BASE = frozenset((pass_through, aten.as_strided.default))
"""Read of their first operand what it was in the base pass, its content or how it lay in memory, beside a copy."""

VIEWS = frozenset((aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default))
_RESHAPED = frozenset(
    (
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    )
)  # fmt: skip

# Positions of the arguments that name dimensions, which one more in front shifts.
_DIMENSIONS: dict[Any, tuple[int, ...]] = {
    aten.transpose.int: (1, 2),
    aten.select.int: (1,),
    aten.slice.Tensor: (1,),
    aten._softmax.default: (1,),
    aten._log_softmax.default: (1,),
    aten.sum.dim_IntList: (1,),
    aten.mean.dim: (1,),
}

_FIRST_IS_BATCH = frozenset(
    (
        aten.convolution.default, aten._convolution.default, aten.max_pool2d_with_indices.default,
        aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten._native_batch_norm_legit_no_training.default,
        aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default, aten.linear.default,
        aten.constant_pad_nd.default, aten.reflection_pad2d.default, aten.replication_pad2d.default,
    )
)  # fmt: skip
"""Take images (or rows) behind each other in the first dimension, and nothing else from the activations."""


def run_copies(tape: Tape, op: Operation, moved: Mapping[int, Tensor], copies: int) -> list[Any]:
    """The results of an operation, each with the copies in front.

    Args:
        moved: by value, what stands in the place of operands: (copies, *shape).
    """
    if copies == 1 or not moved:
        return [r.unsqueeze(0) for r in flat(call_with(tape, op, {v: t.squeeze(0) for v, t in moved.items()}))]
    found = _directly(tape, op, moved, copies)
    if found is not None:
        return found
    return _by_vmap(tape, op, moved, copies)


def call_with(tape: Tape, op: Operation, moved: Mapping[int, Tensor]) -> Any:
    """Run an operation with some operands replaced."""
    args = [_filled(tape, moved, a) for a in op.args]
    if op.target is pass_through and op.args[0].value in moved:  # what autograd means by it: the path of one ...
        return args[1] + (args[0] - tape.tensor(op.args[0].value))  # ... with the content of another
    if op.target in VIEWS:  # what is run again may lie in memory otherwise
        return args[0].reshape(args[1])
    if op.target is aten.as_strided.default and type(op.args[0]) is Ref:
        args[0] = torch.empty_like(tape.tensor(op.args[0].value)).copy_(args[0])
    return replay_of(op.target)(*args, **{k: _filled(tape, moved, v) for k, v in op.kwargs.items()})


def _filled(tape: Tape, moved: Mapping[int, Tensor], argument: Any) -> Any:
    """An argument with its tensors. Not a closure: one that calls itself keeps what it refers to until a collection."""
    if type(argument) is Ref:
        found = moved.get(argument.value)
        return tape.tensor(argument.value) if found is None else found
    return tuple([_filled(tape, moved, a) for a in argument]) if type(argument) is tuple else argument


def _directly(tape: Tape, op: Operation, moved: Mapping[int, Tensor], copies: int) -> list[Any] | None:
    """The ways that need no vmap, the cheapest first; None where none fits."""
    if torch.Tag.pointwise in getattr(op.target, "tags", ()):
        return _broadcast(tape, op, moved)
    if _moves_first_alone(op, moved):
        (tensor,) = moved.values()
        for way in (_reshaped, _transposed, _along_dimensions, _as_samples, _normalized):
            found = way(tape, op, tensor, copies)
            if found is not None:
                return found
    return _product(tape, op, moved)


def _moves_first_alone(op: Operation, moved: Mapping[int, Tensor]) -> bool:
    """Whether the first argument is all that moves, and stands nowhere else among the arguments."""
    (value, *more) = moved
    alone = not more and bool(op.args) and type(op.args[0]) is Ref and op.args[0].value == value
    return alone and value not in refs_in((*op.args[1:], *op.kwargs.values()))


def _reshaped(tape: Tape, op: Operation, tensor: Tensor, copies: int) -> list[Any] | None:
    if op.target not in _RESHAPED:
        return None
    return [tensor.reshape(copies, *tape.values[op.writes[0]].shape)]  # type: ignore[index]


def _transposed(_: Tape, op: Operation, tensor: Tensor, __: int) -> list[Any] | None:
    if op.target is aten.t.default:
        return [tensor.mT if tensor.dim() == 3 else tensor]
    if op.target is aten.permute.default:
        dims = tensor.dim() - 1
        return [tensor.permute(0, *(d % dims + 1 for d in op.args[1]))]
    return None


def _along_dimensions(_: Tape, op: Operation, tensor: Tensor, __: int) -> list[Any] | None:
    """Calls that name dimensions, counted one further."""
    named = _DIMENSIONS.get(op.target, ())
    if not named or len(op.args) <= named[-1]:
        return None
    args = [_shifted(a) if k in named else a for k, a in enumerate(op.args[1:], 1)]
    if any(args[k - 1] is None for k in named):
        return None
    return [op.target(tensor, *args, **op.kwargs)]


def _as_samples(tape: Tape, op: Operation, tensor: Tensor, copies: int) -> list[Any] | None:
    """Copies taken for samples."""
    if op.target not in _FIRST_IS_BATCH or not _is_batched(op, tensor):
        return None
    results = flat(call_with(tape, op, {op.args[0].value: tensor.flatten(0, 1)}))
    # Statistics that a norm returns beside its result belong to no copy.
    return [
        r.unflatten(0, (copies, -1))
        if r.dim() and r.shape[0] == copies * tensor.shape[1]
        else r.expand(copies, *r.shape)
        for r in results
    ]


def _normalized(tape: Tape, op: Operation, tensor: Tensor, _: int) -> list[Any] | None:
    if op.target is not aten.native_layer_norm.default:
        return None
    return list(op.target(tensor, *[tape.resolve(a) for a in op.args[1:]]))


def _is_batched(op: Operation, tensor: Tensor) -> bool:
    """Whether the operand has a dimension of samples, which layers of torch may leave out."""
    if op.target in (aten.convolution.default, aten._convolution.default):
        stride = op.args[3]
        return tensor.dim() == 3 + len(stride)
    if op.target is aten.constant_pad_nd.default:
        return len(op.args[1]) <= 2 * (tensor.dim() - 2)
    if op.target is aten._native_batch_norm_legit_no_training.default:
        return True
    return tensor.dim() == 5 or (op.target is aten.linear.default and tensor.dim() > 2)


def _shifted(dims: Any) -> Any:
    if isinstance(dims, int):
        return dims + 1 if dims >= 0 else dims
    if isinstance(dims, tuple) and dims:
        return tuple(d + 1 if d >= 0 else d for d in dims)
    return None


def _broadcast(tape: Tape, op: Operation, moved: Mapping[int, Tensor]) -> list[Any] | None:
    """Elementwise: the copies stand in front of all dimensions of the result."""
    result = op.writes[0]
    if result is None or len(op.writes) != 1:
        return None
    form = op.kwargs.get("memory_format")
    if form not in (None, torch.preserve_format, torch.contiguous_format):
        return None
    dims = len(tape.values[result].shape)
    wide: dict[int, Tensor] = {}
    for value, tensor in moved.items():
        missing = dims - (tensor.dim() - 1)
        if missing and tensor.dim() == 1:  # a number has another say in the dtype of the result than a tensor
            return None
        wide[value] = tensor.reshape(tensor.shape[0], *[1] * missing, *tensor.shape[1:]) if missing else tensor
    found = call_with(tape, op, wide)
    return [found] if isinstance(found, Tensor) and found.dim() == dims + 1 else None


def _product(tape: Tape, op: Operation, moved: Mapping[int, Tensor]) -> list[Any] | None:
    first = 1 if op.target is aten.addmm.default else 0
    if op.target not in (aten.addmm.default, aten.mm.default, aten.bmm.default):
        return None
    left, right = op.args[first].value, op.args[first + 1].value
    if first and op.args[0].value in moved:
        return None
    a, b = moved.get(left), moved.get(right)
    if a is not None and b is None and op.target is not aten.bmm.default:
        if first and len(tape.values[op.args[0].value].shape) > 1 and tape.values[op.args[0].value].shape[0] != 1:
            return None
        rows = call_with(tape, op, {left: a.flatten(0, 1)})
        return [rows.unflatten(0, (a.shape[0], a.shape[1]))]
    if first:
        return None
    a = tape.tensor(left) if a is None else a
    b = tape.tensor(right) if b is None else b
    return [torch.matmul(a, b)]


def _by_vmap(tape: Tape, op: Operation, moved: Mapping[int, Tensor], copies: int) -> list[Any]:
    values = list(moved)

    def one(*tensors: Tensor) -> tuple[Any, ...]:
        return tuple(flat(call_with(tape, op, dict(zip(values, tensors, strict=True)))))

    if op.index not in tape.states or replay_of(op.target) is not op.target:
        try:
            torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
            return list(torch.vmap(one)(*moved.values()))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever vmap cannot do runs copy by copy
            return one_by_one(one, list(moved.values()), copies)
    return one_by_one(one, list(moved.values()), copies)


def one_by_one(run: Callable[..., tuple[Any, ...]], tensors: list[Tensor], copies: int) -> list[Any]:
    """Copy by copy, the results stacked."""
    parts = [run(*(t[k] for t in tensors)) for k in range(copies)]
    return [torch.stack(part) for part in zip(*parts, strict=True)]
