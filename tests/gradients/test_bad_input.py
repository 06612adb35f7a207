"""Bad input: a clear error, and nothing changed."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import CoupledSamplesError, HzoWarning, InputError, NonFiniteError, PlanError, StepError
from support.oracles import normal
from support.state import assert_same, state

NAN, INF = float("nan"), float("inf")


def network(**change):
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 3)).double()


class Unit:
    """A network, traced and planned, and a call that is right; each test spoils one thing."""

    def __init__(self, model=None):
        self.model = network() if model is None else model
        self.x, self.y = normal(5, 4), torch.arange(5) % 3
        self.chain = hzo.trace(self.model, self.x)
        self.plan = hzo.plan(self.chain, tree="bisect", assume="nothing")
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)

    def refuses(self, error, message, x=None, y=None, loss_fn=F.cross_entropy, chain=None, **options):
        x, y = self.x if x is None else x, self.y if y is None else y
        options = options or {"plan": self.plan}
        before, given = state(self.model), copy.deepcopy(x)
        with pytest.raises(error, match=message):
            hzo.backward(chain or self.chain, loss_fn, x, y, **options)
        assert_same(before, state(self.model))
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in self.model.parameters())
        torch.testing.assert_close(x, given, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def unit():
    return Unit()


def test_plan_of_a_chain_with_another_operation(unit):
    class Net(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 4), act, nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    elementwise = hzo.plan(hzo.trace(Net(nn.Tanh()).double(), unit.x))
    mixing = hzo.trace(Net(nn.Softmax(-1)).double(), unit.x)
    with pytest.raises(PlanError, match="made for another chain"):
        hzo.backward(mixing, F.cross_entropy, unit.x, unit.y, plan=elementwise)


def test_plan_of_what_is_not_a_chain(unit):
    with pytest.raises(InputError, match=r"hzo\.trace"):
        hzo.plan(unit.model)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_input_not_finite(unit, value):
    unit.x[2, 1] = value
    unit.refuses(NonFiniteError, "the input x holds NaN or infinity", x=unit.x)


@pytest.mark.parametrize("value", [NAN, INF])
def test_activation_not_finite_names_the_first_stage(unit, value):
    unit.model[2].bias.data[1] = value
    unit.refuses(
        NonFiniteError, r"^addmm is the first operation whose result holds NaN or infinity \(in stage 2, 2:Linear\)"
    )


def test_activation_not_finite_with_a_loss_that_is():
    """The loss looks away; the query does not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    unit = Unit(model)
    model[0].bias.data[1] = NAN
    looks_away = lambda out, y: out.nan_to_num().square().sum(1)  # noqa: E731
    unit.refuses(NonFiniteError, "NaN or infinity", loss_fn=looks_away)


def test_loss_not_finite(unit):
    unit.refuses(NonFiniteError, "the loss is (nan|inf|-inf)", loss_fn=lambda out, y: out.sum() / 0)


def test_query_not_finite():
    """Finite where it is, infinite a step away."""
    unit = Unit(nn.Sequential(nn.Linear(4, 4), nn.Threshold(0.0, 0.0), nn.Linear(4, 3)).double())
    chain = hzo.trace(hzo.Chain([unit.model[0], lambda h: torch.where(h > 1e3, INF, h.sin()), unit.model[2]]), unit.x)
    plan = hzo.plan(chain, tree="flat", assume="nothing", step=1e4)
    unit.refuses(
        NonFiniteError, r"a query that perturbed the activation at boundary 1 returned NaN", chain=chain, plan=plan
    )


def test_batch_of_zero(unit):
    unit.refuses(InputError, "a batch of zero samples", x=unit.x[:0], y=unit.y[:0])
    with pytest.raises(InputError, match="a batch of zero samples"):
        hzo.trace(unit.model, unit.x[:0])


def test_no_batch_dimension(unit):
    with pytest.raises(InputError, match="one batch size in dimension 0"):
        hzo.trace(unit.model, torch.tensor(1.0))
    with pytest.raises(InputError, match="expected a tensor with the batch first among the model's inputs, got none"):
        hzo.trace(unit.model, 3)


@pytest.mark.parametrize(
    ("loss_fn", "y", "message"),
    [
        (F.cross_entropy, torch.zeros(4, dtype=torch.int64), "[Ee]xpected a target of batch size 5"),
        (F.cross_entropy, torch.full((5,), 3), "expected class indices from 0 to 2, got 3 to 3"),
        (F.cross_entropy, torch.full((5,), -1), "expected class indices from 0 to 2, got -1 to -1"),
        (F.cross_entropy, torch.zeros(5, 2), "expected a target of the output's shape"),
        (F.cross_entropy, torch.zeros(5, dtype=torch.int32), "expected int64 class indices"),
        (F.mse_loss, torch.zeros(5, 1), r"expected a target of the output's shape \(5, 3\), got \(5, 1\)"),
        (F.mse_loss, torch.zeros(3), "[Ee]xpected a target of batch size 5"),
        (lambda out, y: out.sum() * 1j, torch.zeros(5), "loss of floating-point numbers"),
        (lambda out, y: None, torch.zeros(5), "expected loss_fn to return a tensor"),
    ],
)
def test_target_and_loss(unit, loss_fn, y, message):
    unit.refuses(InputError, message, y=y, loss_fn=loss_fn)


