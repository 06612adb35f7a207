"""A callable of the user's, seen from outside: what goes in are copies, what comes out is checked and copied.

One operation of a chain, whatever it does inside: PyTorch, NumPy, a simulator in another process. An error says which
query met it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import copy_context
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hzo.errors import HzoError, InputError, NonFiniteError, QueryError, QueryTimeoutError
from hzo.execution import RandomState, counting, devices_of, random_state, set_random_state

_seeds = count(0x9E3779B9)  # one for every part: no two of them draw the same noise


class Guarded(nn.Module):
    """``f`` as a module that a recorder takes for one operation.

    Args:
        name: in messages and in ``count.boxes``.
        numpy: ``f`` takes and returns NumPy arrays.
        batched: True where ``f`` takes any number of samples; a number where it takes exactly so many, to which its
            input is split and padded; False for as many as its caller says (``samples``).
        timeout: seconds that a call may take; None for any time.
        ignores: trainable tensors that ``f`` uses are no parameters of this module.
        noisy: random numbers of torch's that ``f`` draws are noise, new ones in every call, out of its own stream.
            Else they belong to the forward pass, and every query draws the same.
    """

    hzo_opaque: bool | str = True

    def __init__(
        self,
        f: Callable[..., Any],
        name: str,
        *,
        numpy: bool,
        batched: bool | int,
        timeout: float | None,
        ignores: bool = False,
        noisy: bool = False,
    ) -> None:
        super().__init__()
        if ignores:
            self._held = (f,)  # in a tuple, where nn.Module does not find its parameters
        else:
            self.f = f
        self.hzo_ignores_parameters = ignores
        self.hzo_box = name
        self.numpy = numpy
        self.batched = batched
        self.timeout = timeout
        self.noisy = noisy
        self._stream: RandomState = {}
        self.samples: int | None = None  # of one call, where batched is False
        # Shapes of a sample: those that come out for those that go in.
        self._shapes: dict[tuple[torch.Size, ...], list[torch.Size]] = {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        samples = inputs[0].shape[0]
        size = samples if self.batched is True else self._size()
        results = [self._call([_rows(t, k, size) for t in inputs], size) for k in range(0, samples, size)]
        if size == samples:
            return results[0]
        if isinstance(results[0], Tensor):
            return torch.cat(results)[:samples]  # type: ignore[arg-type]
        return tuple(torch.cat(parts)[:samples] for parts in zip(*results, strict=True))

    def _size(self) -> int:
        size = self.samples if self.batched is False else self.batched
        if size is None:
            raise InputError(
                f"{self} takes only as many samples as a forward pass has, which an hzo chain cannot know; say how "
                "many: hzo.blackbox(f, batched=32)"
            )
        return int(size)

    def _call(self, inputs: Sequence[Tensor], samples: int) -> Tensor | tuple[Tensor, ...]:
        copies: list[Any] = [t.detach().clone() for t in inputs]
        if self.numpy:
            copies = [(t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy() for t in copies]
        f = self._held[0] if self.hzo_ignores_parameters else self.f
        try:
            with self._own_random_numbers(inputs) if self.noisy else nullcontext(), _same_buffers(f):
                result = f(*copies) if self.timeout is None else within(self.timeout, f, copies)
        except HzoError as error:
            raise type(error)(f"{self}, in {counting.being_done()}: {error}") from error
        except Exception as error:
            raise QueryError(
                f"{self} failed in {counting.being_done()} ({samples} samples): {type(error).__name__}: {error}"
            ) from error
        several = isinstance(result, (tuple, list))
        outputs = self._checked(result if several else (result,), inputs, samples)
        return tuple(outputs) if several else outputs[0]

    @contextmanager
    def _own_random_numbers(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Inside, torch's generators go on where this part left them; outside, they have not moved."""
        outside = random_state(devices_of(inputs))
        if not self._stream:
            seed = next(_seeds)
            self._stream = {device: torch.Generator(device).manual_seed(seed).get_state() for device in outside}
        set_random_state(self._stream)
        try:
            yield
        finally:
            self._stream = random_state(devices_of(inputs))
            set_random_state(outside)

    def _checked(self, results: Sequence[Any], inputs: Sequence[Tensor], samples: int) -> list[Tensor]:
        where = f"{self}, in {counting.being_done()},"
        outputs = []
        for result in results:
            try:
                # A copy: a simulator may use its memory again for the next result.
                outputs.append(torch.as_tensor(result).detach().to(device=inputs[0].device, copy=True))
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{where} returned a {type(result).__name__}; expected tensors or arrays") from error
        for output in outputs:
            if output.dim() == 0 or output.shape[0] != samples:
                raise InputError(
                    f"{where} returned shape {tuple(output.shape)} for {samples} samples; expected the batch in "
                    "dimension 0"
                )
            if output.is_floating_point() and not bool(output.isfinite().all()):
                raise NonFiniteError(f"{where} returned NaN or infinity; check it at this input")
        shapes = [output.shape[1:] for output in outputs]
        of_inputs = tuple(t.shape[1:] for t in inputs)
        if counting.being_done() == counting.FORWARD_PASS:
            self._shapes[of_inputs] = shapes
        known = self._shapes.setdefault(of_inputs, shapes)
        if known != shapes:
            raise InputError(
                f"{where} returned samples of shape {[tuple(s) for s in shapes]}, and {[tuple(s) for s in known]} "
                "before, for inputs of one shape; make its output's shape depend on its input's alone"
            )
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shapes": {}, "_stream": {}}

    def __str__(self) -> str:
        return f"the black box {self.hzo_box}"


