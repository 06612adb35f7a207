"""What calibrate() measures, against what is known of chains made for the purpose."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import CoupledSamplesError, InputError, TraceError
from hzo.planner.accuracy import error_model, expected_errors
from support.cases import CASES
from support.chains import BATCH, WIDTH, chain_of, orthogonal, residual
from support.networks import Residual


class Cubic(nn.Module):
    """x + x³: the third derivative is 6 everywhere, so that central differences err by exactly h²."""

    def forward(self, x):
        return x + x**3


def test_gains_are_those_of_the_exact_cotangents():
    chain, x, y = chain_of(orthogonal(0.5), Residual(orthogonal(), nn.Tanh()), orthogonal(2.0))
    known = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing")
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")
    graph = chain.traced
    for position, g in zip(graph.boundaries, exact, strict=True):
        (value,) = graph.live[position]
        relative = float(g.square().sum() / exact[-1].square().sum())
        assert known.norms[position, value] == pytest.approx(relative, rel=1e-6)


def test_curvature_of_a_cubic():
    """Squared relative error h⁴ · B·n / Σ (1 + 3x²)², with cotangents of one: power 4, and the size to a tenth."""
    chain, x, _ = chain_of(nn.Sequential(Cubic()))
    known = hzo.calibrate(chain, x, lambda out, y: out.sum(1), x, assume="nothing")
    (bend,) = known.bends.values()
    assert bend.power == pytest.approx(4, abs=0.01)
    assert bend.size == pytest.approx(x.numel() / float((1 + 3 * x**2).square().sum()), rel=0.1)


def test_curvature_is_seen_through_noise():
    chain, x, _ = chain_of(nn.Sequential(Cubic()))
    noisy = hzo.noisy(chain, readout=1e-3)
    (bend,) = hzo.calibrate(noisy, x, lambda out, y: out.sum(1), x, assume="nothing").bends.values()
    # The smaller of the two steps errs, too: what is seen is (1 − 1/4) of the error, and made up for.
    assert bend.size == pytest.approx(x.numel() / float((1 + 3 * x**2).square().sum()), rel=0.1)


def test_a_linear_chain_does_not_bend():
    chain, x, _ = chain_of(orthogonal(), orthogonal())
    known = hzo.calibrate(chain, x, assume="nothing")
    assert known.bends == {}
    assert known.noise is None


@pytest.mark.parametrize(("readout", "process"), [(1e-2, 0.0), (0.0, 1e-2), (1e-2, 1e-2)])
def test_noise_is_told_apart(readout, process):
    """The total to 5 % (16 queries of 512 elements); the share of each from 8 long segments, far less sharply."""
    chain, x, y = chain_of(*(orthogonal() for _ in range(12)))
    known = hzo.calibrate(hzo.noisy(chain, readout, process, seed=2), x, F.mse_loss, y, assume="nothing").noise
    total = [(r**2 + p**2) ** 0.5 for r, p in zip(known.readout, known.process, strict=True)]
    assert total == pytest.approx([(readout**2 + process**2) ** 0.5] * 12, rel=0.05)
    assert known.process[0] ** 2 == pytest.approx(process**2, abs=0.25 * (readout**2 + process**2))


def test_noise_of_each_stage_is_its_own():
    chain, x, y = chain_of(orthogonal(), orthogonal(), orthogonal())
    levels = (1e-3, 1e-1, 1e-2)
    known = hzo.calibrate(hzo.noisy(chain, readout=levels), x, F.mse_loss, y, assume="nothing").noise
    total = [(r**2 + p**2) ** 0.5 for r, p in zip(known.readout, known.process, strict=True)]
    assert total == pytest.approx(levels, rel=0.05)


def test_errors_grow_as_cotangents_do_where_stages_are_orthogonal():
    chain, x, y = chain_of(*(orthogonal(0.7) for _ in range(4)))
    known = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing")
    assert list(known.transport.values()) == pytest.approx([1.0] * len(known.transport), rel=1e-6)


def test_errors_that_grow_faster_than_the_cotangent():
    """The cotangent lies where the stage shrinks it tenfold; an error has a part in every direction."""
    scales = torch.ones(WIDTH)
    scales[0] = 0.1
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight.data = torch.diag(scales)
    chain, x, _ = chain_of(layer, orthogonal())
    chain.model[1].weight.data = torch.eye(WIDTH, dtype=torch.float64)
    known = hzo.calibrate(chain, x, lambda out, y: out[:, 0], x, assume="nothing")
    # Σ s² / n over s₀²: (0.01 + 15) / 16 / 0.01, for errors drawn on 32 samples.
    assert known.transport[0] == pytest.approx(15.01 / 16 / 0.01, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_of_the_order_of_the_dtype(dtype):
    chain, x, y = chain_of(*(Residual(orthogonal(), nn.Tanh()) for _ in range(3)), dtype=dtype)
    known = hzo.calibrate(chain, x, F.mse_loss, y, assume="nothing")
    eps = torch.finfo(dtype).eps
    assert all(eps / 30 < std < 10 * eps for std in known.rounding)


def test_samples_that_agree_add_up_and_their_errors_do_not():
    """A bias of which all samples want the same: B² of signal, B of error."""
    layer = nn.Linear(WIDTH, WIDTH)
    chain, x, _ = chain_of(layer)
    known = hzo.calibrate(chain, x, lambda out, y: out.sum(1), x)
    assert known.parameters["0.bias"] == pytest.approx(1 / BATCH, rel=0.5)  # one draw of 16 numbers


@pytest.mark.parametrize("name", ["mlp", "norms", "dropout", "own_parameters", "language", "several_inputs", "tied"])
def test_nothing_is_left_behind(name):
    problem = CASES[name].build()
    chain = hzo.trace(problem.module, problem.x)
    before = {k: v.clone() for k, v in problem.module.state_dict().items()}
    random = torch.get_rng_state()
    with hzo.count_queries() as count:
        known = hzo.calibrate(chain, problem.x, problem.loss_fn, problem.y)
    assert all(torch.equal(v, before[k]) for k, v in problem.module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in problem.module.parameters())
    assert count.queries == count.base_evaluations == 0 < count.check_evaluations
    plan = hzo.plan(chain, calibration=known)
    assert plan.expected.cosine > 0.9999
    assert set(plan.expected.parameters) <= set(plan.trainable)


def test_bad_input():
    chain, x, y = chain_of(orthogonal())
    with pytest.raises(InputError, match="expected a traced chain"):
        hzo.calibrate(chain.model, x)
    with pytest.raises(TraceError, match="has not seen an input"):
        hzo.calibrate(hzo.Chain([orthogonal().double()]), x)
    with pytest.raises(InputError, match="2 repeats or more"):
        hzo.calibrate(chain, x, repeats=1)
    with pytest.raises(InputError, match="no gradient"):
        hzo.calibrate(chain, x, lambda out, y: 0 * out.sum(1), y)


def test_coupled_samples_are_refused():
    chain, x, _ = chain_of(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
    with pytest.raises(CoupledSamplesError, match="BatchNorm"):
        hzo.calibrate(chain, x, assume="nothing")
    assert hzo.calibrate(chain, x).norms  # by structure it can be


@pytest.mark.parametrize("tree", ["flat", "bisect", "stagewise"])
@pytest.mark.parametrize(("readout", "process"), [(1e-2, 0.0), (0.0, 5e-3)])
def test_predicted_cosines_are_measured(tree, readout, process):
    chain, x, y = residual(8, torch.float64)
    noisy = hzo.noisy(chain, readout, process, seed=4)
    known = hzo.calibrate(noisy, x, F.mse_loss, y, assume="nothing")
    plan = hzo.plan(noisy, tree=tree, assume="nothing", step=0.1, boundaries="all", calibration=known)
    exact = hzo.cotangents(chain, F.mse_loss, x, y, boundaries="all")
    found = hzo.cotangents(noisy, F.mse_loss, x, y, plan=plan)
    model = error_model(chain.traced, known, None, "central")
    errors = expected_errors(model, chain.traced, plan.nodes, plan.step)
    for k, position in enumerate(chain.traced.boundaries[:-1]):
        measured = float(F.cosine_similarity(found[k].flatten(), exact[k].flatten(), dim=0))
        (value,) = chain.traced.live[position]
        assert plan.expected.errors[position, value] == errors[position, value]
        assert (1 + errors[position, value]) ** -0.5 == pytest.approx(measured, abs=0.02)
    assert plan.expected.cosine < 0.97  # else the test would show nothing


@pytest.mark.parametrize("tree", ["bisect", "stagewise"])
def test_predicted_errors_of_parameters_are_measured(tree):
    """Of weights too, which reach their product transposed. How errors add up over samples was seen in one draw: of a
    bias of 16 numbers to a factor of three, of a weight of 256 to a half."""
    chain, x, y = residual(6, torch.float64)
    noisy = hzo.noisy(chain, readout=1e-2, seed=4)
    known = hzo.calibrate(noisy, x, F.mse_loss, y, assume="nothing")
    plan = hzo.plan(noisy, tree=tree, assume="nothing", step=0.1, calibration=known)
    exact, _ = hzo.grad_and_value(chain, F.mse_loss, x, y)
    chips = [hzo.noisy(chain, readout=1e-2, seed=seed) for seed in range(10, 18)]
    draws = [hzo.grad_and_value(chip, F.mse_loss, x, y, plan=plan)[0] for chip in chips]
    estimated = {name for name, error in plan.expected.parameters.items() if error > 0}
    assert estimated == set(exact)  # the last block too: its output is behind a sum and an activation
    for name in estimated:
        errors = [float((found[name] - exact[name]).square().sum() / exact[name].square().sum()) for found in draws]
        ratio = plan.expected.parameters[name] / statistics.mean(errors)
        assert (1 / 3 < ratio < 3) if name.endswith("bias") else (1 / 2 < ratio < 2), name
