"""What a plan may be asked for: options that are checked once, whoever gives them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hzo._options import one_of, positive, whole
from hzo.errors import PlanError
from hzo.finite_differences import Scheme, check_scheme, check_step
from hzo.noise import Noise
from hzo.plans.trees import Tree, check_tree
from hzo.structure import Assume, check_assume

Boundaries = Literal["needed", "all"]
_BOUNDARIES: tuple[Boundaries, ...] = get_args(Boundaries)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of ``hzo.plan`` that a plan keeps; see there. What was measured, and what it aims for, is not here.

    Raises:
        InputError: a number out of range. PlanError: an unknown word, or options that do not go together.
    """

    tree: Tree = "planned"
    assume: Assume = "structure"
    scheme: Scheme = "central"
    step: float | None = None
    noise: Noise | None = None
    boundaries: Boundaries = "needed"
    spacing: int | None = None
    mu: float | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        check_tree(self.tree)
        check_assume(self.assume)
        check_scheme(self.scheme)
        check_step(self.step)
        check_boundaries(self.boundaries)
        check_spacing(self.spacing, self.assume)
        check_smoothing(self.mu, self.draws, self.scheme)

    @property
    def given(self) -> dict[str, Any]:
        """By name, what a plan like this one is asked for."""
        return {field.name: getattr(self, field.name) for field in fields(PlanOptions)}


def check_boundaries(boundaries: str) -> Boundaries:
    """Which boundaries are estimated, or an error that lists the ways."""
    return one_of("boundaries", boundaries, _BOUNDARIES, PlanError)


def check_spacing(spacing: int | None, assume: Assume) -> int | None:
    """A spacing that may be used: a whole number from 1 on, where locality is assumed; or None for exact colorings."""
    if spacing is None:
        return None
    whole("spacing", spacing, "None takes exact colorings")
    if assume == "nothing":
        raise PlanError("spacing thins colorings, which assume='nothing' has none of; assume 'locality' or 'structure'")
    return spacing


def check_smoothing(mu: float | None, draws: int, scheme: Scheme) -> None:
    """Raises InputError where a number is out of range, PlanError where smoothing cannot be had as asked."""
    whole("draws", draws)
    if mu is None:
        if draws != 1:
            raise PlanError(f"draws={draws} are points of a smoothing: give its width, too, mu=")
        return
    positive("width mu", mu, "None takes no smoothing")
    if scheme != "central":
        raise PlanError(
            "smoothing moves the point at which differences are taken, where no result is stored for "
            "forward ones: leave out mu, or take scheme='central'"
        )


def check_not_modelled(mu: float | None, modelled: bool) -> None:
    """Raises PlanError where the error model is to predict what smoothing does."""
    if mu is not None and modelled:
        raise PlanError("the error model knows nothing of smoothing: leave out mu, or noise, calibration and target")
