"""Differences are taken in whole float32, whatever the device may round products to."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.execution import coarsest_product, full_float32

KERNELS = {
    "cuDNN, convolutions": torch.backends.cudnn.conv,
    "cuDNN, recurrent": torch.backends.cudnn.rnn,
    "CUDA, products": torch.backends.cuda.matmul,
    "oneDNN, convolutions": torch.backends.mkldnn.conv,
    "oneDNN, recurrent": torch.backends.mkldnn.rnn,
    "oneDNN, products": torch.backends.mkldnn.matmul,
}


def settings():
    def read(switch):
        try:
            return switch()
        except RuntimeError:
            return "set apart"

    old = (lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision)
    return [read(switch) for switch in old], {name: kernel.fp32_precision for name, kernel in KERNELS.items()}


@pytest.fixture(autouse=True)
def as_before():
    _, kernels = settings()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for name, precision in kernels.items():
        KERNELS[name].fp32_precision = precision


def older(name, value):
    return lambda: setattr(torch.backends.cudnn if name == "cudnn" else torch.backends.cuda.matmul, "allow_tf32", value)


WAYS = {
    "as it is": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuDNN off": older("cudnn", False),
    "CUDA on": older("cuda", True),
    **{
        f"{name} by itself": (lambda k=kernel: setattr(k, "fp32_precision", "tf32")) for name, kernel in KERNELS.items()
    },
    "cuDNN's convolutions whole": lambda: setattr(KERNELS["cuDNN, convolutions"], "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("way", WAYS)
def test_settings_come_back(way):
    WAYS[way]()
    before = settings()
    with full_float32():
        assert coarsest_product() == 0
        with full_float32():
            assert coarsest_product() == 0
        assert coarsest_product() == 0
    assert settings() == before
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == before


def test_the_last_thread_puts_back():
    torch.set_float32_matmul_precision("high")
    before = settings()
    inside, leave = threading.Event(), threading.Event()

    def work():
        with full_float32():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    with full_float32():
        thread.start()
        inside.wait()
    assert coarsest_product() == 0
    leave.set()
    thread.join()
    assert settings() == before


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4), torch.randint(3, (5,))


def by_plan(seen, **options):
    model, x, y = network()
    hzo.backward(hzo.trace(model, x), seen(F.cross_entropy), x, y, **options)


def by_box(seen, **options):
    _, x, _ = network()
    hzo.blackbox(seen(torch.sin), **options)(x.requires_grad_()).sum().backward()


def by_chain_of_boxes(seen):
    _, x, _ = network()
    hzo.blackbox([seen(torch.sin), seen(torch.tanh)])(x.requires_grad_()).sum().backward()


def by_estimate(seen):
    _, x, _ = network()
    hzo.estimate_vjp(seen(torch.sin), x, torch.ones_like(x))


def by_baseline(name, **options):
    def run(seen):
        model, x, y = network()
        getattr(hzo.baselines, name)(model, seen(F.cross_entropy), x, y, **options)

    return run


DIFFERENCES = {
    "plan": lambda seen: by_plan(seen, assume="nothing"),
    "plan, forward": lambda seen: by_plan(seen, assume="locality", tree="bisect", scheme="forward"),
    "box": by_box,
    "box, forward": lambda seen: by_box(seen, scheme="forward"),
    "boxes": by_chain_of_boxes,
    "estimate_vjp": by_estimate,
    "spsa": by_baseline("spsa"),
    "mezo": by_baseline("mezo"),
    "coordinate_wise": by_baseline("coordinate_wise"),
    "node_perturbation": by_baseline("node_perturbation", per_sample=False),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_differences_are_whole(what):
    """Forward passes that a difference is taken from as well as queries; others keep their speed."""
    found = []

    def seen(f):
        def run(*args, **kwargs):
            found.append(coarsest_product())
            return f(*args, **kwargs)

        return run

    torch.set_float32_matmul_precision("high")
    before = settings()
    DIFFERENCES[what](seen)
    assert found
    assert not any(found)
    assert settings() == before


def test_rules_keep_the_speed():
    """The products of rules round no more than those of backprop, and are left as they are."""
    model, x, y = network()
    found = []
    for chain in (model, hzo.trace(model, x)):
        hzo.backward(chain, lambda z, y: (found.append(coarsest_product()), F.cross_entropy(z, y))[1], x, y)
    assert found[0] > 0
