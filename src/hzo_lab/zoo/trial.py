"""One family tried: built, differentiated by backpropagation and by hzo, compared. Runs in a process of its own."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hzo.errors import HzoError
from hzo_lab.zoo import engine
from hzo_lab.zoo.case import Case, NotBuiltError
from hzo_lab.zoo.comparison import Tolerance, largest_difference, tolerance
from hzo_lab.zoo.operations import forward_equivalents
from hzo_lab.zoo.registry import Family, build

RIGHT, WRONG, REFUSED, RAW, SLOW, NOT_BUILT = "right", "WRONG", "refused", "raw", "slow", "not built"
VERDICTS = (RIGHT, WRONG, REFUSED, RAW, SLOW, NOT_BUILT)
_COARSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Record = dict[str, Any]


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the ATen calls on values that carry a gradient, and notes the coarsest dtype that such a value has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.coarsest = torch.float64

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        if (
            torch.is_grad_enabled()
            and any(t.requires_grad for t in inputs)
            and func is not torch.ops.aten.detach.default
        ):
            made = [
                t
                for t in pytree.tree_leaves(out)
                if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
            ]
            if made:
                self.counts[str(func)] += 1
            for tensor in made:
                if tensor.dtype in _COARSE and _COARSE.index(tensor.dtype) > _COARSE.index(self.coarsest):
                    self.coarsest = tensor.dtype
        return out


def try_family(family: Family, dtype: torch.dtype, report: Callable[[Record], None], calls: bool = False) -> None:
    """Try a family, and report what is known of it at each stage: a process that is killed leaves the last report."""
    torch.set_num_threads(1)
    record: Record = {"library": family.library, "family": family.name, "dtype": str(dtype).removeprefix("torch.")}
    report(
        {**record, "verdict": NOT_BUILT, "reason": "building it or backpropagation took too long or too much memory"}
    )
    try:
        case, dtype = _built(family, dtype)
        record |= {"dtype": str(dtype).removeprefix("torch."), "model": case.note}
        state = _State(case)
        expected, facts, mode, allowed = _reference(case, state, dtype)
    except NotBuiltError as error:
        report({**record, "verdict": NOT_BUILT, "reason": _line(error)})
        return
    record |= facts
    if calls:
        record["calls"] = dict(sorted(mode.counts.items()))
    report({**record, "verdict": SLOW, "reason": "hzo's gradient took too long or too much memory"})
    for turn in ("first", "second"):
        state.reset()
        try:
            step = engine.gradient(case.call)
        except HzoError as error:
            report({**record, "verdict": REFUSED, "reason": f"{type(error).__name__}: {_line(error)}"})
            return
        except Exception as error:
            report({**record, "verdict": RAW, "reason": f"{type(error).__name__}: {_line(error)}"})
            return
        difference = largest_difference(_gradients(case), expected, allowed.floor)
        record[f"{turn}_seconds"] = round(step.seconds, 5)
        if turn == "first" or difference.worst > record["error"]:
            record |= {"error": float(f"{difference.worst:.3g}"), "worst_parameter": difference.parameter}
        if difference.worst > allowed.error:
            reason = difference.problem or f"error {difference.worst:.2g} in {difference.parameter}, {turn} gradient"
            report({**record, "verdict": WRONG, "reason": reason})
            return
        buffers = state.buffers_that_differ(facts["buffers"])
        if buffers:
            report(
                {
                    **record,
                    "verdict": WRONG,
                    "reason": f"the gradient is right; the buffer {buffers} is not",
                    "buffers": None,
                }
            )
            return
        report(
            {
                **record,
                "verdict": SLOW,
                "reason": "the second gradient took too long or too much memory",
                "buffers": None,
            }
        )
    record.pop("buffers")
    report({**record, "verdict": RIGHT, "reason": ""})
    state.reset()
    equivalents, share = forward_equivalents(case.call)
    report(
        {
            **record,
            "forward_equivalents": float(f"{equivalents:.4g}"),
            "share_by_queries": float(f"{share:.3g}"),
            "verdict": RIGHT,
            "reason": "",
        }
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _built(family: Family, dtype: torch.dtype) -> tuple[Case, torch.dtype]:
    """The family in the dtype, or in float32 where its library computes in float32 whatever the model's dtype."""
    torch.set_default_dtype(dtype if dtype == torch.float64 else torch.float32)
    try:
        case = build(family, dtype)
        _call(case)
        return case, dtype
    except NotBuiltError as error:
        mixed = any(word in str(error) for word in ("Float", "Double", "float", "dtype", "double"))
        if dtype != torch.float64 or not mixed:
            raise
        reason = error
    torch.set_default_dtype(torch.float32)
    try:
        case = build(family, torch.float32)
        _call(case)
    except NotBuiltError:
        raise reason from None
    return case, torch.float32


def _call(case: Case) -> None:
    try:
        case.call()
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error


class _State:
    """What a step changes besides gradients: buffers and random generators, put back before every run."""

    def __init__(self, case: Case) -> None:
        self.case, self.kept = case, {name: b.detach().clone() for name, b in case.model.named_buffers()}

    def reset(self) -> None:
        for p in self.case.model.parameters():
            p.grad = None
        with torch.no_grad():
            for name, buffer in self.case.model.named_buffers():
                kept = self.kept.get(name)
                if kept is not None and kept.shape == buffer.shape:
                    buffer.copy_(kept)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    def buffers(self) -> dict[str, Tensor]:
        return {name: b.detach().clone() for name, b in self.case.model.named_buffers()}

    def buffers_that_differ(self, expected: dict[str, Tensor]) -> str:
        now = dict(self.case.model.named_buffers())
        return next((name for name, b in expected.items() if name not in now or not _close(now[name], b)), "")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-8, equal_nan=True)


def _gradients(case: Case) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in case.model.named_parameters() if p.requires_grad}


def _reference(
    case: Case, state: _State, dtype: torch.dtype
) -> tuple[dict[str, Tensor | None], Record, _Calls, Tolerance]:
    """The gradient by backpropagation, twice, to know that it can be repeated, and what is measured beside it."""
    mode = _Calls()
    runs: list[dict[str, Tensor | None]] = []
    seconds = 0.0
    for turn in range(2):
        state.reset()
        try:
            start = time.process_time()
            if turn == 0:
                with mode:
                    loss = case.call()
            else:
                loss = case.call()
            loss.backward()  # type: ignore[no-untyped-call]
            seconds = time.process_time() - start
        except Exception as error:
            raise NotBuiltError(f"backpropagation fails: {type(error).__name__}: {error}") from error
        runs.append({name: None if g is None else g.detach().clone() for name, g in _gradients(case).items()})
        buffers = state.buffers()
    known = [g for g in runs[1].values() if g is not None]
    if not known or not any(bool(g.to_dense().any()) for g in known):
        raise NotBuiltError("backpropagation gives no gradient")
    if not bool(loss.isfinite()) or not all(bool(g.to_dense().isfinite().all()) for g in known):
        raise NotBuiltError("the loss, or its gradient by backpropagation, is NaN or infinite")
    allowed = tolerance(dtype, mode.coarsest)
    if largest_difference(runs[0], runs[1], allowed.floor).worst > allowed.error:
        raise NotBuiltError("backpropagation gives another gradient the second time")
    facts: Record = {
        "parameters": sum(p.numel() for p in case.model.parameters() if p.requires_grad),
        "computes_in": str(mode.coarsest).removeprefix("torch."),
        "loss": float(loss.detach()),
        "backprop_seconds": round(seconds, 5),
        "buffers": buffers,
    }
    return runs[1], facts, mode, allowed
