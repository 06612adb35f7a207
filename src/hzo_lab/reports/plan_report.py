"""Plans of a configuration's network: one, or all trees beside each other, predicted and measured."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

import hzo
from hzo.errors import HzoError
from hzo.plans import FIXED
from hzo_lab.data import DATA_SETS, epoch_order, make_batch
from hzo_lab.records import generator
from hzo_lab.training import CHUNK_BYTES, TrainConfig, device_of, load_data, loss_fn, models

SHORT = 1.0  # seconds; what takes less is run twice, for the time of the second
COMPARED: tuple[str | int, ...] = (*FIXED, 4, "planned")
CLASSES = 10  # of the random labels that stand in for data of which only the shape is known

StageCotangents = Sequence[Tensor | tuple[Tensor | None, ...] | None]


@dataclass(frozen=True, eq=False)
class PlannedNetwork:
    """A network with a batch of what it will be trained on; ``real`` where that is data, not random numbers."""

    config: TrainConfig
    model: nn.Module
    chain: hzo.Chain
    x: Tensor
    y: Tensor
    real: bool


@dataclass(frozen=True)
class MeasuredGradient:
    """One gradient, run and counted. ``cosine``: the lowest at a stage boundary; ``expected``: what was predicted of it
    there, None where nothing was."""

    forward_equivalents: float
    cosine: float | None
    expected: float | None
    seconds: float


@dataclass(frozen=True)
class PlannedTree:
    """What came of one tree: a plan, what was measured of it, or the reason why there is none."""

    tree: str
    repeats: str
    plan: hzo.Plan | None = None
    measured: MeasuredGradient | None = None
    reason: str = ""


def planned_network(config: TrainConfig) -> PlannedNetwork:
    """The network and its first batch: real where the data are at hand, else random numbers of their shape."""
    device, dtype = device_of(config), getattr(torch, config.dtype)
    real = DATA_SETS[config.data].bundled or config.data_dir is not None
    if real:
        dataset = load_data(config)
        shape, classes = dataset.shape, len(dataset.classes)
        indices = epoch_order(len(dataset.train), config.seed, 0)[: config.batch_size]
        x, y = make_batch(dataset, dataset.train, indices, device=device, dtype=dtype)
    else:
        shape, classes = DATA_SETS[config.data].shape_for(config.image_size), CLASSES
        random = generator(config.seed, "plan")
        x = torch.randn(config.batch_size, *shape, generator=random).to(device, dtype)
        y = torch.randint(classes, (config.batch_size,), generator=random).to(device)
    model = models.build(
        config.model,
        shape,
        classes,
        depth=config.depth,
        width=config.width,
        activation=config.activation,
        seed=config.seed,
    ).to(device, dtype)
    return PlannedNetwork(config, model, hzo.trace(model, x), x, y, real)


def all_trees(given: PlannedNetwork, options: Mapping[str, Any]) -> Iterator[PlannedTree]:
    """The plans of all trees; where something is aimed at, with repeats of two kinds. Errors become reasons."""
    aimed = any(options.get(name) is not None for name in ("target_cosine", "budget", "seconds"))
    kinds = ("uniform", "optimal") if aimed else ("1",)
    for tree, repeats in product(COMPARED, kinds):
        name = f"{tree}-ary" if isinstance(tree, int) else tree
        aim = {"repeats": repeats} if aimed else {}
        try:
            yield PlannedTree(name, repeats, hzo.plan(given.chain, **{**options, "tree": tree, **aim}))
        except HzoError as error:
            yield PlannedTree(name, repeats, reason=brief(str(error)))


def brief(message: str, longest: int = 90) -> str:
    """The first clause of an error, without what stands in brackets, for a table's cell."""
    message = re.sub(r" \([^()]*\)", "", message)
    for mark in ("; ", ". ", ": "):
        head, found, _ = message.partition(mark)
        if found and len(head) >= 20:
            message = head
    return message if len(message) <= longest else message[: longest - 1] + "…"


def exact_cotangents(given: PlannedNetwork) -> StageCotangents:
    """Without noise, in float64, every boundary by the adjoints of single operations: the yardstick."""
    model, x = copy.deepcopy(given.model).double(), given.x.double()
    return hzo.cotangents(hzo.trace(model, x), loss_fn, x, given.y)


def forward_seconds(given: PlannedNetwork) -> float:
    """The fastest of a few forward passes."""
    times, model = [], copy.deepcopy(given.model)  # whose buffers may move
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            float(model(given.x).sum())
            times.append(time.perf_counter() - start)
    return min(times)


def measured(
    given: PlannedNetwork,
    outcome: PlannedTree,
    exact: StageCotangents,
    noise: hzo.Noise | None,
    *,
    pass_seconds: float,
    longest: float,
) -> PlannedTree:
    """The outcome with what one gradient by its plan really costs and gives, under this noise, or else the plan's.

    A plan that would run longer than ``longest`` seconds, at the price of forward passes, is left out with that reason.
    """
    plan = outcome.plan
    if plan is None:
        return outcome
    if (guess := pass_seconds * plan.forward_equivalents) > longest:
        return replace(outcome, reason=f"not run: would take about {guess:,.0f} s")
    chain, noise = given.chain, noise or plan.noise
    if noise is not None and noise.present:
        chain = hzo.noisy(chain, readout=noise.readout, process=noise.process, seed=given.config.seed + 1)
    memory = CHUNK_BYTES.get(given.x.device.type, CHUNK_BYTES["cpu"])
    seconds = inf
    for _ in range(2):
        start = time.perf_counter()
        try:
            with hzo.count_queries() as count:
                found = hzo.cotangents(chain, loss_fn, given.x, given.y, plan=plan, memory=memory)
        except HzoError as error:
            return replace(outcome, reason=brief(str(error)))
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > SHORT:
            break
    cosines = [c for ours, true in zip(found[:-1], exact[:-1], strict=True) for c in _cosines(ours, true)]
    result = MeasuredGradient(
        count.forward_equivalents, min(cosines, default=None), expected_at_boundaries(given.chain, plan), seconds
    )
    return replace(outcome, measured=result)


def expected_at_boundaries(chain: hzo.Chain, plan: hzo.Plan) -> float | None:
    """The lowest cosine expected at a stage boundary; None where nothing is expected."""
    if plan.expected is None:
        return None
    inner = set(chain.traced.boundaries)
    found = [estimate for estimate in plan.expected.errors if estimate[0] in inner]
    return plan.expected.cosine_of(*found) if found else None


def _cosines(
    ours: Tensor | tuple[Tensor | None, ...] | None, true: Tensor | tuple[Tensor | None, ...] | None
) -> Iterator[float]:
    ours = ours if isinstance(ours, tuple) else (ours,)
    true = true if isinstance(true, tuple) else (true,)
    for a, b in zip(ours, true, strict=False):
        if a is not None and b is not None:
            size = float(a.double().norm() * b.double().norm())
            if size > 0:
                yield float((a.double() * b).sum()) / size
