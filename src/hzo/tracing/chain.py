"""A network as stages: made by hand from callables, or traced from a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import nn

from hzo.errors import InputError, TraceError
from hzo.noise import Level, Noise, NoiseSource
from hzo.tracing.graph import Graph


class Stages(nn.Module):
    """Callables applied one after the other; a stage that returns a tuple hands its items to the next one."""

    def __init__(self, stages: Sequence[Callable[..., Any]]) -> None:
        super().__init__()
        self.callables = tuple(stages)
        for k, stage in enumerate(stages):
            if isinstance(stage, nn.Module):
                self.add_module(str(k), stage)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: Any = self.callables[0](*args, **kwargs)
        for stage in self.callables[1:]:
            state = stage(*state) if isinstance(state, tuple) else stage(state)
        return state


@dataclass(frozen=True, eq=False, init=False)
class Chain:
    """A network as a row of stages, between which gradients are estimated.

    By hand from callables, ``Chain([f1, f2, ...])``, or traced from a module, ``hzo.trace(model, x)``.

    A stage maps a tensor (or a tuple of tensors) to the next; what one returns is what the next is called with. A
    chain made by hand has no graph until it has seen an input: ``hzo.trace(chain, x)`` gives the traced chain, and
    ``hzo.backward(chain, ...)`` traces on its first call.

    Raises:
        InputError: no stage, or a stage that cannot be called.
    """

    model: nn.Module
    graph: Graph | None = field(repr=False)

    def __init__(self, stages: Sequence[Callable[..., Any]] | nn.Module, graph: Graph | None = None) -> None:
        if not isinstance(stages, nn.Module) or isinstance(stages, nn.ModuleList):
            stages = list(stages)
            if not stages:
                raise InputError("hzo.Chain needs at least one stage and got none; give [f1, f2, ...]")
            for k, stage in enumerate(stages):
                if not callable(stage):
                    raise InputError(f"hzo.Chain: stage {k} is a {type(stage).__name__}; a stage must be callable")
            stages = Stages(stages)
        object.__setattr__(self, "model", stages)
        object.__setattr__(self, "graph", graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __copy__(self) -> Chain:
        return Chain(self.model, self.graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        return Chain(deepcopy(self.model, memo), deepcopy(self.graph, memo))

    def __reduce__(self) -> tuple[type[Chain], tuple[nn.Module]]:
        """A pickle holds no graph: that is made of operators, which belong to one process."""
        if self.graph is not None:
            raise TraceError(
                "a traced chain cannot be pickled, since what it recorded belongs to this process; save the weights "
                "(torch.save(model.state_dict(), path)) and the plan (hzo.save_plan), and trace again where you load "
                "them"
            )
        return Chain, (self.model,)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    @property
    def traced(self) -> Graph:
        """The graph; raises TraceError where the chain has not seen an input."""
        if self.graph is None:
            raise TraceError("this chain has not seen an input yet: call chain = hzo.trace(chain, x) first")
        return self.graph

    def __len__(self) -> int:
        if self.graph is not None:
            return len(self.graph.stages)
        return len(self.model.callables) if isinstance(self.model, Stages) else 1

    def __repr__(self) -> str:
        seen = "not traced" if self.graph is None else f"traced for a batch of {self.graph.nominal_batch}"
        return f"<Chain of {len(self)} stages, {seen}; print() lists them>"

    def __str__(self) -> str:
        if self.graph is None:
            return f"Chain of {len(self)} stages, not traced"
        lines = [f"Chain of {len(self)} stages, traced for a batch of {self.graph.nominal_batch}"]
        for k, (start, stop) in enumerate(pairwise(self.graph.boundaries)):
            tensors = ", ".join("×".join(map(str, self.graph.values[v].sample_shape)) for v in self.graph.live[stop])
            names = ", ".join(op.name for op in self.graph.operations[start:stop])
            lines.append(f"  {k:4d}  {self.graph.stages[k].name}: {names} -> {tensors}")
        return "\n".join(lines)


def module_of(model: Chain | nn.Module) -> nn.Module:
    """The module that a chain runs; a module is its own."""
    return model.model if isinstance(model, Chain) else model


def noisy(chain: Chain, readout: Level = 0.0, process: Level = 0.0, seed: int = 0) -> Chain:
    """A copy of a chain that adds Gaussian noise to whatever runs it, to try out how training bears noisy hardware.

    Args:
        chain: traced. The model itself stays as it is; called directly it adds no noise.
        readout: standard deviation of what is added to every element that a query returns.
        process: of what every stage adds to what it hands on, in queries and in the base pass.
        seed: of the noise; each call starts its numbers anew. Numbers of the model's own random state are not used.

    Both may be one number for all stages or a tuple with one for each. Plans of the chain fit it, too. Source: ours.

    Raises:
        InputError: a negative level, or levels for another number of stages. TraceError: a chain without a graph.
    """
    graph = chain.traced
    noise = Noise(readout, process).for_stages(len(graph.stages))
    return Chain(chain.model, replace(graph, noise=NoiseSource(noise, seed)))
