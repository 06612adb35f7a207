"""A progress bar for gradients that take long: slow simulators, deep trees, many repeats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from hzo._options import shown, whole
from hzo.errors import InputError
from hzo.execution import QueryCount, open_count


@dataclass(repr=False)
class _Shown(QueryCount):
    """A counter that moves a bar on. One query or one operator swept is one step of it."""

    bar: Any = field(default=None, repr=False)

    def changed(self) -> None:
        done = self.queries - self.under_way + self.adjoints
        if done > self.bar.n:
            self.bar.update(done - self.bar.n)


class Queries(Protocol):
    """Whatever says how many queries a gradient asks: a plan of a network or of a black box."""

    @property
    def queries(self) -> int: ...


@contextmanager
def show_progress(plan: Queries | None = None, *, gradients: int = 1, **options: Any) -> Iterator[QueryCount]:
    """Show a progress bar for all gradients that are taken inside the ``with`` block.

    ::

        with hzo.show_progress(plan):
            hzo.backward(chain, loss_fn, x, y, plan=plan)

    Args:
        plan: what will run, of ``hzo.plan`` or of a black box, ``box.plan_for(x)``. Its predicted count is the length
            of the bar, for the batch size that it was traced with. Without a plan the bar counts up and has no end.
        gradients: how many gradients the block takes.
        options: of ``tqdm.auto.tqdm``: ``desc``, ``disable``, ``file``, ``leave``, …

    Yields the counter (as ``hzo.count_queries``). A step of the bar is a query on one sample, or one operator swept.
    Queries of a black box are steps when their answers are there, with workers or without.

    Cost: no query; some microseconds a query call. Source: ours; the bar is tqdm's.

    Raises:
        InputError: tqdm is not installed, ``plan`` is no plan, or ``gradients`` is not a whole number of at least 1.
    """
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError:
        raise InputError(
            'hzo.show_progress needs tqdm, which is not installed; run: pip install "hzo[progress]"'
        ) from None
    if plan is not None and not isinstance(getattr(plan, "queries", None), int):
        raise InputError(
            f"expected a plan of hzo.plan or box.plan_for, or none, got {shown(plan)}; the bar's label goes by name: "
            "desc='gradient'"
        )
    whole("gradients", gradients)
    total = None if plan is None else gradients * (plan.queries + getattr(plan, "adjoints", 0))
    with tqdm(**{"total": total, "desc": "hzo", "unit": " queries", "unit_scale": True, **options}) as bar:
        with open_count(_Shown(bar=bar)) as count:
            yield count
        bar.refresh()
