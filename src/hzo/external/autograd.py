"""The bridge to autograd: a call of a part as a Function, whose derivatives are taken by queries.

A VJP is linear in its cotangent and a JVP in its tangent, and each is the other's derivative along that. Through the
point at which they were taken there is no second derivative, and asking for one is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hzo.errors import DerivativeError
from hzo.external.call import BoxCall
from hzo.external.products import box_vjp, jvp
from hzo.pools import backward_half, forward_half


def through(call: BoxCall, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a part makes of these leaves; autograd takes its derivatives from ``call``."""
    found: tuple[Tensor, ...] = _Part.apply(call, *leaves)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class _Spec:
    """What a linear map is asked for.

    Attributes:
        leaves: how many. wanted: of them, those whose cotangents are asked for, or that have a tangent.
        given: for a VJP, the outputs that have a cotangent. many: vectors at once, in a dimension in front; None for
            one.
    """

    call: BoxCall
    leaves: int
    wanted: tuple[int, ...]
    given: tuple[int, ...]
    many: int | None = None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(call: BoxCall, *leaves: Tensor) -> tuple[Tensor, ...]:
        check_untraced(call)
        with forward_half():
            if not call.base:
                return call.forward(leaves)
            # Who replays a recording applies the Function again; what its first backward pass needs must stay.
            call.replay = call.again()
            return call.replay.forward(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *leaves = inputs
        ctx.call = call.replay or call
        ctx.save_for_backward(*leaves)  # so that autograd notices where one is changed in place
        ctx.save_for_forward(*leaves)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output if not (t.is_floating_point() or t.is_complex())))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, leaves = ctx.call, ctx.saved_tensors
        call.consumed = True
        wanted = tuple(k for k, flag in enumerate(ctx.needs_input_grad[1:]) if flag)
        given = tuple(o for o, g in enumerate(cotangents) if g is not None)
        result: list[Tensor | None] = [None] * len(leaves)
        if wanted and given:
            spec = _Spec(call, len(leaves), wanted, given)
            point, vectors = _once(call, leaves), [cotangents[o] for o in given]
            level = _engine_batch(vectors)  # type: ignore[arg-type]
            if level is None:
                found = _Vjp.apply(spec, *point, *vectors)  # type: ignore[no-untyped-call]
            else:
                unbatched = _without_level(vectors, level)  # type: ignore[arg-type]
                many = replace(spec, many=len(unbatched[0]))
                found = [
                    torch._add_batch_dim(t, 0, level)
                    for t in _Vjp.apply(many, *point, *unbatched)  # type: ignore[no-untyped-call]
                ]
            for k, g in zip(wanted, found, strict=True):
                result[k] = g
        return (None, *result)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, leaves = ctx.call, ctx.saved_tensors
        wanted = tuple(k for k, t in enumerate(tangents) if t is not None)
        spec = _Spec(call, len(leaves), wanted, ())
        point, vectors = _once(call, leaves), [tangents[k] for k in wanted]
        level = _engine_batch(vectors)  # type: ignore[arg-type]
        found: tuple[Tensor | None, ...]
        if level is None:
            found = _Jvp.apply(spec, *point, *vectors)  # type: ignore[no-untyped-call]
            return found
        unbatched = _without_level(vectors, level)  # type: ignore[arg-type]
        found = _Jvp.apply(  # type: ignore[no-untyped-call]
            replace(spec, many=len(unbatched[0])), *point, *unbatched
        )
        return tuple(None if t is None else torch._add_batch_dim(t, 0, level) for t in found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: BoxCall, *leaves: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        dims, size = in_dims[1:], info.batch_size
        first = _picked(leaves, dims, 0)
        inner = call.again()
        results = [through(inner, first)]
        if inner.moved_on:
            raise DerivativeError(
                f"{call.guard} keeps a state, and under torch.vmap each of {size} slices would move it on; give the "
                "state to it and have it returned: f(x, state) -> (y, state)"
            )
        call.adopt(inner)
        layout = inner.layout
        along = all(flag or dim is None for flag, dim in zip(layout.leaves, dims, strict=True))
        if size > 1 and along and inner.folds and all(layout.outputs):
            whole = call.again()
            folded = [
                _folded(t, dim, size) if flag else t for t, dim, flag in zip(leaves, dims, layout.leaves, strict=True)
            ]
            outputs = through(whole, folded)
            batch = layout.batch
            if whole.base:
                call.slices = [whole.part(v * batch, (v + 1) * batch) for v in range(size)]
            else:  # another vmap has divided it further
                call.whole = whole
            return tuple(t.reshape(size, batch, *t.shape[1:]) for t in outputs), (0,) * len(outputs)
        call.slices = [inner]
        for v in range(1, size):
            call.slices.append(call.again())
            results.append(through(call.slices[-1], _picked(leaves, dims, v)))
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


class _Vjp(torch.autograd.Function):
    """Cotangents of the leaves that are wanted, from those of the outputs that are given."""

    @staticmethod
    def forward(spec: _Spec, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, given = tensors[: spec.leaves], tensors[spec.leaves :]
        call, count = spec.call, spec.many or 1
        check_untraced(call)
        many: list[list[Tensor | None]] = [[None] * len(call.base) for _ in range(count)]
        for o, g in zip(spec.given, given, strict=True):
            for v in range(count):
                many[v][o] = g if spec.many is None else g[v]
        wanted = [k in spec.wanted for k in range(spec.leaves)]
        with backward_half(_at_the_end):
            found = box_vjp(call, leaves, many, wanted)
        results = []
        for k in spec.wanted:
            of_each = [torch.zeros_like(leaves[k]) if f[k] is None else f[k] for f in found]
            results.append(of_each[0] if spec.many is None else torch.stack(of_each))  # type: ignore[arg-type]
        return tuple(results)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.spec, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, tensors = ctx.spec, ctx.saved_tensors
        leaves = tensors[: spec.leaves]
        # Through the leaves: of whatever value, since who asks for it meets the error in _Once.
        result: list[Tensor | None] = [
            torch.zeros_like(t) if flag else None for t, flag in zip(leaves, ctx.needs_input_grad[1:], strict=False)
        ]
        there = tuple(k for k, t in zip(spec.wanted, tangents, strict=True) if t is not None)
        if not there or not any(ctx.needs_input_grad[1 + spec.leaves :]):
            return (None, *result, *(None for _ in spec.given))
        moved = _Spec(spec.call, spec.leaves, there, (), spec.many)
        changes = _Jvp.apply(  # type: ignore[no-untyped-call]
            moved, *_once(spec.call, leaves), *(t for t in tangents if t is not None)
        )
        return (None, *result, *(changes[o] for o in spec.given))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        spec, tensors = ctx.spec, ctx.saved_tensors
        moved = [t for t in tangents[: spec.leaves] if t is not None]
        if moved:
            raise _second(spec.call)
        given = tuple(o for o, t in zip(spec.given, tangents[spec.leaves :], strict=True) if t is not None)
        return _Vjp.apply(  # type: ignore[no-untyped-call]
            replace(spec, given=given),
            *_once(spec.call, tensors[: spec.leaves]),
            *(t for t in tangents[spec.leaves :] if t is not None),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: _Spec, *tensors: Tensor) -> tuple[Any, Any]:
        return _mapped(_Vjp, info.batch_size, in_dims[1:], spec, tensors)


class _Jvp(torch.autograd.Function):
    """Changes of all outputs, from those of the leaves that have a tangent (``wanted``)."""

    @staticmethod
    def forward(spec: _Spec, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, given = tensors[: spec.leaves], tensors[spec.leaves :]
        call, count = spec.call, spec.many or 1
        check_untraced(call)
        many: list[list[Tensor | None]] = [[None] * spec.leaves for _ in range(count)]
        for k, t in zip(spec.wanted, given, strict=True):
            for v in range(count):
                many[v][k] = t if spec.many is None else t[v]
        with backward_half(_at_the_end):
            found = [_shaped(call, changes, leaves) for changes in jvp(call, leaves, many)]
        if spec.many is None:
            return tuple(found[0])
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output if not (t.is_floating_point() or t.is_complex())))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, tensors = ctx.spec, ctx.saved_tensors
        leaves = tensors[: spec.leaves]
        result: list[Tensor | None] = [
            torch.zeros_like(t) if flag else None for t, flag in zip(leaves, ctx.needs_input_grad[1:], strict=False)
        ]
        given = tuple(o for o, g in enumerate(cotangents) if g is not None)
        if not given or not any(ctx.needs_input_grad[1 + spec.leaves :]):
            return (None, *result, *(None for _ in spec.wanted))
        found = _Vjp.apply(  # type: ignore[no-untyped-call]
            replace(spec, given=given), *_once(spec.call, leaves), *(g for g in cotangents if g is not None)
        )
        return (None, *result, *found)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        spec, tensors = ctx.spec, ctx.saved_tensors
        if any(t is not None for t in tangents[: spec.leaves]):
            raise _second(spec.call)
        there = tuple(k for k, t in zip(spec.wanted, tangents[spec.leaves :], strict=True) if t is not None)
        return _Jvp.apply(  # type: ignore[no-untyped-call]
            replace(spec, wanted=there),
            *_once(spec.call, tensors[: spec.leaves]),
            *(t for t in tangents[spec.leaves :] if t is not None),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: _Spec, *tensors: Tensor) -> tuple[Any, Any]:
        return _mapped(_Jvp, info.batch_size, in_dims[1:], spec, tensors)


class _Once(torch.autograd.Function):
    """The point at which a derivative was taken: nothing may be differentiated through it once more."""

    @staticmethod
    def forward(call: BoxCall, leaf: Tensor) -> Tensor:  # noqa: ARG004
        return leaf.view_as(leaf)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.call = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> Any:
        raise _second(ctx.call)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor | None) -> Tensor | None:  # noqa: ARG004
        return None if tangent is None else tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: BoxCall, leaf: Tensor) -> tuple[Tensor, Any]:  # noqa: ARG004
        return _Once.apply(call, leaf), in_dims[1]  # type: ignore[no-untyped-call]


