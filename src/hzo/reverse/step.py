"""One training step, recorded and differentiated: ``hzo.record()``, then ``tape.backward(loss)``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hzo._compiler import Uncompiled, uncompiled
from hzo._options import scale_factor
from hzo.errors import DistributedError, InputError, NonFiniteError, TapeError
from hzo.pools import backward_half
from hzo.reverse.walk import sweep
from hzo.rules.measured import keep_measured
from hzo.rules.registry import LEAN
from hzo.tape import Recorder, Tape, current_recorder
from hzo.tape.memory import alone
from hzo.tape.state import captured
from hzo.tape.surroundings import recording, refuse_transforms

LeafGradients = list[tuple[Tensor, Tensor]]
"""Leaves with their gradients."""


def _not_copied() -> TapeError:
    return TapeError(
        "a recording holds the tensors of a step that ran, and is not copied or saved; take its gradients first "
        "(tape.backward(loss), retain_graph=True for more than one), and keep those"
    )


class RecordedStep:
    """A training step as it ran, from which gradients can be taken: what ``with hzo.record() as tape`` gives.

    Attributes:
        tape: the calls that were recorded; ``print(step.tape)`` lists them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._swept = False
        self._began = False  # to sweep
        self._gave = False  # a gradient
        self._failed = False

    def __repr__(self) -> str:
        state = "swept and released" if self._swept else "to be swept by .backward(loss)"
        return f"<RecordedStep, {state}: {self.tape!r}>"

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise _not_copied()

    def __reduce__(self) -> NoReturn:
        raise _not_copied()

    @property
    def tape(self) -> Tape:
        """The calls that were recorded."""
        return self._recorder.tape

    @uncompiled
    def backward(
        self, loss: Tensor, *, scale: float | Tensor = 1.0, retain_graph: bool = False, keep: bool | None = None
    ) -> None:
        """Add the gradient of the loss to ``.grad``, as ``loss.backward()`` would, without autograd's engine.

        Args:
            loss: a tensor made inside the recording: a number, or one a sample, of which the mean is taken.
            scale: factor on the gradients, for a ``GradScaler``.
            retain_graph: keep what the tape holds, for another loss of the same recording; otherwise it is released
                as the sweep passes.
            keep: keep what was measured of weights for the next gradient, where each is tried on random numbers before
                it is used, and measured anew if it fails (docs/tape.md says what a trial can miss). True pays where
                weights stay as they are, frozen ones for instance; it takes as much memory as they do. None keeps
                while gradients accumulate at the same weights; False never does.

        All or nothing: on an error no ``.grad`` has changed, and where the loss is not finite or the sweep fails, what
        the recorded code had changed is put back (buffers, random states, attributes of modules), unless another loss
        of the recording has had its gradient.

        Raises:
            InputError: the loss is no such tensor. NonFiniteError: it is NaN or infinite; says where that began.
            TapeError: the gradient leads through something that was not recorded.
        """
        factor = scale_factor(scale)
        try:
            with backward_half():
                gradients = self.gradients(loss, retain_graph=retain_graph, keep=keep)
            leaves = added(drained(gradients) if factor == 1 else [(leaf, g * factor) for leaf, g in gradients])
        except BaseException as error:
            if self._began or isinstance(error, NonFiniteError):  # and not a wrong argument
                self._fail()
            raise
        self._gave = True
        if self._swept:
            self._recorder.undo.forget()
        after_adding(leaves)

    def _fail(self) -> None:
        """A step that fails changes nothing, unless it has handed out a gradient already."""
        if not (self._gave or self._failed or current_recorder() is self._recorder):
            self._failed = True
            self.undo()

    @uncompiled
    def gradients(self, loss: Tensor, *, retain_graph: bool = False, keep: bool | None = False) -> LeafGradients:
        """The gradient of the loss for every leaf that requires one; ``.grad`` is left alone. Errors: ``backward``."""
        if self._failed:
            raise TapeError(
                "this step failed, and what its code had changed was put back; record it again. Of several losses take "
                "those first that may be differentiated whatever becomes of the others"
            )
        if self._swept:
            raise TapeError(
                "this recording was swept before, and what it held was released; say retain_graph=True the first time, "
                "or add the losses up"
            )
        if self._recorder.wrappers:
            raise DistributedError(
                f"{type(self._recorder.wrappers[0]).__name__} ran inside the recording, whose gradients are averaged "
                "over the processes by hooks of autograd; call hzo.backward(wrapped_model, loss_fn, x, y), which "
                "averages as they would, or record inside wrapped_model.no_sync() and average .grad yourself"
            )
        seeds, hooks = self.seed(loss)
        self._refuse_writes()
        self._began = True
        self._swept = not retain_graph
        keep_measured(self.tape, keep)
        if self._swept:
            self._recorder.release()
        # What autocast chose was recorded; the sweep's own products are taken as they are.
        with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
            # A hook may take a derivative of what was recorded, as implicit layers do.
            found = sweep(self.tape, seeds, hooks, free=not retain_graph and not hooks)
        leaves: dict[int, tuple[Tensor, Tensor]] = {}
        for v, g in found.items():  # one tensor may stand for two leaves, where autograd was told to forget in between
            leaf = self.tape.leaves[v]
            leaves[id(leaf)] = (leaf, leaves[id(leaf)][1] + g if id(leaf) in leaves else g)
        # As for autograd: one that is not trained any more since it was used gets none.
        return [(leaf, hooked(leaf, g)) for leaf, g in leaves.values() if leaf.requires_grad]

    def seed(self, loss: Tensor) -> tuple[dict[int, Tensor], dict[int, Callable[[Tensor], Tensor]]]:
        """What a sweep begins with, by value, and the hooks on intermediate tensors. Errors as ``backward``."""
        value = self._value_of_loss(loss)
        with torch.no_grad():
            return {value: torch.full_like(loss, 1 / max(loss.numel(), 1))}, self._hooks()

    def remember(self, *things: Any) -> None:
        """Note attributes of objects that are no modules, a loss with a counter for instance, for ``undo``."""
        self._recorder.undo.remember_attributes(things)

    def undo(self) -> None:
        """Put back what the recorded code changed: tensors that were there before, random states, mode flags."""
        self._recorder.undo.restore()

    def _value_of_loss(self, loss: Tensor) -> int:
        if not isinstance(loss, Tensor):
            raise InputError(
                f"expected the loss, a tensor made inside hzo.record(), got {type(loss).__name__}; a number or an "
                "object that holds the loss cannot be differentiated"
            )
        if not loss.dtype.is_floating_point:
            raise InputError(f"expected a loss of floating-point numbers, got {loss.dtype}")
        if current_recorder() is self._recorder:
            raise TapeError("the recording still runs; call backward behind the with block, not inside it")
        # The one time that the host waits for the device.
        if not captured(loss) and not bool(loss.detach().isfinite().all()):
            raise NonFiniteError(f"the loss is {_shown(loss)}; {self._where_it_began()}")
        value = self._recorder.read(loss) if loss.requires_grad else None
        if value is None or (self.tape.values[value].producer < 0 and value not in self.tape.leaves):
            if value is not None and self.tape.values[value].foreign is not None:
                raise InputError(
                    "this loss was not made inside the recording; compute it within the with block of hzo.record()"
                )
            raise InputError(
                "nothing that requires a gradient has a part in this loss: it was made outside the recording, under "
                "no_grad, or of detached tensors; compute it within the with block, with requires_grad=True on what "
                "is to be trained"
            )
        if not self._recorder.is_as_it_was(value):
            raise TapeError(
                "the loss was changed in place behind the recording (loss /= n, loss += penalty), which it does not "
                "see; do that inside of the with block of hzo.record(), or say tape.backward(loss, scale=1 / n)"
            )
        return value

    def _refuse_writes(self) -> None:
        value = self._recorder.written_since()
        if value is None:
            return
        about = self.tape.values[value]
        kind = "a weight" if about.weight and about.requires else "a tensor"
        made = "" if about.weight or about.producer < 0 else f", which {self.tape.operations[about.producer].name} made"
        raise TapeError(
            f"{kind} of shape {tuple(about.shape)}{made}, whose content the gradient needs, was written to, or given "
            "another content, after the recording and before its gradient was taken (an optimizer's step, a batch that "
            "was refilled, a model that was moved to another dtype); call tape.backward first, or give the code in the "
            "block a copy (clone())"
        )

    def _where_it_began(self) -> str:
        for op in self.tape.operations:
            for v in op.writes:
                tensor = None if v is None else self.tape.tensors[v]
                if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    inputs = [self.tape.tensors[r] for r in op.reads()]
                    if all(t is None or not t.is_floating_point() or bool(t.isfinite().all()) for t in inputs):
                        return f"the first call that made NaN or infinity out of numbers is {op.name}: {op!r}"
        if any(not bool(leaf.isfinite().all()) for leaf in self.tape.leaves.values()):
            return "NaN or infinity came in with a parameter"
        return "where it began was not kept, or it came in with the data; hzo.record(keep=True) keeps every result"

    def _hooks(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """Hooks that the user registered on intermediate tensors, and ``retain_grad``."""
        index = self.tape._index
        found: dict[int, Callable[[Tensor], Tensor]] = {}
        for tensor in self._recorder.seen():
            if not (tensor._backward_hooks or tensor.retains_grad) or tensor.is_leaf:
                continue
            value = index.get(id(tensor))
            if value is not None:
                found[value] = lambda g, t=tensor: _retained(t, hooked(t, g))  # type: ignore[misc]
        return found


def _retained(tensor: Tensor, grad: Tensor) -> Tensor:
    if tensor.retains_grad:
        tensor.grad = grad.clone() if tensor.grad is None else tensor.grad + grad
    return grad


def hooked(tensor: Tensor, grad: Tensor) -> Tensor:
    """What the hooks of a tensor make of its gradient."""
    for hook in tuple((tensor._backward_hooks or {}).values()):
        if getattr(hook, "__globals__", {}).get("__name__") == "torch.autograd.graph":  # also where it wraps the user's
            raise TapeError(
                "a hook on several tensors (torch.autograd.graph.register_multi_grad_hook) waits for autograd's "
                "engine, which never runs here; register one hook on each tensor (tensor.register_hook)"
            )
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad


def _shown(loss: Tensor) -> str:
    return str(float(loss.detach())) if loss.numel() == 1 else "not finite for some samples"


def accumulate(gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to ``.grad`` and run hooks for "accumulated". See ``added``."""
    after_adding(added(gradients))


def added(gradients: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Add gradients to ``.grad``; returns whose. What is handed over to the user owns its memory.

    All or nothing: whatever may fail is done before the first ``.grad`` changes.
    """
    made: list[tuple[Tensor, Tensor, bool]] = []
    with torch.no_grad():
        for leaf, gradient in gradients:
            before = leaf.grad
            if before is None and sys.getrefcount(gradient) <= _REFERENCES:
                gradient = gradient.detach()  # the transpose of a product keeps that alive  # noqa: PLW2901
                if _can_be_handed_over(gradient, leaf):
                    made.append((leaf, gradient, True))
                    continue
            dense = gradient.to(leaf.dtype if before is None else before.dtype)
            if dense.is_sparse and (before is None or before.is_sparse):
                made.append((leaf, dense.clone() if before is None else before + dense, True))
            elif before is None:
                made.append((leaf, torch.empty_like(leaf, requires_grad=False).copy_(dense), True))
            elif _can_be_added_to(before):
                made.append((leaf, dense, False))
            else:
                made.append((leaf, before + dense if dense.is_sparse else dense + before, True))
        for leaf, dense, new in made:
            if new or leaf.grad is None:
                leaf.grad = dense
            else:
                leaf.grad += dense
    return [leaf for leaf, _, _ in made]


def after_adding(leaves: Iterable[Tensor]) -> None:
    """Run the hooks of leaves whose ``.grad`` is complete, as optimizers within the backward pass are."""
    for leaf in leaves:
        for hook in tuple((getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values()):
            hook(leaf)


_REFERENCES = 2  # to a gradient that no one else holds: a variable, and the count itself


def drained(gradients: LeafGradients) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of parameter and gradient, each taken off the list as it is handed over, so that none is held twice."""
    gradients.reverse()
    while gradients:
        yield gradients.pop()


def _can_be_handed_over(gradient: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient's memory is nobody else's, and lies as that of ``.grad`` should; otherwise it is copied."""
    return (
        type(gradient) is Tensor
        and gradient.dtype == leaf.dtype
        and gradient.layout == leaf.layout == torch.strided
        and gradient.stride() == leaf.stride()
        and not (gradient.is_conj() or gradient.is_neg() or gradient.is_inference())
        and alone(gradient)
        and gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    )


def _can_be_added_to(grad: Tensor) -> bool:
    dense = grad.layout == torch.strided and not grad.requires_grad and not grad.is_inference()
    return dense and torch._debug_has_internal_overlap(grad) == 0


def record(*modules: nn.Module, keep: bool = False) -> AbstractContextManager[RecordedStep]:
    """Record a training step, so that its gradient can be taken by forward passes.

    ::

        with hzo.record() as tape:
            loss = criterion(model(x), y) + 1e-4 * penalty(model)   # any Python
        tape.backward(loss)                                          # fills .grad

    Inside the block, code runs as in ordinary training: same values, same random numbers, same buffers. What it
    computes is written down below autograd; autograd's own backward pass never runs. Where the block raises, buffers,
    random states (torch's, Python's, NumPy's, those of generators that were drawn from), and what the modules that were
    called hold (mode flags, numbers, lists, which tensors) are put back.

    Args:
        modules: whose state is put back as well, whether or not they are called as modules.
        keep: keep what code writes over in place; for plans that run calls again.

    Raises:
        InputError: something else than modules was given.
        TapeError: the same recording is entered twice: each step has a new one.

    Cost: one forward pass, and some microseconds a call. Source: ours.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise InputError(
                f"expected modules, whose state is put back where the block raises, got {type(module).__name__}; what "
                "is recorded need not be named: with hzo.record() as tape: …"
            )
    return Uncompiled(_recorded(modules, keep))


@contextmanager
def _recorded(modules: Iterable[nn.Module], keep: bool) -> Iterator[RecordedStep]:
    refuse_transforms()
    recorder = Recorder(keep, lean=LEAN)
    recorder.undo.remember_attributes(inner for module in modules for inner in module.modules())
    try:
        with recording(recorder):
            yield RecordedStep(recorder)
        recorder.seal()
    except BaseException:
        recorder.undo.restore()
        raise
