"""Plans of models that return any Python object, and of models that ask for gradients inside."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, PlanError, TraceError

Pair = namedtuple("Pair", "logits hidden")


@dataclasses.dataclass
class Mutable:
    logits: torch.Tensor
    hidden: tuple
    note: str = "a note"


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    hidden: tuple
    missing: object = None


class Plain:
    def __init__(self, logits, hidden):
        self.logits, self.hidden, self.itself = logits, hidden, self


class Outputs(OrderedDict):
    """As transformers' ModelOutput: a dict whose entries are attributes."""

    @property
    def logits(self):
        return self["logits"]

    @property
    def hidden(self):
        return self["hidden"]


FORMS = {
    "dataclass": lambda a, b: Mutable(a, (b,)),
    "frozen dataclass": lambda a, b: Frozen(a, (b,)),
    "nested dataclass": lambda a, b: Mutable(a, (Frozen(b, ()).logits,), note={"inner": Frozen(b, (b,))}),
    "object": lambda a, b: Plain(a, [b]),
    "namedtuple": lambda a, b: Pair(a, (b,)),
    "dict with attributes": lambda a, b: Outputs(logits=a, hidden=(b,)),
    "distribution": lambda a, b: Mutable(a, (torch.distributions.Normal(b, 1.0, validate_args=False),)),
}


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 6), nn.Linear(6, 3), form

    def forward(self, x):
        hidden = self.a(x).tanh()
        return self.form(self.b(hidden), hidden)


def loss(out, y):
    hidden = out.hidden[0]
    hidden = hidden.mean if isinstance(hidden, torch.distributions.Normal) else hidden
    return F.cross_entropy(out.logits, y) + 0.1 * hidden.square().mean()


@pytest.mark.parametrize("options", [{"tree": "bisect"}, {"tree": "flat", "assume": "nothing"}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_object_is_looked_into(form, options):
    torch.manual_seed(0)
    model, x, y = Returns(FORMS[form]).double(), torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    assert hzo.compare_gradients(model, loss, x, y, **options).cosine > 1 - 1e-9


def test_no_tensor_in_what_is_returned():
    model = Returns(lambda a, b: {"logits": a.tolist()})
    with pytest.raises(TraceError, match="no tensor was found in what the model returned, a dict"):
        hzo.backward(model, lambda out: torch.zeros(()), torch.randn(5, 4), tree="bisect")


@pytest.mark.parametrize("options", [{"tree": "bisect"}, {"tree": "flat", "assume": "nothing"}], ids=str)
def test_retain_grad_inside_the_model_is_refused_by_name(options):
    class Retains(Returns):
        def forward(self, x):
            hidden = self.a(x).tanh()
            if hidden.requires_grad:
                hidden.retain_grad()
            self.hidden = hidden
            return self.b(hidden)

    model, x, y = Retains(None), torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(PlanError, match=r"retain_grad\(\) was called inside the model on what tanh made"):
        hzo.backward(model, F.cross_entropy, x, y, **options)
    assert all(p.grad is None for p in model.parameters())
    hzo.backward(model, F.cross_entropy, x, y)  # without a plan it is filled
    found = model.hidden.grad
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found, model.hidden.grad)


def test_memory_without_a_plan_is_refused():
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(InputError, match="without a plan makes none"):
        hzo.backward(model, F.cross_entropy, x, y, memory=2**20)
    assert model.weight.grad is None
    hzo.backward(model, F.cross_entropy, x, y, tree="bisect", memory=2**20)


class Single(nn.Module):
    """PyTorch copies the transposed weight, or not, with the number of samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        twice = h[:, None].expand(-1, 2, -1).transpose(0, 1).reshape(2 * len(x), 6)
        return self.b(twice.view(2, len(x), 6).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("options", [{"tree": "bisect", "assume": "nothing"}, {"tree": "planned"}], ids=str)
def test_one_sample_costs_what_its_plan_says(options):
    torch.manual_seed(0)
    model, x, y = Single().double(), torch.randn(1, 4, dtype=torch.float64), torch.randint(3, (1,))
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, **options)
    with hzo.count_queries() as count:
        gradients, _ = hzo.grad_and_value(chain, F.cross_entropy, x, y, plan=plan)
    assert count.queries == plan.queries
    F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-9)


def test_one_sample_under_a_plan_for_more_says_what_it_costs():
    torch.manual_seed(0)
    model, x, y = Single().double(), torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain, tree="bisect", assume="nothing")
    said = "planned anew, and takes 120 stage evaluations where the plan says 132 for one sample"
    with pytest.warns(hzo.errors.HzoWarning, match=said) as warned:
        hzo.backward(chain, F.cross_entropy, x[:1], y[:1], plan=plan)
    assert [warning.filename for warning in warned] == [__file__]  # where the user called, and no line of hzo's own
    found = model.a.weight.grad
    model.zero_grad()
    F.cross_entropy(model(x[:1]), y[:1]).backward()
    torch.testing.assert_close(found, model.a.weight.grad, rtol=1e-6, atol=1e-9)
