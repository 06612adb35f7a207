"""Spiking neurons of norse and snnTorch between linear layers, over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo_lab.zoo.case import Case
from hzo_lab.zoo.imports import library

BATCH, STEPS, FEATURES, UNITS, CLASSES = 3, 6, 5, 8, 4

_SNNTORCH: dict[str, Callable[[Any], nn.Module]] = {
    "leaky": lambda s: s.Leaky(beta=0.9),
    "leaky-learned": lambda s: s.Leaky(beta=0.9, learn_beta=True, learn_threshold=True),
    "leaky-zero-reset": lambda s: s.Leaky(beta=0.9, reset_mechanism="zero"),
    "leaky-no-reset": lambda s: s.Leaky(beta=0.9, reset_mechanism="none"),
    "leaky-atan": lambda s: s.Leaky(beta=0.9, spike_grad=s.surrogate.atan()),
    "leaky-fast-sigmoid": lambda s: s.Leaky(beta=0.9, spike_grad=s.surrogate.fast_sigmoid()),
    "leaky-triangular": lambda s: s.Leaky(beta=0.9, spike_grad=s.surrogate.triangular()),
    "leaky-straight-through": lambda s: s.Leaky(beta=0.9, spike_grad=s.surrogate.straight_through_estimator()),
    "synaptic": lambda s: s.Synaptic(alpha=0.8, beta=0.9),
    "alpha": lambda s: s.Alpha(alpha=0.9, beta=0.8),
    "lapicque": lambda s: s.Lapicque(beta=0.9),
    "rleaky": lambda s: s.RLeaky(beta=0.9, linear_features=UNITS),
    "rsynaptic": lambda s: s.RSynaptic(alpha=0.8, beta=0.9, linear_features=UNITS),
    "slstm": lambda s: s.SLSTM(UNITS, UNITS),
    "leaky-parallel": lambda s: s.LeakyParallel(UNITS, UNITS),
}
_NORSE = (
    "LIFCell",
    "LIFRecurrentCell",
    "LICell",
    "LSNNCell",
    "LSNNRecurrentCell",
    "LIFAdExCell",
    "LIFAdExRecurrentCell",
    "LIFExCell",
    "LIFBoxCell",
    "IAFCell",
    "LIFMCRecurrentCell",
    "LIFRefracCell",
    "LIFRefracRecurrentCell",
    "LIF",
    "LIFRecurrent",
    "LSNN",
    "LI",
)
_NEEDS_SIZES = ("Recurrent", "LSNNRecurrent", "LIFMC")


class Spiking(nn.Module):
    """Linear, a spiking cell, linear, over time; the loss reads the mean over time."""

    def __init__(self, make: Callable[[], nn.Module], style: str) -> None:
        super().__init__()
        self.widen, self.cell, self.head, self.style = (
            nn.Linear(FEATURES, UNITS),
            make(),
            nn.Linear(UNITS, CLASSES),
            style,
        )

    def forward(self, x: Tensor) -> Any:
        currents = self.widen(x) * 3
        if self.style == "whole":  # the layer runs over time itself
            out = self.cell(currents)
            return self.head((out[0] if isinstance(out, tuple) else out).to(x.dtype)).mean(0)
        if self.style == "norse":
            state, outs = None, []
            for current in currents:
                spikes, state = self.cell(current, state)
                outs.append(self.head(spikes))
            return torch.stack(outs).mean(0)
        state, outs = self.start(currents), []
        for current in currents:
            spikes, *state = self.cell(current, *state)
            outs.append(self.head(spikes.to(x.dtype)) + self.head(state[-1]))  # snnTorch's spikes are float32, always
        return torch.stack(outs).mean(0)

    def start(self, currents: Tensor) -> Any:
        cell: Any = self.cell
        for reset in (
            "init_leaky",
            "init_synaptic",
            "init_alpha",
            "init_lapicque",
            "init_rleaky",
            "init_rsynaptic",
            "init_slstm",
            "reset_mem",
        ):
            if hasattr(cell, reset):
                state = getattr(cell, reset)()
                state = state if isinstance(state, (tuple, list)) else (state,)
                return tuple(s.to(currents) if isinstance(s, Tensor) else s for s in state)
        return ()


def families() -> list[str]:
    return [*(f"snntorch/{name}" for name in _SNNTORCH), *(f"norse/{name}" for name in _NORSE)]


def build(name: str, dtype: torch.dtype) -> Case:
    source, cell = name.split("/")
    torch.manual_seed(0)
    if source == "snntorch":
        snntorch = library("snntorch")
        library("snntorch.surrogate")
        style = "whole" if cell == "leaky-parallel" else "snntorch"
        model = Spiking(lambda: _SNNTORCH[cell](snntorch), style)
    else:
        norse = library("norse.torch")
        cls = getattr(norse, cell)
        style = "whole" if cell in ("LIF", "LIFRecurrent", "LSNN", "LI") else "norse"
        sizes = (UNITS, UNITS) if any(n in cell for n in _NEEDS_SIZES) else ()
        model = Spiking(lambda: cls(*sizes), style)
    model = model.train().to(dtype)
    x = torch.randn(STEPS, BATCH, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    labels = torch.arange(BATCH) % CLASSES

    def call() -> Tensor:
        return F.cross_entropy(model(x), labels)

    return Case(model, call)