def test_inputs_of_different_batches():
    with pytest.raises(InputError, match=r"one batch size in dimension 0, got shapes \[\(3, 2\), \(4, 2\)\]"):
        hzo.trace(hzo.Chain([torch.add]), (normal(3, 2), normal(4, 2)))


def test_integers_alone():
    with pytest.raises(InputError, match=r"expected a floating input to perturb, got torch.int64"):
        hzo.estimate_vjp(lambda n: n * 2, torch.arange(3), torch.ones(3))
    # In a chain integers are no obstacle: what cannot be perturbed has no cotangent.
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    found = hzo.cotangents(model, F.cross_entropy, torch.randint(4, (3, 2)), torch.arange(3) % 2)
    assert found[0] is None
    assert all(g is not None for g in found[1:])


class TestForeignPlans:
    def test_another_chain(self, unit):
        other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        plan = hzo.plan(hzo.trace(other, unit.x))
        unit.refuses(PlanError, "made for another chain", plan=plan)

    def test_another_function_of_the_same_shapes(self, unit):
        """A Softmax in place of a Tanh: what was elementwise is no longer."""
        other = network()
        other[1] = nn.Softmax(1)
        where = r"made for another chain.*: at boundary 1 aten\.tanh.* runs where aten\._softmax.* had run"
        unit.refuses(PlanError, where, plan=hzo.plan(hzo.trace(other, unit.x)))

    def test_another_width(self, unit):
        wide = nn.Sequential(nn.Linear(6, 4), *network()[1:]).double()
        plan = hzo.plan(hzo.trace(wide, normal(5, 6)))
        unit.refuses(PlanError, "made for another chain, input shape", plan=plan)
        # A chain is for one input shape; without a plan it would be traced anew.
        image = hzo.trace(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(1)).double(), normal(5, 1, 4, 4))
        with pytest.raises(PlanError, match="traced for another input shape"):
            hzo.backward(image, lambda out: out.sum(1), normal(5, 1, 5, 5), plan=hzo.plan(image))

    def test_another_dtype(self, unit):
        unit.refuses(PlanError, "traced for another input shape, dtype", x=unit.x.float(), plan=unit.plan)
        other = copy.deepcopy(unit.model).float()
        plan = hzo.plan(hzo.trace(other, unit.x.float()))
        unit.refuses(PlanError, "dtype", plan=plan)

    def test_another_set_of_trainable_parameters(self, unit):
        unit.model[0].requires_grad_(False)
        unit.refuses(PlanError, "trainable parameters", plan=unit.plan)
        unit.refuses(PlanError, "trainable parameters", plan=unit.plan, chain=unit.model)

    def test_another_mode(self):
        """Planned in evaluation mode, where BatchNorm keeps samples apart; in training mode it does not."""
        unit = Unit(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval())
        unit.model.train()
        unit.refuses(PlanError, "train", plan=unit.plan)
        unit.refuses((PlanError, CoupledSamplesError), "train", plan=unit.plan, chain=unit.model)

    def test_a_plan_and_options(self, unit):
        unit.refuses(PlanError, r"got a plan and options for one \(tree\)", plan=unit.plan, tree="flat")


def test_options_of_a_module_that_change_are_seen():
    """A temperature set from outside is part of what was traced: traced again, not used as it was."""

    class Tempered(nn.Linear):
        temperature = 1.0

        def forward(self, x):
            return super().forward(x) / self.temperature

    model, x = Tempered(4, 3).double(), normal(5, 4)
    first = hzo.backward(model, lambda out: out.square().sum(1), x)
    model.temperature = 2.0
    second = hzo.backward(model, lambda out: out.square().sum(1), x)
    torch.testing.assert_close(second, first / 4)


