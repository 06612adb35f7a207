"""Tensors are freed when the last one who needs them is done: none of them waits for Python's garbage collector."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hzo


def tensors_collected(run):
    """Shapes of the tensors that a collection finds after ``run()``: only reference cycles held them."""
    run()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        return [tuple(found.shape) for found in gc.garbage if isinstance(found, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(18, 3))


def recorded():
    network, x, y = model(), torch.randn(4, 1, 5, 5), torch.randint(3, (4,))
    return lambda: hzo.backward(network, F.cross_entropy, x, y)


def planned():
    network, x, y = model().eval(), torch.randn(4, 1, 5, 5), torch.randint(3, (4,))
    plan = hzo.plan(hzo.trace(network, x), tree="bisect", assume="nothing")
    return lambda: hzo.backward(network, F.cross_entropy, x, y, plan=plan)


def traced():
    network, x = model().eval(), torch.randn(4, 1, 5, 5)
    return lambda: hzo.trace(network, x)


def boxed():
    network, x = nn.Sequential(nn.Linear(3, 3), hzo.blackbox(torch.tanh), nn.Linear(3, 1)), torch.randn(4, 3)
    return lambda: network(x).sum().backward()


@pytest.mark.parametrize("make", [recorded, planned, traced, boxed], ids=lambda make: make.__name__)
def test_no_tensor_waits_for_the_garbage_collector(make):
    assert tensors_collected(make()) == []
