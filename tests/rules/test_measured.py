"""What was measured of weights is kept for the next gradient, and tried before it is used."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError
from hzo.rules import measured
from hzo.rules.measured import KERNELS, Trial
from support.chip import Chip

aten = torch.ops.aten


class Net(nn.Module):
    """Convolutions, a recurrent layer, and products with a weight on either side; probes cost as much as the calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, groups=2)
        self.lstm = nn.LSTM(8, 8)
        self.lin = nn.Linear(8, 8, bias=False)
        self.mix = nn.Parameter(torch.randn(5, 18))

    def forward(self, x):
        h = self.up(torch.tanh(self.conv(x)))
        h = h.flatten(1)[:, : 18 * 8].view(-1, 18, 8)
        h = self.lstm(self.lin(h[:, :6]))[0].sum(1, keepdim=True) + h
        return torch.tanh(self.mix @ h[0])


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch):
    monkeypatch.setattr(measured, "_WORTH", 0)


def network():
    torch.manual_seed(0)
    return Net(), torch.randn(1, 4, 8, 8, requires_grad=True)


def gradients(model, x, keep=True):
    """By hzo and by autograd; queries."""
    model.zero_grad()
    with hzo.record() as step:
        loss = model(x).square().sum()
    with hzo.count_queries() as count:
        step.backward(loss, keep=keep)
    found = [p.grad.clone() for p in model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for g, e in zip(found, expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
    return count.queries


def test_what_is_kept_costs_two_rows_and_one_of_zeros():
    model, x = network()
    first, second = gradients(model, x), gradients(model, x)
    assert second == 3 + 3 + 2 * 2 + 3 + 3  # two convolutions; input and state of the LSTM, two rows each; two products
    expected = 2 * 2  # what kept weights of the LSTM say is asked of its operator
    assert gradients(model, x, keep=False) == first - expected
    assert gradients(model, x) == first  # what is not to be kept was released


@pytest.mark.parametrize("name", [name for name, _ in Net().named_parameters() if "bias" not in name])
def test_one_changed_weight_is_measured_anew(name):
    model, x = network()
    first, second = gradients(model, x), gradients(model, x)
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        weight.view(-1)[3] += 1e-3
    assert second < gradients(model, x) < first + second
    assert gradients(model, x) == second


def test_weights_that_change_without_a_trace():
    """A new tensor in .data, a hook that scales, a parametrization: the trial runs what the step ran."""
    model, x = network()
    first, second = gradients(model, x), gradients(model, x)
    model.lin.weight.data = model.lin.weight.data * 1.01
    assert gradients(model, x) > second
    handle = model.lin.register_forward_pre_hook(lambda m, args: (m.weight.data.mul_(1.01), None)[1])
    with torch.no_grad():
        model(x)
    handle.remove()
    assert gradients(model, x) > second
    torch.nn.utils.parametrizations.weight_norm(model.lin)
    for _ in range(2):
        gradients(model, x)
    with torch.no_grad():
        model.lin.parametrizations.weight.original0.mul_(1.1)
    gradients(model, x)
    assert first > second


def test_hardware_that_drifts():
    lin = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    drift = [1.0]
    with Chip({aten.mm.default: lambda out: drift[0] * out}, [lin.weight]) as chip:
        held = next(iter(chip.held.values()))
        for gain in (1.0, 1.0, 1.001, 1.1):
            drift[0] = gain
            x.grad = None
            with hzo.record() as step:
                loss = lin(x).sum()
            step.backward(loss, keep=True)
            assert torch.allclose(x.grad, gain * held.sum(0).expand(4, 8), rtol=1e-5)


def test_accumulation_keeps_and_a_step_releases():
    model, x = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def micro_batch():
        with hzo.record() as step:
            loss = model(x).square().sum()
        with hzo.count_queries() as count:
            step.backward(loss)
        return count.queries

    for _ in range(2):
        optimizer.zero_grad()
        costs = [micro_batch() for _ in range(4)]
        assert costs[1] == costs[0] + 2 * 2  # what kept weights of the LSTM say is asked of its operator
        assert costs[2] == costs[3] < costs[0] / 2
        optimizer.step()
    optimizer.zero_grad()
    micro_batch()
    assert not any(w in KERNELS._held for w in model.parameters())


def test_outside_accumulation_nothing_is_kept():
    model, x = network()
    costs = [gradients(model, x, keep=None) for _ in range(3)]
    assert costs[0] == costs[1] == costs[2]
    assert not any(w in KERNELS._held for w in model.parameters())


def test_kept_weights_die_with_their_model():
    before = len(KERNELS._held)
    model, x = network()
    gradients(model, x)
    assert len(KERNELS._held) > before
    del model
    assert len(KERNELS._held) == before


def test_low_precision_is_never_kept():
    lin, x = nn.Linear(16, 16).bfloat16(), torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    counts = []
    for _ in range(3):
        with hzo.record() as step:
            loss = lin(x).float().sum()
        with hzo.count_queries() as count:
            step.backward(loss, keep=True)
        counts.append(count.queries)
    assert counts[0] == counts[1] == counts[2]


def test_trials_leave_the_random_state_alone():
    model, x = network()
    gradients(model, x)
    before = torch.get_rng_state()
    gradients(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_rounding_alone_is_no_change():
    torch.manual_seed(0)
    lin, x = nn.Linear(700, 300), torch.randn(4, 700, requires_grad=True)
    counts = []
    for _ in range(40):
        with hzo.record() as step:
            loss = F.relu(lin(x)).sum()
        with hzo.count_queries() as count:
            step.backward(loss, keep=True)
        counts.append(count.queries)
    assert counts[1:] == [3] * 39


@pytest.mark.parametrize("ratio", [3, 10, 30])
def test_how_often_a_change_is_missed(ratio):
    """At most as often as the module says, for changes of a few times what a trial allows for; and sometimes it is."""
    torch.manual_seed(0)
    n, trials = 64, 4000
    kept = torch.randn(n, 3)
    direction = torch.zeros(n, 3)
    direction[:, 1] = torch.randn(n)
    bound = 3.2 * torch.finfo(torch.float32).eps * math.sqrt(n)
    relative = bound * ratio
    now = kept + direction * relative * kept[:, 1].norm() / direction[:, 1].norm()

    def expect(weight, draw):
        rows = draw(measured.ROWS, n, like=weight)
        return rows, rows @ weight, rows.norm(dim=1, keepdim=True) * weight.norm(dim=0)

    leaf, trial = nn.Parameter(kept), Trial(1, expect, lambda rows: (rows.double() @ now.double()).float())
    missed = 0
    for _ in range(trials):
        KERNELS.put(leaf, "key", kept, trial)
        missed += KERNELS.get(leaf, "key", trial) is not None
    allowed = (1 / ratio) ** measured.ROWS
    assert missed / trials <= allowed + 4.5 * math.sqrt(allowed * (1 - allowed) / trials)
    assert missed > 0 or ratio > 10


def test_what_is_measured_in_no_time_is_not_kept(monkeypatch):
    monkeypatch.undo()
    model, x = network()
    assert gradients(model, x) == gradients(model, x)
    assert not any(w in KERNELS._held for w in model.parameters())
    lin, x = nn.Linear(512, 128), torch.randn(4, 512, requires_grad=True)
    for expected in (513, 3):
        with hzo.record() as step:
            loss = lin(x).sum()
        with hzo.count_queries() as count:
            step.backward(loss, keep=True)
        assert count.queries == expected


def test_plans_measure_nothing_that_could_be_kept():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="without a plan"):
        hzo.backward(model, F.mse_loss, torch.randn(3, 2), torch.randn(3, 2), assume="nothing", keep=True)
