"""A run: a model in training, what surrounds it, and how it begins or is taken up again."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo._files import replace_file
from hzo.errors import InputError, NonFiniteError
from hzo.execution import count_queries
from hzo.verification import GradientCheck
from hzo_lab.data import Dataset, Split, batches_per_epoch, epoch_order, make_batch, registry
from hzo_lab.records import (
    CONFIG,
    MetricsLog,
    alone_in,
    derive,
    disk_errors,
    generator,
    generator_states,
    new_run_directory,
    refuse_used_directory,
    seed_everything,
)
from hzo_lab.training import checkpoint, models
from hzo_lab.training.checkpoint import Counters
from hzo_lab.training.config import TrainConfig, to_json
from hzo_lab.training.learning_rate import make_optimizer
from hzo_lab.training.methods import Method, bind_method
from hzo_lab.training.probe import check_method, cosine_to_backprop
from hzo_lab.training.ranks import ranks

EVALUATION_BATCH = 500

loss_fn = F.cross_entropy  # the function itself: plans check that targets fit it


class Run:
    """A model in training: all that changes from step to step, and the directory that it is kept in."""

    def __init__(self, config: TrainConfig, out: Path, dataset: Dataset) -> None:
        self.config = config
        self.ranks = ranks(config.device)
        self.out = out
        self.data = dataset
        self.device = device_of(config)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        seed_everything(config.seed)
        self.model = models.build(
            config.model,
            dataset.shape,
            len(dataset.classes),
            depth=config.depth,
            width=config.width,
            activation=config.activation,
            seed=config.seed,
        ).to(self.device, self.dtype)
        if not self.ranks.first:  # dropout and random directions are each process's own
            seed_everything(derive(config.seed, "rank", self.ranks.rank))
        self.optimizer = make_optimizer(config, self.model)
        self.batch_size = min(config.batch_size, len(dataset.train))
        self.counters = Counters()
        # The probe: training examples that no other random number of the run has anything to do with.
        probe = epoch_order(len(dataset.train), config.seed, -1)[: config.probe_size]
        self.probe = self.batch(dataset.train, probe)
        first = self.ranks.share(epoch_order(len(dataset.train), config.seed, 0)[: self.batch_size])
        self.method: Method = bind_method(config, self.model, loss_fn, self.batch(dataset.train, first)[0])

    def batch(self, split: Split, indices: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return make_batch(self.data, split, indices, device=self.device, dtype=self.dtype, augment=augment)

    @property
    def steps_per_epoch(self) -> int:
        return batches_per_epoch(len(self.data.train), self.batch_size)

    @property
    def total(self) -> int | None:
        return None if self.config.budget is not None else self.config.epochs * self.steps_per_epoch

    @property
    def done(self) -> float:
        """The share of the run that lies behind: of its steps, or of its budget."""
        counters = self.counters
        if self.config.budget is None:
            return counters.step / (self.config.epochs * self.steps_per_epoch)
        spent = float(counters.cost)
        # Over when another gradient would not fit: a budget is never overdrawn.
        return (
            1.0
            if counters.step and spent + float(counters.last_cost) > self.config.budget
            else spent / self.config.budget
        )

    def gradient(self, x: Tensor, y: Tensor) -> float:
        """One gradient into ``.grad``, counted; returns the loss."""
        counters = self.counters
        self.optimizer.zero_grad(set_to_none=True)
        own = () if self.ranks.first else (self.ranks.rank,)
        directions = generator(self.config.seed, "directions", counters.step, *own)
        with count_queries() as count, self.ranks.together(self.model, x, y, repr(self.config)) as mean:
            loss = float(mean(self.method.gradient(x, y, directions)))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss} at step {counters.step + 1}: the weights diverged. Start "
                "again with a "
                f"lower --lr (it was {self.config.lr:g})."
            )
        cost = count.exact_forward_equivalents + self.method.passes
        if self.config.budget is not None and cost > self.config.budget:
            raise InputError(
                f"one gradient by {self.method.name} costs {float(cost):,.0f} forward equivalents, "
                "the budget is "
                f"{self.config.budget:,.0f}: give a larger --budget or a smaller network."
            )
        queries, evaluations = self.ranks.total(count.queries, count.stage_evaluations)
        counters.queries += queries
        counters.stage_evaluations += evaluations
        counters.adjoints += count.adjoints
        counters.forward_equivalents += count.exact_forward_equivalents
        counters.cost += cost
        counters.last_cost = cost
        return loss

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return evaluate_batch(self.model, x, y)[1] / len(y)

    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test split."""
        loss, right = 0.0, 0
        for first in range(0, len(self.data.test), EVALUATION_BATCH):
            indices = torch.arange(first, min(first + EVALUATION_BATCH, len(self.data.test)))
            batch_loss, batch_right = evaluate_batch(self.model, *self.batch(self.data.test, indices))
            loss += batch_loss
            right += batch_right
        return loss / len(self.data.test), right / len(self.data.test)

    def cosine(self) -> float:
        seed = derive(self.config.seed, "cosine", self.counters.step)
        return cosine_to_backprop(self.method, self.model, loss_fn, *self.probe, seed=seed)

    def check(self) -> GradientCheck:
        """Whether the loss agrees with the gradient on the probe, by forward passes."""
        seed = derive(self.config.seed, "check", self.counters.step)
        return check_method(self.method, self.model, loss_fn, *self.probe, seed=seed)

    def save(self, log: MetricsLog | None) -> Path:
        """Write a checkpoint, with the random states of all processes; None for the log of those that do not write."""
        states = self.ranks.gathered(generator_states())

        def write() -> Path:
            assert log is not None
            log.sync()  # the log that a checkpoint speaks of must outlive whatever the checkpoint outlives
            self.counters.log_lines, self.counters.log_bytes = log.lines, log.size
            return checkpoint.save(self.out, self.model, self.optimizer, self.counters, states)

        return self.ranks.on_first(write)


