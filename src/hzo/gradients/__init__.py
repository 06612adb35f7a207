"""From the loss to ``.grad``: cotangents sweep back through the nodes of a plan."""

from hzo.gradients.backward_sweep import BoundaryCotangents, Sweep, estimate_node, sweep_plan, with_carried
from hzo.gradients.forward_pass import BasePass, base_pass, loss_pass
from hzo.gradients.gradient import at_the_end, backward, cotangents, estimated_cotangents, grad_and_value
from hzo.gradients.parameters import LocalStep, ParameterGradients, add_gradients, by_rule, parameter_gradients
from hzo.gradients.trace_cache import plan_of, prepare, traced_for

__all__ = [
    "BasePass",
    "BoundaryCotangents",
    "LocalStep",
    "ParameterGradients",
    "Sweep",
    "add_gradients",
    "at_the_end",
    "backward",
    "base_pass",
    "by_rule",
    "cotangents",
    "estimate_node",
    "estimated_cotangents",
    "grad_and_value",
    "loss_pass",
    "parameter_gradients",
    "plan_of",
    "prepare",
    "sweep_plan",
    "traced_for",
    "with_carried",
]
