"""Adjoints of single operations: structure in place of queries.

Each rule rests on a promise that a layer makes by its exact type, with nothing in the way (no hook, no forward of the
instance's own, no parametrization), and on what the base pass showed or a tiny probe measures. No rule reads a weight.

==============  ============================================================  ===============================
promise         the Jacobian is                                               queries
==============  ============================================================  ===============================
sum             ± the identity, broadcasting undone                           0
bilinear        the other activity                                            0
reindexing      a map of places                                               0
selection       the identity where the output was taken from                  0
softmax         diag(p) − ppᵀ with the observed p                             0
normalizing     a projection by the statistics of the input, times γ          2 tiny ones, for γ
affine          one matrix for all samples (and tokens, channels)             one sample an input feature
stationary      a convolution                                                 (C/groups)·s² small canvases
==============  ============================================================  ===============================
"""

from __future__ import annotations

from collections.abc import Hashable

from hzo.adjoints import affine, arithmetic, attention, convolution, declared, einsum, normalization, pooling
from hzo.adjoints.common import Adjoint, Call, Shape
from hzo.tracing import Graph, Operation, untouched
from hzo.tracing import declared as declared_of

__all__ = ["Adjoint", "Call", "Shape", "find_adjoint"]

_FILES = (affine, arithmetic, attention, convolution, einsum, normalization, pooling)
MODULES = {kind: rule for file in _FILES for kind, rule in file.MODULES.items()}
FUNCTIONS = {function: rule for file in _FILES for function, rule in file.FUNCTIONS.items()}


def find_adjoint(graph: Graph, op: Operation, value: int) -> Adjoint | None:
    """The rule by which ``op`` carries a cotangent back to its operand ``value``, or None."""
    if op.random or not op.deterministic or "out" in op.kwargs:
        return None
    for rule in _candidates(op):
        if rule.accepts(graph, op, value):
            return rule
    return None


def _candidates(op: Operation) -> list[Adjoint]:
    promises = declared_of(op.module)
    if promises is not None:
        return declared.rules_of(promises)
    if op.module is not None:
        found = MODULES.get(type(op.module)) if untouched(op.module) else None
        return [found] if found else []
    if not isinstance(op.target, Hashable):
        return []
    return [table[op.target] for table in (affine.BY_WEIGHT, FUNCTIONS) if op.target in table]
