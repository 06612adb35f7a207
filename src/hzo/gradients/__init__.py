"""From the loss to ``.grad``: cotangents sweep back through the nodes of a plan."""

from hzo.gradients.backward_sweep import Cotangents, Sweep, estimate_node, sweep, with_carried
from hzo.gradients.forward_pass import BasePass, base_pass, loss_pass
from hzo.gradients.gradient import at_the_end, backward, cotangents, estimated_cotangents, grad_and_value
from hzo.gradients.parameters import Gradients, LocalStep, add_gradients, by_rule, parameter_gradients
from hzo.gradients.trace_cache import plan_of, prepare, traced_for

__all__ = [
    "BasePass",
    "Cotangents",
    "Gradients",
    "LocalStep",
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
    "sweep",
    "traced_for",
    "with_carried",
]
