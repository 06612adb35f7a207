"""hzo: train deep networks with forward passes only.

Data flows one way: model -> chain (``trace``) -> plan (``plan``) -> boundaries -> cotangents -> gradients
(``backward``, ``grad_and_value``, ``cotangents``).
"""

from hzo import baselines, presets
from hzo.blackbox import blackbox
from hzo.chain import Chain
from hzo.gradient import backward, cotangents, grad_and_value
from hzo.plan import Plan
from hzo.planner import plan
from hzo.queries import QueryCount, count_queries
from hzo.tracing import trace
from hzo.vjp import estimate_vjp

__all__ = [
    "Chain",
    "Plan",
    "QueryCount",
    "backward",
    "baselines",
    "blackbox",
    "cotangents",
    "count_queries",
    "estimate_vjp",
    "grad_and_value",
    "plan",
    "presets",
    "trace",
]
