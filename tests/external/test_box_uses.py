"""What users do with black boxes: found by trying to break them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import PlanError, TraceError
from support.boxes import TOLERANCE, physics
from support.oracles import normal


class TestWhatUsersDo:
    """Found by trying to break it: each gave a wrong gradient, or none, without a word."""

    @pytest.mark.parametrize("boxed", [False, True])
    def test_a_layer_that_stands_twice_in_a_sequential(self, boxed):
        layer, act = nn.Linear(4, 4).double(), nn.Tanh()
        model = nn.Sequential(layer, hzo.blackbox(act, elementwise=True) if boxed else act, layer, act)
        x, y = normal(6, 4), normal(6, 4)
        found, loss = hzo.grad_and_value(model, F.mse_loss, x, y)
        exact = F.mse_loss(act(layer(act(layer(x)))), y)
        exact.backward()
        assert torch.allclose(loss, exact)
        assert torch.allclose(found["0.weight"], layer.weight.grad, rtol=TOLERANCE)

    @pytest.mark.parametrize(
        "make", [lambda a: hzo.blackbox([a, torch.tanh, a]), lambda a: hzo.blackbox(nn.Sequential(a, nn.Tanh(), a))]
    )
    def test_a_layer_that_stands_twice_in_a_box_keeps_its_parameters(self, make):
        layer = nn.Linear(4, 4).double()
        box, x = make(layer), normal(6, 4)
        optimizer = torch.optim.SGD(box.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            box(x).square().sum().backward()
            (reference,) = torch.autograd.grad(layer(torch.tanh(layer(x))).square().sum(), layer.weight)
            assert isinstance(layer.weight, nn.Parameter)
            assert torch.allclose(layer.weight.grad, reference, rtol=TOLERANCE)
            optimizer.step()

    def test_integers_between_two_parts(self):
        box = hzo.blackbox([lambda a: (8 * a).round().to(torch.int32), lambda c: c.double() / 8], step=0.5)
        with pytest.raises(PlanError, match=r"hands torch.int32 on to the next part"):
            box(normal(5, 4).requires_grad_()).sum().backward()

    def test_a_timeout_keeps_autocast_and_misses_no_parameter(self):
        layer, seen = nn.Linear(4, 4), set()

        def watched(x):
            y = layer(x)
            seen.add(y.dtype)
            return y.float()

        with pytest.raises(TraceError, match="parameters='ignored'"):
            hzo.blackbox(watched, timeout=5.0)(torch.randn(5, 4, requires_grad=True))
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            hzo.blackbox(watched, timeout=5.0, parameters="ignored")(
                torch.randn(5, 4, requires_grad=True)
            ).sum().backward()
        assert seen == {torch.bfloat16}

    @pytest.mark.parametrize("reach", ["closure", "method"])
    def test_buffers_of_a_module_within_reach_move_once(self, reach):
        class Watching(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("largest", torch.zeros(()))

            def forward(self, x):
                self.largest.copy_(torch.maximum(self.largest, x.max()))
                return torch.sin(x)

        host, x = Watching(), torch.randn(5, 4, requires_grad=True)
        box = hzo.blackbox((lambda a: 1.0 * host(a)) if reach == "closure" else host.forward, step=5.0)
        box(x).sum().backward()
        assert float(host.largest) == float(x.detach().max())

    def test_modes_are_those_of_the_forward_pass(self):
        part = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double().requires_grad_(False)
        box, x = hzo.blackbox(part), normal(5, 4).requires_grad_()
        torch.manual_seed(0)
        y = box(x)
        part.eval()
        y.sum().backward()
        assert not part.training
        found, x.grad = x.grad, None
        torch.manual_seed(0)
        part.train()(x).sum().backward()
        assert torch.allclose(found, x.grad, rtol=TOLERANCE)

    def test_a_part_that_saturates_is_not_inferred_to_be_affine(self):
        box = hzo.blackbox(lambda a: (2 * a).clamp(-1, 1), promises="inferred")
        box(0.01 * normal(5, 4))
        x = (3 * normal(5, 4)).requires_grad_()
        box(x).sum().backward()
        assert torch.allclose(x.grad, 2.0 * (x.abs() < 0.5).double(), atol=1e-6)

    def test_passes_that_wait_keep_their_number_of_samples(self):
        sizes = []

        def fixed(x):
            sizes.append(len(x))
            return physics(x)

        box, first, second = hzo.blackbox(fixed, batched=False), normal(4, 3).requires_grad_(), normal(7, 3)
        pending = box(first)
        box(second)
        sizes.clear()
        pending.sum().backward()
        assert set(sizes) == {4}

    def test_threads_trace_one_at_a_time(self):
        import threading

        original, failed = nn.Module.__call__, []

        def work():
            try:
                for _ in range(3):
                    x = normal(5, 4).requires_grad_()
                    hzo.blackbox(physics)(x).sum().backward()
                    assert x.grad is not None
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert nn.Module.__call__ is original


@pytest.mark.parametrize(
    ("f", "call"),
    [
        (lambda v, gain=1.0: gain * v.square(), lambda box, v: box(v, gain=2.0)),
        (lambda v, _: v.square(), lambda box, v: box(v, None)),
        (lambda given: {"y": given["x"].square()}, lambda box, v: box({"x": v})["y"]),
    ],
    ids=["an option", "None", "a dict"],
)
def test_other_arguments_than_tensors_in_a_model_that_hzo_plans_for(f, call):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.box, self.after = nn.Linear(3, 3), hzo.blackbox(f), nn.Linear(3, 2)

        def forward(self, x):
            return self.after(call(self.box, self.before(x)))

    model, x, y = Model().double(), normal(4, 3), torch.tensor([0, 1, 1, 0])
    found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
    F.cross_entropy(model.after(call(f, model.before(x))), y).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=TOLERANCE), name


def test_an_input_without_elements():
    x, y = torch.zeros(4, 0, requires_grad=True), normal(4, 3).requires_grad_()
    box = hzo.blackbox(lambda a, b: torch.cat([a.to(b.dtype), b.sin()], 1))
    box(x, y).sum().backward()
    assert x.grad.shape == (4, 0)
    assert torch.allclose(y.grad, y.cos(), rtol=TOLERANCE)
