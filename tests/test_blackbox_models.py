"""Black boxes of every make in ordinary PyTorch models, against autograd through the same code."""

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
from hzo.errors import InputError, NondeterministicError, PlanError, TraceError
from oracles import normal, relative_errors, worst

TOLERANCE = 1e-5


class Odd(nn.Module):
    """A layer that no table knows, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 4))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.sin(self.gain * x + self.shift) * x.sum(-1, keepdim=True)


def physics(x):
    return torch.sin(x) * x.sum(-1, keepdim=True)


def squash(x):
    return torch.tanh(x) + 0.1 * x.flip(-1)


def split(x):
    return torch.sin(x) * x.sum(-1, keepdim=True), (x[:, :2] ** 2).cumsum(-1)


class Model(nn.Module):
    def __init__(self, part, several=False):
        super().__init__()
        self.a, self.part, self.b, self.several = nn.Linear(3, 4), part, nn.Linear(4, 2), several

    def forward(self, x):
        y = self.part(self.a(x))
        return self.b(y[0]) + y[1] if self.several else self.b(y)


def chained(*parts):
    def f(x):
        for part in parts:
            x = part(x)
        return x

    return f


def problem(part, several=False):
    torch.manual_seed(0)
    return Model(part, several).double(), normal(5, 3), torch.arange(5) % 2


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact(model, x, y, part):
    twin = copy.deepcopy(model)
    twin.part = part if isinstance(part, nn.Module) else Function(part)
    return gradients(twin, x, y)


def compare(model, x, y, part):
    found = gradients(model, x, y)
    errors = relative_errors(found, exact(model, x, y, part))
    assert worst(errors) <= TOLERANCE


class TestChains:
    @pytest.mark.parametrize("tree", ["planned", "bisect", "flat", "stagewise"])
    def test_of_callables(self, tree):
        parts = [physics, squash, torch.tanh, squash]
        model, x, y = problem(hzo.blackbox(parts, tree=tree))
        compare(model, x, y, chained(*parts))

    def test_with_trainable_parts(self):
        odd = Odd().double()
        model, x, y = problem(hzo.blackbox([physics, odd, squash]))
        found = gradients(model, x, y)
        twin = copy.deepcopy(odd)
        reference = exact(model, x, y, nn.Sequential(Function(physics), twin, Function(squash)))
        for ours, theirs in (("part.stages.1.f.shift", "part.1.shift"), ("part.stages.1.f.gain", "part.1.gain")):
            assert torch.allclose(found[ours], reference[theirs], rtol=TOLERANCE)
        assert torch.allclose(found["a.weight"], reference["a.weight"], rtol=TOLERANCE)

    def test_known_layers_in_an_hzo_chain_keep_their_adjoints(self):
        layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        model, x, y = problem(hzo.blackbox(hzo.Chain(list(layers))))
        with hzo.count_queries() as count:
            found = gradients(model, x, y)
        reference = exact(model, x, y, layers)
        theirs = [reference[f"part.{name}"] for name, _ in layers.named_parameters()]
        ours = [found[f"part.stages.{name}"] for name, _ in layers.named_parameters()]
        assert all(torch.allclose(a, b, rtol=TOLERANCE) for a, b in zip(ours, theirs, strict=True))
        assert count.adjoints == 2
        assert not count.boxes

    def test_a_box_in_a_list_keeps_what_was_said_of_it(self):
        parts = [hzo.blackbox(torch.tanh, elementwise=True), squash]
        box = hzo.blackbox(parts)
        model, x, y = problem(box)
        with hzo.count_queries() as count:
            compare(model, x, y, chained(torch.tanh, squash))
        assert count.boxes == {"tanh": 2 * 5, "squash": 2 * 5 * 4}

    def test_boxes_have_names_of_their_own(self):
        model, x, y = problem(hzo.blackbox([physics, squash], name="chip"))
        with hzo.count_queries() as count:
            gradients(model, x, y)
        assert set(count.boxes) == {"chip[0]", "chip[1]"}


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class TestOutputsAndParameters:
    def test_two_outputs(self):
        model, x, y = problem(hzo.blackbox(split), several=True)
        compare(model, x, y, split)

    def test_an_output_that_is_not_used(self):
        model, x, y = problem(hzo.blackbox(split))
        model.part = Function(lambda a, box=model.part: box(a)[0])
        compare(model, x, y, lambda a: split(a)[0])

    def test_a_list_is_as_good_as_a_tuple(self):
        model, x, y = problem(hzo.blackbox(lambda a: list(split(a))), several=True)
        compare(model, x, y, split)

    def test_parameters_inside_are_perturbed(self):
        odd = Odd().double()
        model, x, y = problem(hzo.blackbox(odd))
        with hzo.count_queries() as count:
            found = gradients(model, x, y)
        reference = exact(model, x, y, copy.deepcopy(odd))
        assert torch.allclose(found["part.stages.0.f.shift"], reference["part.shift"], rtol=TOLERANCE)
        assert torch.allclose(found["part.stages.0.f.gain"], reference["part.gain"], rtol=TOLERANCE)
        assert count.queries == 2 * 5 * (4 + 4 + 1)

    def test_only_those_that_are_trainable(self):
        odd = Odd().double()
        odd.shift.requires_grad_(False)
        model, x, y = problem(hzo.blackbox(odd))
        with hzo.count_queries() as count:
            assert "part.stages.0.f.shift" not in gradients(model, x, y)
        assert count.queries == 2 * 5 * (4 + 1)

    def test_a_first_layer_with_parameters_asks_nothing_of_its_input(self):
        odd = Odd().double()
        model = nn.Sequential(hzo.blackbox(odd), nn.Linear(4, 2).double())
        x, y = normal(5, 4), torch.arange(5) % 2
        with hzo.count_queries() as count:
            found = gradients(model, x, y)
        assert count.queries == 2 * 5 * (4 + 1)
        reference = gradients(nn.Sequential(odd, model[1]), x, y)
        assert torch.allclose(found["0.stages.0.f.shift"], reference["0.shift"], rtol=TOLERANCE)

    def test_a_cotangent_of_zero_costs_nothing(self):
        model, x, _ = problem(hzo.blackbox(physics))
        with hzo.count_queries() as count:
            (0 * model(x)).sum().backward()
        assert count.queries == 0

    def test_twice_in_a_graph_each_with_its_own_activities(self):
        box = hzo.blackbox(physics)
        x = normal(5, 4).requires_grad_()
        box(box(x) + x).square().sum().backward()
        found, x.grad = x.grad, None
        physics(physics(x) + x).square().sum().backward()
        assert torch.allclose(found, x.grad, rtol=TOLERANCE)


class Remembering(nn.Module):
    """Assigns its buffer anew in each call, as spiking neurons do; ``reads``: and depends on it."""

    def __init__(self, reads=False):
        super().__init__()
        self.reads = reads
        self.register_buffer("last", torch.zeros(0))

    def forward(self, x):
        y = physics(x) + (self.last.mean() if self.reads and self.last.numel() else 0)
        self.last = y
        return y


class TestBuffers:
    def test_one_that_is_assigned_anew(self):
        part = Remembering()
        model, x, y = problem(hzo.blackbox(part))
        compare(model, x, y, physics)
        assert torch.equal(part.last, physics(model.a(x)))  # as after one forward pass

    def test_twice_in_a_graph(self):
        box, x = hzo.blackbox(Remembering()), normal(5, 4).requires_grad_()
        box(box(x)).sum().backward()
        found, x.grad = x.grad, None
        physics(physics(x)).sum().backward()
        assert torch.allclose(found, x.grad, rtol=TOLERANCE)

    def test_one_that_matters_is_found_out(self):
        model, x, y = problem(hzo.blackbox(Remembering(reads=True)))
        with pytest.raises(NondeterministicError, match="the black box Remembering gave two results"):
            gradients(model, x, y)


class TestIgnoredParameters:
    def layer(self):
        torch.manual_seed(1)
        return nn.Linear(4, 4).double()

    @pytest.mark.parametrize("hidden", [False, True])
    def test_cost_nothing_and_get_nothing(self, hidden):
        layer = self.layer()
        model, x, y = problem(hzo.blackbox(layer.forward if hidden else layer, parameters="ignored"))
        with hzo.count_queries() as count:
            found = gradients(model, x, y)
        assert count.queries == 2 * 5 * 4
        assert layer.weight.grad is None
        assert set(found) == {"a.weight", "a.bias", "b.weight", "b.bias"}
        reference = exact(model, x, y, copy.deepcopy(layer))
        assert all(torch.allclose(found[name], reference[name], rtol=TOLERANCE) for name in found)

    def test_their_gradient_may_come_from_elsewhere(self):
        """The local product of a layer whose own backward pass is not to be trusted."""
        layer = self.layer()
        box = hzo.blackbox(layer.forward, parameters="ignored")

        def local(x):
            product = F.linear(x.detach(), layer.weight, layer.bias)
            return box(x) + product - product.detach()

        model, x, y = problem(Function(local))
        gradients(model, x, y)
        found, layer.weight.grad = layer.weight.grad, None
        model.part = Function(layer)
        gradients(model, x, y)
        assert torch.allclose(found, layer.weight.grad, rtol=TOLERANCE)

    def test_are_never_lost_by_accident(self):
        model, x, y = problem(hzo.blackbox(self.layer().forward))
        with pytest.raises(TraceError, match=r"trainable tensor of shape \(4, 4\) .*parameters='ignored'"):
            gradients(model, x, y)

    def test_options(self):
        with pytest.raises(InputError, match="expected noise to be a number"):
            hzo.blackbox(physics, noise="loud")
        with pytest.raises(InputError, match="'perturbed' or 'ignored'"):
            hzo.blackbox(physics, parameters="lost")


class TestPromises:
    def test_inferred(self):
        model, x, y = problem(hzo.blackbox(torch.tanh, promises="inferred"))
        with hzo.count_queries() as count:
            compare(model, x, y, torch.tanh)
        assert count.queries == 2 * 5

    def test_declared(self):
        model, x, y = problem(hzo.blackbox(lambda a: 3 * a.flip(-1) + 1, promises="affine"))
        with hzo.count_queries() as count:
            compare(model, x, y, lambda a: 3 * a.flip(-1) + 1)
        assert count.queries < 2 * 5 * 4

    def test_of_a_declared_module(self):
        model, x, y = problem(hzo.blackbox(hzo.declare(nn.Tanh(), "elementwise")))
        with hzo.count_queries() as count:
            compare(model, x, y, torch.tanh)
        assert count.queries == 2 * 5

    def test_the_step_of_a_declared_module(self):
        class Rounding(nn.Module):
            def forward(self, x):
                return x.round()

        x = normal(5, 4).requires_grad_()
        hzo.blackbox(hzo.declare(Rounding(), "elementwise", step=0.5))(3 * x).sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 3.0), rtol=1e-12)

    def test_are_made_of_one_callable(self):
        with pytest.raises(InputError, match=r"one by one: hzo\.declare"):
            hzo.blackbox([physics, squash], elementwise=True)

    @pytest.mark.parametrize("assume", ["locality", "structure"])
    def test_hold_in_an_hzo_chain(self, assume):
        model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(torch.tanh, elementwise=True), nn.Linear(4, 2)).double()
        x, y = normal(5, 3), torch.arange(5) % 2
        with hzo.count_queries() as count:
            found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y, assume=assume)
        F.cross_entropy(model[2](torch.tanh(model[0](x))), y).backward()
        assert worst(relative_errors(found, {n: p.grad for n, p in model.named_parameters()})) <= TOLERANCE
        assert count.boxes["tanh"] == 2 * 5

    def test_the_step_of_a_quantizer(self):
        """A box that rounds is straight-through with a step of half its quantum, and dead with a small one."""
        wide, small = (hzo.blackbox(torch.round, elementwise=True, step=step) for step in (0.5, 1e-6))
        x = normal(5, 4).requires_grad_()
        wide(3 * x).sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 3.0), rtol=1e-12)
        x.grad = None
        small(3 * x).sum().backward()
        assert not x.grad.any()

    def test_the_step_of_a_quantizer_in_an_hzo_chain(self):
        model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(torch.round, elementwise=True, step=0.5), nn.Linear(4, 2))
        model, x, y = model.double(), normal(5, 3), torch.arange(5) % 2
        found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
        h = model[0](x)
        F.cross_entropy(model[2](h + (h.round() - h).detach()), y).backward()
        assert worst(relative_errors(found, {n: p.grad for n, p in model.named_parameters()})) <= TOLERANCE


class TestBatches:
    @pytest.mark.parametrize("size", [1, 2, 4, 7])
    def test_of_one_size(self, size):
        sizes = set()

        def fixed(x):
            sizes.add(len(x))
            return physics(x)

        model, x, y = problem(hzo.blackbox(fixed, batched=size))
        compare(model, x, y, physics)
        assert sizes == {size}

    def test_of_one_size_in_an_hzo_chain(self):
        model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(physics, batched=4), nn.Linear(4, 2)).double()
        x, y = normal(5, 3), torch.arange(5) % 2
        found, _ = hzo.grad_and_value(model, F.cross_entropy, x, y)
        F.cross_entropy(model[2](physics(model[0](x))), y).backward()
        assert worst(relative_errors(found, {n: p.grad for n, p in model.named_parameters()})) <= TOLERANCE

    def test_a_chain_must_be_told_the_size(self):
        model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(physics, batched=False), nn.Linear(4, 2)).double()
        with pytest.raises(InputError, match=r"say how many: hzo\.blackbox"):
            hzo.backward(model, F.cross_entropy, normal(5, 3), torch.arange(5) % 2)

    @pytest.mark.parametrize("options", [{"batched": 0}, {"batched": -1}, {"timeout": 0.0}, {"timeout": float("nan")}])
    def test_options(self, options):
        with pytest.raises(InputError, match=f"expected {next(iter(options))} to be positive"):
            hzo.blackbox(physics, **options)


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
        assert len(runs) - once == 4  # forward, the test that it repeats, and differences up and down

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

    def test_what_is_no_tensor_is_bound_to_the_callable(self):
        box = hzo.blackbox(lambda x, power: x**power)
        with pytest.raises(InputError, match=r"got a int; bind all else to the callable"):
            box(normal(5, 4), 2)
        x = normal(5, 4).requires_grad_()
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
