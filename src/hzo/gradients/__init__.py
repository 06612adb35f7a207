"""From the loss to ``.grad``: cotangents sweep back through the nodes of a plan."""

from hzo.gradients.backward_sweep import Cotangents, Sweep, estimate_node, sweep, with_carried
from hzo.gradients.gradient import at_the_end, backward, cotangents, grad_and_value, loss_at_the_end
from hzo.gradients.parameters import Gradients, Local, add_gradients, parameter_gradients
from hzo.gradients.trace_cache import plan_of, prepare, traced_for

__all__ = [
    "Cotangents",
    "Gradients",
    "Local",
    "Sweep",
    "add_gradients",
    "at_the_end",
    "backward",
    "cotangents",
    "estimate_node",
    "grad_and_value",
    "loss_at_the_end",
    "parameter_gradients",
    "plan_of",
    "prepare",
    "sweep",
    "traced_for",
    "with_carried",
]
