"""Black boxes among the rest of torch, and noisy ones."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

import hzo
from hzo.errors import NondeterministicError
from support.boxes import TOLERANCE, Odd, chained, gradients, physics, problem
from support.oracles import normal


class TestTheRestOfTorch:
    def test_another_backward_pass(self):
        model, x, y = problem(hzo.blackbox(physics))
        loss = F.cross_entropy(model(x), y)
        found = [torch.autograd.grad(loss, model.a.weight, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*found)

    def test_functional_call_and_grad(self):
        """Parameters that belong to nobody, the box's own among them."""
        odd = Odd().double()
        model, x, y = problem(hzo.blackbox(odd))
        other = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
        found = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(other)
        twin = copy.deepcopy(model)
        twin.part = copy.deepcopy(odd)
        renamed = {name.replace("stages.0.f.", ""): p for name, p in other.items()}
        reference = grad(lambda p: F.cross_entropy(functional_call(twin, p, (x,)), y))(renamed)
        for name, gradient in found.items():
            assert torch.allclose(gradient, reference[name.replace("stages.0.f.", "")], rtol=TOLERANCE), name
        leaves = {name: p.requires_grad_() for name, p in other.items()}
        F.cross_entropy(functional_call(model, leaves, (x,)), y).backward()
        assert all(torch.allclose(leaves[name].grad, found[name], rtol=1e-12) for name in found)

    def test_other_parameters_are_no_reason_to_trace_again(self):
        runs = []

        def watched(x):
            runs.append(len(x))
            return physics(x)

        model, x, y = problem(hzo.blackbox(watched))
        gradients(model, x, y)
        once = len(runs)
        F.cross_entropy(functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (x,)), y).backward()
        assert len(runs) - once == 4  # forward, the test that it is deterministic, and differences up and down

    def test_distributed_data_parallel(self):
        from torch.nn.parallel import DistributedDataParallel

        odd = Odd().double()
        model, x, y = problem(hzo.blackbox(odd))
        found = gradients(model, x, y)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            wrapped = gradients(DistributedDataParallel(model), x, y)
        finally:
            torch.distributed.destroy_process_group()
        assert set(wrapped) == {f"module.{name}" for name in found}
        assert all(torch.allclose(wrapped[f"module.{name}"], g, rtol=1e-12) for name, g in found.items())

    def test_data_parallel(self):
        model, x, y = problem(hzo.blackbox(physics))
        found = gradients(model, x, y)
        wrapped = gradients(nn.DataParallel(model), x, y)
        assert all(torch.equal(wrapped[f"module.{name}"], g) for name, g in found.items())

    def test_activation_checkpoints(self):
        from torch.utils.checkpoint import checkpoint

        model, x, y = problem(hzo.blackbox(physics))
        found = gradients(model, x, y)
        model.zero_grad()
        F.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
        assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters())

    def test_a_state_is_saved_and_loaded(self, tmp_path):
        model, x, y = problem(hzo.blackbox(Odd().double()))
        gradients(model, x, y)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other, *_ = problem(hzo.blackbox(Odd().double()))
        for p in other.parameters():
            p.data.mul_(3)
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(model(x), other(x))

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_stand_alone(self, duplicate):
        model, x, y = problem(hzo.blackbox([physics, Odd().double()]))
        found = gradients(model, x, y)
        other = duplicate(model)
        assert all(torch.equal(g, found[name]) for name, g in gradients(other, x, y).items())
        torch.optim.SGD(other.parameters(), lr=1.0).step()
        assert all(torch.equal(g, found[name]) for name, g in gradients(model, x, y).items())

    def test_an_input_changed_in_place_is_noticed(self):
        box, x = hzo.blackbox(physics), normal(5, 4).requires_grad_()
        y = 2 * x
        z = box(y)
        y.mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()

    def test_an_output_changed_in_place_changes_nothing(self):
        box, x = hzo.blackbox(physics), normal(5, 4).requires_grad_()
        box(x).mul_(2).sum().backward()
        found, x.grad = x.grad, None
        (2 * physics(x)).sum().backward()
        assert torch.allclose(found, x.grad, rtol=TOLERANCE)

    def test_autocast(self):
        """Queries compute in the dtype of the forward pass, though autograd runs them outside its context."""
        seen = set()
        layer = nn.Linear(4, 4).requires_grad_(False)

        def watched(x):
            y = layer(x)
            seen.add(y.dtype)
            return torch.tanh(y)

        box, x = hzo.blackbox(watched), torch.randn(64, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            box(x).sum().backward()
        found, x.grad = x.grad, None
        with torch.autocast("cpu", torch.bfloat16):
            y = box(x)
        assert seen == {torch.bfloat16}
        y.sum().backward()
        assert seen == {torch.bfloat16}
        assert torch.equal(found, x.grad)
        (reference,) = torch.autograd.grad(torch.tanh(layer(x)).sum(), x)
        assert F.cosine_similarity(found.flatten(), reference.flatten(), dim=0) > 0.99

    def test_autocast_of_noisy_parts(self):
        layer, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(256, 4, requires_grad=True)
        box = hzo.blackbox(lambda a: layer(a) + 0.01 * torch.randn_like(a), noise="measured", target_cosine=0.9)
        with torch.autocast("cpu", torch.bfloat16):
            y = box(x)
        y.sum().backward()
        assert F.cosine_similarity(x.grad.flatten(), layer.weight.sum(0).expand(256, 4).flatten(), dim=0) > 0.87

    def test_evaluation(self):
        model, x, _ = problem(hzo.blackbox(physics))
        with torch.inference_mode(), hzo.count_queries() as count:
            assert torch.equal(model(x), model.b(physics(model.a(x))))
        assert count.queries == count.check_evaluations == 0

    def test_what_is_no_tensor_is_passed_on(self):
        x = normal(5, 4).requires_grad_()
        for box in (hzo.blackbox(lambda x, power: x**power), hzo.blackbox(torch.pow)):
            box(x, 2).sum().backward()
            assert torch.allclose(x.grad, 2 * x, rtol=TOLERANCE)
            x.grad = None
        hzo.blackbox(partial(torch.pow, exponent=2))(x).sum().backward()
        assert torch.allclose(x.grad, 2 * x, rtol=TOLERANCE)


class TestNoise:
    def noisy_parts(self, depth=6, width=16, std=0.1):
        torch.manual_seed(0)
        weights = [torch.randn(width, width) / width**0.5 for _ in range(depth)]
        generator = np.random.default_rng(0)

        def clean(weight, x):
            return x + 0.5 * torch.tanh(x @ weight.to(x))

        def noisy(weight, x):
            return clean(weight, x) + std * torch.as_tensor(generator.normal(size=tuple(x.shape))).to(x)

        return [[partial(f, weight) for weight in weights] for f in (clean, noisy)]

    @pytest.mark.parametrize("target", [0.9, 0.99])
    def test_measured_noise_reaches_its_target(self, target):
        clean, noisy = self.noisy_parts()
        x, g = torch.randn(64, 16).requires_grad_(), torch.randn(64, 16)
        box = hzo.blackbox(noisy, noise="measured", target_cosine=target)
        cosines = []
        for _ in range(3):
            x.grad = None
            box(x).backward(g)
            (exact,) = torch.autograd.grad(chained(*clean)(x), x, g)
            cosines.append(float(F.cosine_similarity(x.grad.flatten(), exact.flatten(), dim=0)))
        assert np.mean(cosines) > target - 0.03
        assert box.plan_for(x).expected.cosine >= target
        assert abs(np.mean(cosines) - box.plan_for(x).expected.cosine) < 0.03

    def test_no_plan_is_known_before_noise_is_measured(self):
        box = hzo.blackbox(lambda z: z.tanh() + 0.01 * torch.randn(z.shape), noise="measured")
        x = torch.randn(8, 4).requires_grad_()
        with pytest.raises(NondeterministicError, match=r"noise of the black box <lambda> is measured at the first"):
            box.plan_for(x)
        box(x).sum().backward()
        assert box.plan_for(x).queries > 0

    def test_random_numbers_of_torch_are_noise_where_noise_is_declared(self):
        """A simulated chip draws them; a real one cannot draw the same again for another query."""

        def chip(x):
            return torch.sin(x) + 0.1 * torch.randn_like(x)

        x = torch.randn(64, 16).requires_grad_()
        first, second = (hzo.blackbox(chip, noise=0.1) for _ in range(2))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with torch.no_grad():
            results = [box(x) - torch.sin(x) for box in (first, first, second)]
        assert all(0.08 < float(r.std()) < 0.12 for r in results)
        assert all(abs(float((a * b).mean())) < 2e-3 for a, b in zip(results, results[1:] + results[:1], strict=True))
        first(x).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        assert 0.3 < float(F.cosine_similarity(x.grad.flatten(), x.detach().cos().flatten(), dim=0)) < 0.999

    def test_else_every_query_draws_those_of_the_forward_pass(self):
        def chip(x):
            return torch.sin(x) * (1 + 0.1 * torch.randn_like(x))

        x = normal(16, 4).requires_grad_()
        torch.manual_seed(0)
        hzo.blackbox(chip)(x).sum().backward()
        found, x.grad = x.grad, None
        torch.manual_seed(0)
        chip(x).sum().backward()
        assert torch.allclose(found, x.grad, rtol=TOLERANCE)

    def test_is_measured_once_and_again_when_asked(self):
        _, noisy = self.noisy_parts(depth=2)
        x = torch.randn(8, 16).requires_grad_()
        box = hzo.blackbox(noisy, noise="measured", target_cosine=0.9)
        checks = []
        for again in (False, False, True):
            if again:
                box.recalibrate()
            with hzo.count_queries() as count:
                box(x).sum().backward()
            checks.append(count.check_evaluations)
        assert checks[0] > 0
        assert checks[1] == 0
        assert checks[2] > 0

    def test_declared(self):
        _, noisy = self.noisy_parts(depth=2)
        x = torch.randn(8, 16).requires_grad_()
        box = hzo.blackbox(noisy, noise=hzo.Noise(process=1e-2), target_cosine=0.9)
        box(x).sum().backward()
        assert box.plan_for(x).expected.cosine >= 0.9
