"""Black boxes of every make, against autograd through the same code."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, TraceError
from support.boxes import TOLERANCE, Function, Odd, chained, compare, exact, gradients, physics, problem, split, squash
from support.oracles import normal, relative_errors, worst


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
        assert count.adjoints == 3
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

    def test_twice_in_a_graph_each_with_its_own_activations(self):
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

    def test_one_that_matters(self):
        """Queries start where the forward pass did, which moves it on once."""
        part, twin = Remembering(reads=True), Remembering(reads=True)
        part.last = normal(5, 4)
        twin.last = part.last.clone()
        model, x, y = problem(hzo.blackbox(part))
        compare(model, x, y, twin)
        assert torch.allclose(part.last, twin.last.detach())


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

    def test_a_trace_must_be_told_the_size_and_a_step_shows_it(self):
        """A trace runs other samples than a step."""
        sizes = set()

        def part(x):
            sizes.add(len(x))
            return physics(x)

        model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(part, batched=False), nn.Linear(4, 2)).double()
        x, y = normal(5, 3), torch.arange(5) % 2
        with pytest.raises(InputError, match=r"say how many: hzo\.blackbox"):
            hzo.trace(model, x)
        for rows in (5, 3):
            model.zero_grad()
            hzo.backward(model, F.cross_entropy, x[:rows], y[:rows])
            assert sizes == {rows}
            sizes.clear()
            found = [p.grad.clone() for p in model.parameters()]
            expected = torch.autograd.grad(
                F.cross_entropy(model[2](physics(model[0](x[:rows]))), y[:rows]), [*model.parameters()]
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("batched", [0, -1, 1.5, None])
    def test_a_size_is_a_whole_number(self, batched):
        with pytest.raises(InputError, match=r"expected batched, .* whole number from 1 on"):
            hzo.blackbox(physics, batched=batched)

    @pytest.mark.parametrize("timeout", [0.0, float("nan"), "1", True])
    def test_a_timeout_is_a_time(self, timeout):
        with pytest.raises(InputError, match="expected a positive finite timeout in seconds"):
            hzo.blackbox(physics, timeout=timeout)