def expect(stages: nn.Module, samples: int | None) -> None:
    """Tell the parts how many samples a forward pass has; None where there is none of their own."""
    for part in stages.modules():
        if isinstance(part, Guarded):
            part.samples = samples


@contextmanager
def _same_buffers(f: Callable[..., Any]) -> Iterator[None]:
    """Buffers that a module assigns anew in a query (a neuron that remembers its last call) are the old ones after it.

    What a forward pass assigns stays. A module that reads what it remembered does not repeat, and is found out.
    """
    if counting.being_done() == counting.FORWARD_PASS:
        yield
        return
    modules = [inner for module in _modules_of(f) for inner in module.modules()]
    held = [(inner, dict(inner._buffers)) for inner in modules]
    # Of a module that this one has not registered nobody else puts them back.
    copies = [] if isinstance(f, nn.Module) else [(b, b.clone()) for inner in modules for b in inner.buffers(False)]
    try:
        yield
    finally:
        for inner, buffers in held:
            inner._buffers.update(buffers)
        for buffer, copy in copies:
            if buffer.shape == copy.shape and not torch.equal(buffer, copy):
                buffer.copy_(copy)


def _modules_of(f: Any) -> list[nn.Module]:
    """The modules that a callable is, is a method of, was bound to, or closes over."""
    if isinstance(f, nn.Module):
        return [f]
    held = [getattr(f, "__self__", None), *(getattr(f, "args", None) or ()), getattr(f, "func", None)]
    for cell in getattr(f, "__closure__", None) or ():
        with suppress(ValueError):  # of a name that has no value yet
            held.append(cell.cell_contents)
    return [item for item in held if isinstance(item, nn.Module)]


def _rows(tensor: Tensor, start: int, size: int) -> Tensor:
    """``size`` rows from ``start`` on; the last one again where there are fewer."""
    rows = tensor[start : start + size]
    missing = size - rows.shape[0]
    return rows if not missing else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def within(seconds: float, f: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call ``f`` in a thread of its own and wait for it so long.

    A thread cannot be stopped: what hangs there hangs on, beside a program that goes on. What must be stopped belongs
    into a process of its own (``hzo.simulator``).

    Raises:
        QueryTimeoutError: it has not returned by then. What it raises itself passes through.
    """
    answer: list[Any] = []
    error: list[BaseException] = []
    context = copy_context()
    # What torch keeps for each thread: autocast, and a recording that may be under way.
    cast = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]

    def work() -> None:
        try:
            with ExitStack() as stack, torch.no_grad():  # a thread starts with gradients on
                for device, dtype in cast:
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                for mode in modes:
                    stack.enter_context(mode)
                answer.append(context.run(f, *arguments))
        except BaseException as raised:  # handed to the thread that waits
            error.append(raised)

    thread = threading.Thread(target=work, name="hzo-query", daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if not answer:
        raise QueryTimeoutError(
            f"no answer within {seconds:g} seconds; allow more (timeout=), or put it into a process of its own that "
            "can be stopped (hzo.simulator)"
        )
    return answer[0]
