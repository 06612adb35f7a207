"""Checkpoints: all that a run needs to go on as if it had never stopped.

One directory a checkpoint, ``checkpoints/step-00000042``, written under another name and renamed when it is
whole: a run that is killed at any moment finds complete checkpoints and nothing else. Weights and tensors of the
optimizer are safetensors, the rest is JSON: nothing in a checkpoint can run code when it is read.
``sha256.json`` holds the hashes of the other files, so damage is found when it is read and not much later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hzo._files import sync_directory, write_synced
from hzo_lab.errors import CheckpointError
from hzo_lab.records import disk_errors, generator_states, restore_generators

FOLDER = "checkpoints"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
HASHES = "sha256.json"
FORMAT = "hzo-checkpoint-1"
KEEP = 2  # the newest, and one to fall back on by hand


@dataclass
class Counters:
    """Where a run is and what it has spent. The next batch is ``position`` of epoch ``epoch``, both from 0.

    ``cost`` is what a budget is held against: the forward equivalents, and two for every reverse sweep.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    queries: int = 0
    stage_evaluations: int = 0
    adjoints: int = 0
    forward_equivalents: Fraction = field(default_factory=Fraction)
    cost: Fraction = field(default_factory=Fraction)
    last_cost: Fraction = field(default_factory=Fraction)
    seconds: float = 0.0
    log_lines: int = 0
    log_bytes: int = 0


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: Counters,
    random: Sequence[tuple[dict[str, Tensor], dict[str, Any]]] | None = None,
) -> Path:
    """Write a checkpoint of this moment, drop the oldest. The one before stays whole whatever happens.

    Args:
        random: states of the random generators of all processes of the run; None for those of this one.
    """
    folder = run / FOLDER
    final = folder / f"step-{counters.step:08d}"
    if final.is_dir():  # the same step of the same run: the same content
        return final
    partial = folder / f".writing-{counters.step:08d}"
    weights = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    tensors, values = _split_optimizer(optimizer.state_dict())
    (random_tensors, random_values), *others = random or [generator_states()]
    for rank, (tensors_there, _) in enumerate(others, start=1):
        random_tensors |= {f"rank.{rank}.{name}": t for name, t in tensors_there.items()}
    contents = {
        # Metadata of one entry: several are written in no fixed order, and equal weights would be other bytes.
        WEIGHTS: save_tensors(weights, metadata={"format": "pt"}),
        OPTIMIZER: save_tensors({**tensors, **random_tensors}),
    }
    state = {
        "format": FORMAT,
        "counters": {**vars(counters), **{name: str(getattr(counters, name)) for name in _FRACTIONS}},
        "optimizer": values,
        "random": random_values,
        "ranks": [values for _, values in others],
    }
    contents[STATE] = (json.dumps(state) + "\n").encode()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents[HASHES] = (json.dumps(hashes, indent=2) + "\n").encode()
    older = f"go on with `hzo train --resume {run}`: the checkpoint before this one is whole"
    with disk_errors(f"writing the checkpoint of step {counters.step} in {folder}", older):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in contents.items():
                write_synced(partial / name, content)
            sync_directory(partial)
            os.rename(partial, final)
            sync_directory(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for old in _steps(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


_FRACTIONS = ("forward_equivalents", "cost", "last_cost")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()  # a copy each: tied weights share memory, files may not


def _steps(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p.is_dir())


def step_of(checkpoint: Path) -> int:
    """The number of steps that lie behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None if there is none yet. Clears what a kill left half written."""
    for partial in (run / FOLDER).glob(".writing-*"):
        shutil.rmtree(partial, ignore_errors=True)
    found = _steps(run)
    return found[-1] if found else None


def load(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, size: int = 1
) -> Counters:
    """Put model, optimizer and the global random generators back to a checkpoint; returns its counters.

    Everything is read and compared with the model before anything of it is changed.

    Args:
        rank, size: which process of how many this is: each goes on with random states of its own.
    """
    state = _read_state(checkpoint)
    try:
        values, random_values, others = state["optimizer"], state["random"], state.get("ranks", [])
        fields: dict[str, Any] = dict(state["counters"])
        counters = Counters(**{**fields, **{name: Fraction(fields[name]) for name in _FRACTIONS}})
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(checkpoint / STATE, f"it lacks or garbles {error}") from error
    weights = _read_tensors(checkpoint / WEIGHTS)
    tensors = _read_tensors(checkpoint / OPTIMIZER)
    if len(others) + 1 != size:
        raise CheckpointError(
            f"{checkpoint} was written by a run of {len(others) + 1} processes, and this one has {size}: it would draw "
            f"other random numbers. Go on with as many: torchrun --nproc-per-node {len(others) + 1} …"
        )
    if rank:
        random_values = others[rank - 1]
        prefix = f"rank.{rank}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        tensors = {name: t for name, t in tensors.items() if not name.startswith("rng.")} | own
    _compare(checkpoint / WEIGHTS, weights, model)
    try:
        optimizer.load_state_dict(_join_optimizer(tensors, values, optimizer))
        model.load_state_dict(weights)
        restore_generators(tensors, random_values)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this run's configuration: {error}. Resume the run that it was written by."
        ) from error
    return counters


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint alone, checked against its hashes."""
    return _read_tensors(checkpoint / WEIGHTS)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or not of a checkpoint by hzo: {what}. Remove the directory {path.parent} "
        "to go on from the checkpoint before it."
    )


def _read_hashes(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / HASHES
    try:
        hashes = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(hashes, dict):
        raise _damaged(path, f"expected a JSON object, found {type(hashes).__name__}")
    return hashes


def _read_bytes(path: Path) -> bytes:
    hashes = _read_hashes(path.parent)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if hashlib.sha256(content).hexdigest() != hashes.get(path.name):
        raise _damaged(path, f"its {len(content)} bytes are not those that were written (SHA-256 differs)")
    return content


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    content = _read_bytes(path)
    try:
        state = json.loads(content)
    except ValueError as error:
        raise _damaged(path, f"not JSON ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise _damaged(path, f"expected the format {FORMAT!r}, found {found!r}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    content = _read_bytes(path)
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _compare(path: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} is of another network: expected {name} to be {expected.get(name, 'absent')}, found "
                f"{found.get(name, 'nothing')}. Resume with the configuration that the checkpoint was "
                "written by."
            )


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state and everything else of it, the latter fit for JSON."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"state.{index}.{name}"] = _plain(value)
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"state": values, "param_groups": state["param_groups"]}


def _join_optimizer(
    tensors: dict[str, Tensor], values: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in values["state"].items()}
    for key, tensor in tensors.items():
        if key.startswith("state."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    groups = [dict(group) for group in values["param_groups"]]
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for name, value in group.items():  # JSON knows lists only, Adam's betas are a tuple
            if isinstance(own.get(name), tuple):
                group[name] = tuple(value)
    return {"state": state, "param_groups": groups}