def _engine_batch(tensors: Sequence[Tensor]) -> int | None:
    """The level of autograd's own vectorization (``is_grads_batched``), which knows no rule of a Function's."""
    if not any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors):
        return None
    level: int = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return level - 1


def _without_level(tensors: Sequence[Tensor], level: int) -> list[Tensor]:
    """With the dimension of this level in front."""
    batched = [torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors]
    found = [torch._remove_batch_dim(t, level, 1, 0) if flag else t for t, flag in zip(tensors, batched, strict=True)]
    size = next(len(t) for t, flag in zip(found, batched, strict=True) if flag)
    return [t if flag else t.expand(size, *t.shape) for t, flag in zip(found, batched, strict=True)]


def _once(call: BoxCall, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [
        _Once.apply(call, t) if t.is_floating_point() or t.is_complex() else t  # type: ignore[no-untyped-call]
        for t in leaves
    ]


def _at_the_end(of_all: Callable[[], None]) -> None:
    """Autograd's backward pass goes on behind this part of it, and may fail; then this is not called."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(of_all)
    except RuntimeError:  # none is under way: the part is the whole
        of_all()


def check_untraced(call: BoxCall) -> None:
    """A trace without values (make_fx, torch.func.linearize, FakeTensor) cannot run a part that needs them."""
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__name__ in ("ProxyTorchDispatchMode", "FakeTensorMode"):
            raise DerivativeError(
                f"{call.guard} was called in a trace without values (make_fx, torch.func.linearize, torch.export), and "
                "it needs them; call it outside of the trace, or take torch.func.jvp in place of linearize"
            )


def _second(call: BoxCall) -> DerivativeError:
    return no_second_derivative(str(call.guard))


def _shaped(call: BoxCall, changes: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Changes in shape and dtype of what the forward pass returned."""
    count, dtype, found = len(call.result_positions), call.dtype_of(leaves), []
    for k, (change, shape) in enumerate(zip(changes, call.shapes, strict=True)):
        if call.complex[k]:
            made = torch.view_as_complex(change.reshape(*shape, 2).contiguous())
            made = made.to(torch.complex128 if dtype == torch.float64 else torch.complex64) if k < count else made
        else:
            made = change.reshape(shape).to(call.made[k])
        found.append(made)
    return found


def _picked(tensors: Sequence[Tensor], dims: Sequence[int | None], v: int) -> list[Tensor]:
    return [t if dim is None else t.select(dim, v) for t, dim in zip(tensors, dims, strict=True)]


def _folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(size × B, …)."""
    front = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return front.flatten(0, 1)


def _mapped(
    function: Any, size: int, dims: Sequence[int | None], spec: _Spec, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Any]:
    """A linear map for each slice: many vectors at one point, or slices of what ``vmap`` made of the call."""
    point, vectors = dims[: spec.leaves], dims[spec.leaves :]
    leaves, given = tensors[: spec.leaves], tensors[spec.leaves :]
    if spec.call.slices and len(spec.call.slices) == size and any(dim is not None for dim in point):
        results = [
            function.apply(
                replace(spec, call=spec.call.slices[v]), *_picked(leaves, point, v), *_picked(given, vectors, v)
            )
            for v in range(size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
    flags = spec.call.layout.leaves
    if spec.call.whole is not None and any(dim is not None for dim in point) and all(flags[k] for k in spec.wanted):
        front = [_folded(t, dim, size) if flags[k] else t for k, (t, dim) in enumerate(zip(leaves, point, strict=True))]
        rest = [_folded(t, dim, size) for t, dim in zip(given, vectors, strict=True)]
        results = function.apply(replace(spec, call=spec.call.whole), *front, *rest)
        return tuple(t.reshape(size, -1, *t.shape[1:]) for t in results), (0,) * len(results)
    if any(dim is not None for dim in point):
        raise DerivativeError(
            f"torch.vmap over the inputs of {spec.call.guard} does not fit the forward pass that it was called with; "
            "put the call of the part inside of what is mapped"
        )
    stacked = [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(given, vectors, strict=True)
    ]
    if spec.many is not None:
        stacked = [t.flatten(0, 1) for t in stacked]
    found = function.apply(replace(spec, many=size * (spec.many or 1)), *leaves, *stacked)
    if spec.many is not None:
        found = tuple(t.reshape(size, spec.many, *t.shape[1:]) for t in found)
    return found, (0,) * len(found)


def no_second_derivative(part: str) -> DerivativeError:
    """The error of whoever asks for one."""
    return DerivativeError(
        f"a second derivative of {part} was asked for, which it does not have (it is once_differentiable): "
        "differences of differences lose all digits. Take differences of its gradient yourself, at a step that suits "
        "the part, or leave create_graph out where only the first derivative is wanted"
    )


def first_derivative_only(part: str, why: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward pass of a Function of which no second derivative is known.

    PyTorch's ``once_differentiable`` returns constants where no cotangent requires a gradient, as for a sum of outputs:
    a gradient penalty would be dropped without a word. Here whoever differentiates the result meets an error.

    Args:
        part: what is differentiated, for the message; why: the whole message, where another way on is better.
    """

    def decorated(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *cotangents: Tensor | None) -> Any:
            with torch.no_grad():
                found = backward(ctx, *cotangents)
            if not torch.is_grad_enabled():  # nobody asked for a graph
                return found
            error = no_second_derivative(part) if why is None else DerivativeError(why)
            anchor = torch.zeros((), requires_grad=True)
            return tuple(
                _Last.apply(error, anchor, g) if isinstance(g, Tensor) else g  # type: ignore[no-untyped-call]
                for g in found
            )

        return once

    return decorated


class _Last(torch.autograd.Function):
    """A derivative that depends on what it was taken of, and cannot say how."""

    @staticmethod
    def forward(ctx: Any, error: DerivativeError, anchor: Tensor, result: Tensor) -> Tensor:  # noqa: ARG004
        ctx.error = error
        return result.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise ctx.error


# ---- a whole that is planned -----------------------------------------------------------------------------------------


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(this: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(this.wanted)
        with forward_half():
            found: tuple[Tensor, ...] = this.forward(tensors[:count], tensors[count:])
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.this, *tensors = inputs
        ctx.save_for_backward(*tensors)  # so that autograd notices where one is changed in place
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output if not t.is_floating_point()))

    @staticmethod
    @first_derivative_only("a black box that is planned as a whole")
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        with backward_half(_at_the_end):
            return (None, *ctx.this.carry_back(cotangents))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:  # noqa: ARG004
        raise DerivativeError(
            "forward-mode differentiation (jvp, jacfwd) does not pass through a box that is planned as a whole (a list "
            "of parts, or noise=); make a box of each part, or use the backward pass"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, this: Any, *tensors: Tensor) -> Any:  # noqa: ARG004
        raise DerivativeError(
            "torch.vmap does not pass through a box that is planned as a whole (a list of parts, or noise=); make a "
            "box of each part, or put the dimension into the batch"
        )


def through_planned(this: Any, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results of ``this.forward``; autograd asks ``this.carry_back`` for cotangents."""
    found: tuple[Tensor, ...] = _Planned.apply(this, *inputs, *parameters)  # type: ignore[no-untyped-call]
    return found


# ---- a loss that brings its cotangent --------------------------------------------------------------------------------


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(given: Callable[[], tuple[Tensor, Tensor]], output: Tensor) -> tuple[Tensor, Tensor]:
        loss, cotangent = given()
        return loss.to(output.dtype), cotangent.to(output.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.cotangent = output[1]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @first_derivative_only("a loss that was differentiated by queries")
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[None, Tensor]:
        return None, factor * ctx.cotangent

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> tuple[Tensor, None]:
        return (ctx.cotangent * tangent).sum(), None


def with_cotangent(given: Callable[[], tuple[Tensor, Tensor]], output: Tensor) -> Tensor:
    """The loss that ``given()`` returns beside a cotangent; autograd takes that for its gradient along ``output``."""
    loss: Tensor = _Given.apply(given, output)[0]  # type: ignore[no-untyped-call]
    return loss