def evaluate_batch(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
    """Summed loss and number of right answers in evaluation mode; no buffer moves."""
    training = model.training
    model.eval()
    with torch.no_grad():
        scores = model(x).float()
    model.train(training)
    return float(F.cross_entropy(scores, y, reduction="sum")), int((scores.argmax(1) == y).sum())


def device_of(config: TrainConfig) -> torch.device:
    return device_called(config.device)


def device_called(name: str) -> torch.device:
    """The device of this name, if this machine has it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"expected a device that this machine has, got {name!r} ({reason}): try cpu.") from None
    return device


def start(config: TrainConfig, out: Path, dataset: Dataset | None = None) -> Run:
    """A new run in an empty directory, which is made when all else is known to be right."""
    among = ranks(config.device)
    among.on_first(lambda: refuse_used_directory(out))
    run = Run(config, out, dataset or load_data(config))

    def begin() -> None:
        new_run_directory(out)
        with alone_in(out):
            refuse_used_directory(out)  # of two processes that start in one directory, the second comes too late
            with disk_errors(f"writing {out / CONFIG}", "start again"):
                replace_file(out / CONFIG, to_json(config).encode())

    among.on_first(begin)
    return run


def resume(config: TrainConfig, out: Path, dataset: Dataset | None = None) -> Run:
    """The run in ``out`` as its newest checkpoint left it; from the beginning if there is none yet."""
    among = ranks(config.device)
    # What another process is writing there must not be taken for what a kill left.
    with alone_in(out) if among.first else nullcontext():
        run = Run(config, out, dataset or load_data(config))
        newest = among.on_first(lambda: checkpoint.latest(out))
        if newest is not None:
            run.counters = checkpoint.load(newest, run.model, run.optimizer, among.rank, among.size)
        among.gathered(None)  # all have read it
    return run


def load_data(config: TrainConfig) -> Dataset:
    folder = None if config.data_dir is None else Path(config.data_dir)
    return registry.load(config.data, folder, image_size=config.image_size)