def test_train_mode_batch_norm_in_a_probed_segment():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    chain = hzo.trace(model, normal(5, 4))
    with pytest.raises(
        CoupledSamplesError, match=r"^native_batch_norm lets the samples of a batch influence each other.*eval mode"
    ):
        hzo.plan(chain, tree="bisect", assume="nothing")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tree": "bisekt"}, PlanError, "expected tree 'planned', 'flat', 'stagewise'"),
        ({"tree": 1}, PlanError, "a whole number ≥ 2, got 1"),
        ({"tree": ["flat"]}, PlanError, "expected tree"),
        ({"assume": "everything"}, PlanError, "expected assume to be one of"),
        ({"scheme": "backward"}, InputError, "expected scheme to be one of"),
        ({"step": 0.0}, InputError, "expected a positive finite step, got 0"),
        ({"step": -1.0}, InputError, "expected a positive finite step"),
        ({"step": "0.1"}, InputError, "expected a positive finite step, got '0.1'"),
        ({"step": NAN}, InputError, "expected a positive finite step, got nan"),
        ({"step": INF}, InputError, "expected a positive finite step, got inf"),
        ({"boundaries": "some"}, PlanError, "expected boundaries to be one of 'needed', 'all'"),
        ({"noise": -1.0}, InputError, "expected readout noise to be a standard deviation"),
        ({"noise": NAN}, InputError, "expected readout noise to be a standard deviation"),
        ({"treee": "flat"}, TypeError, "unexpected keyword argument 'treee'"),
        ({"memory": 0}, InputError, "expected a positive finite memory budget in bytes, got 0"),
        ({"memory": -5}, InputError, "expected a positive finite memory budget"),
        ({"memory": NAN}, InputError, "expected a positive finite memory budget in bytes, got nan"),
        ({"mu": 0.1, "draws": 10**30}, InputError, "expected draws to be a whole number up to 1,000,000,000"),
        ({"scale": NAN}, InputError, "expected scale to be a finite number"),
        ({"timeout": -1}, InputError, "expected a positive finite timeout in seconds, got -1"),
        ({"noise": 1e-3, "target_cosine": "high"}, PlanError, "expected target_cosine between 0 and 1, got 'high'"),
        ({"plan": "flat"}, (PlanError, InputError), "plan"),
    ],
)
def test_options(unit, options, error, message):
    unit.refuses(error, message, **{"assume": "nothing", **options} if "plan" not in options else options)


def test_step_lost_in_rounding(unit):
    unit.refuses(StepError, r"a step of 1e-30 vanishes beside values", assume="nothing", step=1e-30)


def test_step_in_which_all_values_are_lost(unit):
    unit.refuses(StepError, r"a step of 1e\+30 leaves nothing of values of up to", assume="nothing", step=1e30)
    lost = r"a smoothing width mu of 1e\+30 leaves nothing .* or None, which takes none"
    unit.refuses(StepError, lost, assume="nothing", mu=1e30, draws=2)
    with pytest.raises(StepError, match="leaves nothing of values"):
        hzo.estimate_vjp(torch.sin, unit.x, torch.ones_like(unit.x), step=1e20)
    # Beside zeros alone no step is too large: it says what the scale is.
    found = hzo.estimate_vjp(lambda t: 3 * t, torch.zeros(2, 3), torch.ones(2, 3), step=1e20)
    torch.testing.assert_close(found, torch.full((2, 3), 3.0))


def test_more_parts_than_boundaries_are_as_many(unit):
    chain = hzo.trace(unit.model, unit.x)
    assert hzo.plan(chain, tree=10**30).edges == hzo.plan(chain, tree=len(chain) + 1).edges


@pytest.mark.parametrize("samples", [0, -1, 1.5, 10**30])
def test_samples_of_a_trace(unit, samples):
    with pytest.raises(InputError, match="expected samples to be a whole number"):
        hzo.trace(unit.model, unit.x, samples=samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_lost_in_rounding_of_a_narrow_dtype(dtype):
    model, x = network().to(dtype), normal(5, 4).to(dtype)
    rough = nullcontext() if dtype == torch.float32 else pytest.warns(HzoWarning, match="differences of results in")
    with rough, pytest.raises(StepError, match=f"a step of 1e-09 vanishes beside values .* in {dtype}"):
        hzo.backward(model, F.cross_entropy, x, torch.arange(5) % 3, step=1e-9, assume="nothing")


def test_nothing_to_train(unit):
    model = network().requires_grad_(False)
    with pytest.raises(InputError, match="nothing that requires a gradient has a part in this loss"):
        hzo.backward(model, F.cross_entropy, unit.x, unit.y)
    with pytest.raises(PlanError, match="no parameter of this chain requires a gradient"):
        hzo.plan(hzo.trace(model, unit.x))


def test_parameters_without_a_shape(unit):
    with pytest.raises(InputError, match=r"parameters without a shape yet .* run it once"):
        hzo.trace(nn.Sequential(nn.LazyLinear(3)), unit.x)


def test_not_a_module(unit):
    with pytest.raises(InputError, match=r"expected an nn.Module or an hzo.Chain, got function; wrap it"):
        hzo.backward(lambda x: x, F.cross_entropy, unit.x, unit.y)
