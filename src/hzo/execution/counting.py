"""Counting: what a gradient costs, counted where the model is run and nowhere else.

The words are those of the design: a *query* is one evaluation of a segment on one sample at a perturbed state; a
*stage evaluation* is one stage on one sample; *forward equivalents* are the operations of all queries over those of
one forward pass of the batch. Base passes, checks, loss evaluations and the local products that turn a cotangent into
a parameter gradient are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(repr=False)
class QueryCount:
    """Numbers of forward evaluations that ran inside a ``with hzo.count_queries()`` block.

    All but ``forward_equivalents`` are whole numbers.

    Attributes:
        queries: evaluations of a segment on one sample at a perturbed state.
        stage_evaluations: stages run in those queries, on one sample each; a part of a stage counts as one.
        adjoints: applications of a measured or closed-form adjoint to the cotangents of a batch.
        parameter_rules: gradients of parameters, and of what is derived from them, by the rule of an operation.
        loss_evaluations: evaluations of the loss on one sample beyond the one that the caller is given; with a plan,
            what measures the loss's own weights is among them.
        base_evaluations: stages run on one sample without a perturbation (base passes, recomputation).
        check_evaluations: stages run on one sample to test determinism, structure or shapes.
        boxes: by the name of a black box, the queries that ran it (see ``hzo.blackbox``).
        under_way: of the queries, those of black boxes that have not been answered yet; 0 between gradients.
    """

    queries: int = 0
    stage_evaluations: int = 0
    adjoints: int = 0
    parameter_rules: int = 0
    loss_evaluations: int = 0
    base_evaluations: int = 0
    check_evaluations: int = 0
    boxes: dict[str, int] = field(default_factory=dict)
    exact_forward_equivalents: Fraction = field(default_factory=Fraction)
    under_way: int = field(default=0, compare=False)

    @property
    def forward_equivalents(self) -> float:
        """Operations of all queries over those of one forward pass of the batch."""
        return float(self.exact_forward_equivalents)

    def changed(self) -> None:
        """Called whenever something was added or answered; a display overrides it."""

    def __repr__(self) -> str:
        figures = {name: value for name, value in vars(self).items() if value and isinstance(value, (int, dict))}
        shown = [f"{name}={value!r}" for name, value in figures.items()]
        if self.exact_forward_equivalents:
            shown.append(f"forward_equivalents={self.forward_equivalents:.6g}")
        return f"QueryCount({', '.join(shown)})"


FORWARD_PASS, TRIAL_RUN = "a forward pass", "a trial run of a few samples"
_doing: ContextVar[str] = ContextVar("hzo_doing", default=FORWARD_PASS)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Inside, errors of what is run say that it was run for this."""
    token = _doing.set(what)
    try:
        yield
    finally:
        _doing.reset(token)


def being_done() -> str:
    """What the model is being run for, in words for an error message."""
    return _doing.get()


_open: ContextVar[tuple[QueryCount, ...]] = ContextVar("hzo_open_counts", default=())


@contextmanager
def count_queries() -> Iterator[QueryCount]:
    """Count the forward evaluations that hzo runs inside the ``with`` block: queries, stages, forward equivalents.

    Yields a ``QueryCount``. Blocks may be nested; each sees its own total.
    """
    with open_count(QueryCount()) as count:
        yield count


@contextmanager
def open_count(count: QueryCount) -> Iterator[QueryCount]:
    """Add to this counter all that runs inside."""
    token = _open.set((*_open.get(), count))
    try:
        yield count
    finally:
        _open.reset(token)


@contextmanager
def as_checks() -> Iterator[None]:
    """Inside, whatever is run counts as ``check_evaluations`` and as nothing else."""
    with _apart(
        lambda run: add(check_evaluations=run.stage_evaluations + run.base_evaluations + run.check_evaluations)
    ):
        yield


@contextmanager
def as_loss() -> Iterator[None]:
    """Inside, whatever is run counts as ``loss_evaluations``: a plan ends where the loss begins."""
    with _apart(lambda run: add(loss_evaluations=run.queries + run.loss_evaluations)):
        yield


@contextmanager
def under_way(queries: int) -> Iterator[None]:
    """Inside, so many queries are counted at once, and answered one after the other: ``answered`` tells of each."""
    counts = _open.get()
    before = [count.under_way for count in counts]
    for count in counts:
        count.under_way += queries
    try:
        yield
    finally:
        for count, others in zip(counts, before, strict=True):
            count.under_way = others
            count.changed()


def answered(queries: int) -> None:
    """So many queries of those under way have their answers."""
    for count in _open.get():
        if count.under_way:
            count.under_way = max(0, count.under_way - queries)
            count.changed()


@contextmanager
def _apart(count: Callable[[QueryCount], None]) -> Iterator[None]:
    """What runs inside is counted by itself; ``count`` adds it up as something else, also where it failed."""
    inside = QueryCount()
    token = _open.set((inside,))
    try:
        yield
    finally:
        _open.reset(token)
        count(inside)


def add(
    *,
    queries: int = 0,
    stage_evaluations: int = 0,
    adjoints: int = 0,
    parameter_rules: int = 0,
    loss_evaluations: int = 0,
    base_evaluations: int = 0,
    check_evaluations: int = 0,
    forward_equivalents: Fraction | int = 0,
    boxes: Iterable[str] = (),
) -> None:
    """Add to every open counter. Called by whatever runs a part of the model; ``boxes`` are those that ran."""
    names = tuple(boxes)
    for count in _open.get():
        for name in names:
            count.boxes[name] = count.boxes.get(name, 0) + queries
        count.queries += queries
        count.stage_evaluations += stage_evaluations
        count.adjoints += adjoints
        count.parameter_rules += parameter_rules
        count.loss_evaluations += loss_evaluations
        count.base_evaluations += base_evaluations
        count.check_evaluations += check_evaluations
        count.exact_forward_equivalents += forward_equivalents
        count.changed()
