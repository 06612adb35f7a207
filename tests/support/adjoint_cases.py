"""One operation at a time: its adjoint, as the engine would apply it, against autograd's."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

import hzo
from hzo.adjoints import Call, find_adjoint
from hzo.execution.operation import call, resolve
from hzo.execution.passes import base_pass, run_alone
from hzo.finite_differences.steps import accumulation_dtype

BATCH = 3


def normal(*shape, batch=BATCH, dtype=torch.float64):
    return torch.randn(batch, *shape, dtype=dtype)


class Run(nn.Module):
    """A function of the inputs as a model; ``parts``, modules and parameters, come before the inputs."""

    def __init__(self, function, *parts):
        super().__init__()
        for k, part in enumerate(parts):
            setattr(self, f"part{k}", nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.function, self.parts = function, len(parts)

    def forward(self, *inputs):
        return self.function(*(getattr(self, f"part{k}") for k in range(self.parts)), *inputs)


@dataclass(frozen=True)
class Applied:
    """What a rule gave for one operand and one set of outputs with a cotangent."""

    target: object
    promise: str
    value: int
    estimate: torch.Tensor
    exact: torch.Tensor
    scale: float  # norm of the cotangent

    @property
    def error(self):
        """Relative; where the exact one is zero up to rounding, relative to the cotangent."""
        norm = float(self.exact.norm())
        scale = norm if norm > 1e-9 * self.scale else self.scale
        return float((self.estimate.to(self.exact.dtype) - self.exact).norm()) / scale


@contextmanager
def poisoned(parameters):
    """Parameters are NaN inside: a rule that read one would tell."""
    saved = [p.detach().clone() for p in parameters]
    write(parameters, [torch.full_like(p, torch.nan) for p in saved])
    try:
        yield saved
    finally:
        write(parameters, saved)


def write(parameters, values):
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)


def apply_all(model, *inputs, target=None, every_output=True):
    """Apply the rule of every operation (only of those with this ``target``) for every operand that it accepts.

    While a rule runs, the parameters of the model are NaN, but for the probes. Checks that the probes are as predicted.
    """
    chain = hzo.trace(model, inputs)
    graph = chain.traced
    with torch.no_grad():
        activities = base_pass(graph, [t.detach() for t in inputs])
    found = []
    for op in graph.operations:
        if target is not None and not (op.target is target or op.target == target or type(op.module) is target):
            continue
        for value in op.reads:
            rule = find_adjoint(graph, op, value)
            if not graph.values[value].floating or not graph.values[value].batched or rule is None:
                continue
            written = [v for v in op.writes if graph.values[v].floating]
            subsets = [s for n in range(1, len(written) + 1) for s in combinations(written, n)]
            for outputs in subsets if every_output else [tuple(written)]:
                g = {v: torch.randn_like(activities.values[v]) for v in outputs}
                estimate = apply(graph, op, value, rule, activities, model, g)
                exact = vjp(graph, op, value, activities, g)
                assert estimate.shape == exact.shape
                scale = float(torch.stack([t.norm() for t in g.values()]).norm())
                found.append(Applied(op.target, rule.promise, value, estimate, exact, scale))
    return found


def apply(graph, op, value, rule, activities, model, cotangents):
    """``hzo.gradient``'s call of a rule, with nothing but the activities to read."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = {v: t.clone() for v, t in activities.values.items()}

    def measure(v, probe):
        write(parameters, saved)
        response = run_alone(graph, op, activities, v, probe)[0]
        write(parameters, [torch.full_like(p, torch.nan) for p in saved])
        return response

    wide = {v: g.to(accumulation_dtype(g.dtype)) for v, g in cotangents.items()}
    with poisoned(parameters) as saved, torch.no_grad(), hzo.count_queries() as count:
        args, kwargs = resolve(op, activities.values.__getitem__, activities.batch)
        outputs = tuple(activities.values[v] for v in op.writes)
        estimate = rule.apply(Call(graph, op, args, kwargs, outputs, wide, measure), value)
    assert count.queries == sum(shape[0] for shape in rule.probes(graph, op, value))
    for v, t in before.items():
        assert torch.equal(t, activities.values[v])  # a rule writes into nothing that it was given
    return estimate


def vjp(graph, op, value, activities, cotangents):
    """Autograd's, through the operation alone."""
    with torch.enable_grad():
        operand = activities.values[value].detach().clone().requires_grad_()
        values = {**activities.values, value: operand}
        results = dict(zip(op.writes, call(op, *resolve(op, values.__getitem__, activities.batch)), strict=True))
        outputs = [results[v] for v in cotangents]
        if not any(t.requires_grad for t in outputs):
            return torch.zeros_like(operand)
        reached = [(t, g) for t, g in zip(outputs, cotangents.values(), strict=True) if t.requires_grad]
        (found,) = torch.autograd.grad(
            [t for t, _ in reached], operand, [g for _, g in reached], allow_unused=True, materialize_grads=True
        )
    return found


def worst(found):
    return max((applied.error for applied in found), default=0.0)


def operands(found):
    return len({applied.value for applied in found})
