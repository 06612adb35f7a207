"""A part without a usable derivative inside an ordinary autograd model: its backward pass is made of queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hzo import queries
from hzo.differences import Scheme, check_scheme, check_step
from hzo.errors import InputError, NondeterministicError, NonFiniteError
from hzo.inspection import close
from hzo.side_effects import contained, devices_of, random_state, set_random_state
from hzo.vjp import estimate_vjp


def blackbox(
    f: Callable[..., Any],
    *,
    scheme: Scheme = "central",
    step: float | None = None,
    elementwise: bool = False,
    batched: bool = True,
    numpy: bool = False,
    deterministic: bool = True,
    memory: int | None = None,
) -> BlackBox:
    """Make an ``nn.Module`` of any callable; ``loss.backward()`` flows through it by ``hzo.estimate_vjp``.

    Args:
        f: from tensor(s) with the batch in dimension 0 to one tensor alike; samples must not influence each other.
        scheme, step, elementwise, memory: see ``hzo.estimate_vjp``.
        batched: False where ``f`` cannot take more samples than it is given in the forward pass.
        numpy: ``f`` takes and returns NumPy arrays.
        deterministic: False accepts an ``f`` that does not repeat; else that is an error. What torch's random state
            decides (dropout) repeats by itself: queries draw the numbers of the forward pass.

    Cost of a backward pass: 2 n B queries for n input elements a sample (forward differences: n B), and one base
    evaluation that checks that ``f`` repeats. Inputs that need no gradient cost nothing.
    Parameters of ``f``, where it is a module, get no gradient: freeze them, or train them with ``hzo.backward``.

    Raises:
        InputError: trainable parameters inside ``f``; an output that is not one tensor with the batch first.
        NonFiniteError, NondeterministicError: in the pass in which it shows. What ``f`` raises itself passes through.
    """
    estimate = partial(
        estimate_vjp,
        scheme=check_scheme(scheme),
        step=check_step(step),
        elementwise=elementwise,
        batched=batched,
        memory=memory,
    )
    return BlackBox(f, estimate, numpy=numpy, deterministic=deterministic)


class BlackBox(nn.Module):
    """Made by ``hzo.blackbox``. In a traced chain it is one opaque operation."""

    hzo_opaque = True

    def __init__(
        self, f: Callable[..., Any], estimate: Callable[..., tuple[Tensor, ...]], *, numpy: bool, deterministic: bool
    ) -> None:
        super().__init__()
        if isinstance(f, nn.Module):
            trainable = [name for name, p in f.named_parameters() if p.requires_grad]
            if trainable:
                raise InputError(
                    f"hzo.blackbox got a module with trainable parameters ({', '.join(trainable[:3])}…), which would "
                    "get no gradient; freeze them (requires_grad_(False)), or train the module with hzo.backward"
                )
        self.f = f
        self.estimate = estimate
        self.numpy = numpy
        self.deterministic = deterministic

    def forward(self, *inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.evaluate(*inputs)[0]
        result: Tensor = _Estimated.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return result

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, torch.dtype]:
        """Call ``f`` on copies and copy what it returns, checked; also the dtype that it computed in."""
        first = inputs[0]
        copies = [t.detach().clone() for t in inputs]
        result = self.f(*(t.cpu().numpy() for t in copies)) if self.numpy else self.f(*copies)
        output = torch.as_tensor(result).detach().to(device=first.device, copy=True)
        dtype = output.dtype
        if output.is_floating_point():
            like = next((t.dtype for t in inputs if t.is_floating_point()), torch.get_default_dtype())
            output = output.to(like)
        if output.dim() == 0 or output.shape[0] != first.shape[0]:
            raise InputError(
                f"{self._name()} returned shape {tuple(output.shape)} for {first.shape[0]} samples; expected the batch "
                "in dimension 0"
            )
        if not bool(output.isfinite().all()):
            raise NonFiniteError(f"{self._name()} returned NaN or infinity; check it at this input")
        return output, dtype

    def _name(self) -> str:
        return f"the black box {getattr(self.f, '__name__', type(self.f).__name__)}"


class _Estimated(torch.autograd.Function):
    """The bridge to autograd: forward calls the callable, backward estimates."""

    @staticmethod
    def forward(ctx: Any, box: BlackBox, *inputs: Tensor) -> Tensor:
        ctx.random = random_state(devices_of(inputs))
        output, ctx.precision = box.evaluate(*inputs)
        ctx.box = box
        if not output.is_floating_point():
            ctx.mark_non_differentiable(output)
        ctx.save_for_backward(*inputs, output)
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        box: BlackBox = ctx.box
        *inputs, output = ctx.saved_tensors
        wanted = [k for k, t in enumerate(inputs) if ctx.needs_input_grad[k + 1] and t.is_floating_point()]
        found: list[Tensor | None] = [None] * len(inputs)
        if not wanted or not output.is_floating_point():
            return (None, *found)

        def of_wanted(*moved: Tensor) -> Tensor:
            copies = moved[0].shape[0] // inputs[0].shape[0]
            state = [t if copies == 1 else t.repeat(copies, *[1] * (t.dim() - 1)) for t in inputs]
            for k, tensor in zip(wanted, moved, strict=True):
                state[k] = tensor
            return box.evaluate(*state)[0]

        of_wanted.__name__ = box._name()
        modules = [box.f] if isinstance(box.f, nn.Module) else []
        now = random_state(devices_of(inputs))
        with contained(modules):
            set_random_state(ctx.random)
            if box.deterministic:
                _check_repeats(box, inputs, output)
                set_random_state(ctx.random)
            estimates = box.estimate(of_wanted, tuple(inputs[k] for k in wanted), cotangent, precision=ctx.precision)
        set_random_state(now)
        for k, estimate in zip(wanted, estimates, strict=True):
            found[k] = estimate.to(inputs[k].dtype)
        return (None, *found)


def _check_repeats(box: BlackBox, inputs: list[Tensor], output: Tensor) -> None:
    again, _ = box.evaluate(*inputs)
    queries.add(base_evaluations=inputs[0].shape[0])
    if not close(output, again):
        raise NondeterministicError(
            f"{box._name()} gave two results for the same input; its differences would be noise. Make it repeat, or "
            "accept that with hzo.blackbox(f, deterministic=False)"
        )
