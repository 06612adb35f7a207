"""What HZO is compared with: other ways to a gradient, each with the signature of ``hzo.backward``.

``name(model, loss_fn, x, y, **options)`` adds a gradient, or an estimate of it, to ``.grad`` of every
parameter with ``requires_grad`` and returns the loss. Buffers, random state and training flags are then as
after one ordinary forward pass; all queries see the same dropout mask. For d parameters, n nodes (elements of
layer outputs in one sample) and a batch of B samples:

| name | what it perturbs | full forward passes | E|ĝ|² / |g|² of one draw |
|---|---|---|---|
| ``backprop`` | nothing | 1, and a reverse sweep | 1 |
| ``coordinate_wise`` | each parameter by itself | 2d, forward scheme d | 1 |
| ``spsa`` | all parameters, random signs | 2 a draw | d |
| ``mezo`` | all parameters, Gaussian | 2 a draw | d + 2 |
| ``forward_gradient`` | nothing: a derivative in forward mode | 1 a draw, carrying a tangent | d + 2 |
| ``node_perturbation`` | all layer outputs, Gaussian | 2 a draw | n + 2, in each sample's cotangents |
"""

from hzo.baselines._backprop import backprop
from hzo.baselines._compare import GradientComparison, compare_gradients
from hzo.baselines._coordinate_wise import coordinate_wise
from hzo.baselines._forward_gradient import forward_gradient
from hzo.baselines._mezo import mezo
from hzo.baselines._node_perturbation import node_perturbation
from hzo.baselines._registry import BASELINES, Baseline
from hzo.baselines._spsa import spsa

__all__ = [
    "BASELINES",
    "Baseline",
    "GradientComparison",
    "backprop",
    "compare_gradients",
    "coordinate_wise",
    "forward_gradient",
    "mezo",
    "node_perturbation",
    "spsa",
]
