"""What users bring that hzo cannot take: each ends in an error of hzo's own that says what to do, and changes nothing.

Errors of the user's own code pass through as they are.
"""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence

import hzo
from hzo.errors import HzoError, InputError, NonFiniteError, PlanError, StepError, TapeError

X, Y = torch.randn(10, 6), torch.randint(0, 3, (10,))
PLAN = {"tree": "bisect", "assume": "nothing"}


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Packed(nn.Module):
    def __init__(self, packs):
        super().__init__()
        self.lstm, self.packs = nn.LSTM(6, 3, batch_first=True), packs

    def forward(self, x):
        x = pack_padded_sequence(x, [5] * x.shape[0], batch_first=True) if self.packs else x
        return self.lstm(x)[1][0][-1]


class Cached(nn.Module):
    """Makes a table at its first call."""

    def __init__(self, of_weights):
        super().__init__()
        self.weight, self.of_weights, self.table = nn.Parameter(torch.randn(6, 3)), of_weights, None

    def forward(self, x):
        if self.table is None:
            self.table = 2 * self.weight if self.of_weights else torch.arange(18.0).reshape(6, 3).cos()
        return x @ self.table if self.of_weights else x @ (self.weight * self.table)


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return torch.vmap(self.inner)(x)


def scripted_after_training():
    model = torch.jit.script(mlp())
    for _ in range(4):
        cross_entropy(model(X), Y).backward()
    model.zero_grad()
    return model


@torch.jit.script
def scripted_gate(x: torch.Tensor, weight: torch.Tensor):
    gate = torch.sigmoid(x @ weight)
    return gate * torch.tanh(x @ weight) + gate.sum()


class Calling(nn.Module):
    """A scripted function, and a scripted method that is no ``forward``."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        @torch.jit.export
        def scaled(self, x: torch.Tensor):
            return torch.tanh(x * self.scale) * self.scale

        def forward(self, x: torch.Tensor):
            return x

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.inner = torch.jit.script(self.Inner())

    def forward(self, x):
        return self.inner.scaled(scripted_gate(x, self.weight))


def packed_batch():
    return pack_padded_sequence(torch.randn(4, 5, 6), [5, 4, 3, 2], batch_first=True)


def under_inference():
    with torch.inference_mode():
        return mlp()


CASES = {
    "PackedSequence, plan": (lambda: (Packed(False), packed_batch()), PLAN, InputError, "without a plan"),
    "NumPy": (lambda: (mlp(), X.numpy()), {}, InputError, "torch.as_tensor"),
    "big-endian NumPy": (lambda: (mlp(), X.numpy().astype(">f4")), {}, InputError, "torch.as_tensor"),
    "a list": (lambda: (mlp(), X.tolist()), {}, InputError, "positional"),
    "None": (lambda: (mlp(), None), {}, InputError, "Give tensors"),
    "meta input": (lambda: (mlp(), X.to("meta")), {}, InputError, "real data"),
    "meta model": (lambda: (mlp().to("meta"), X), {}, InputError, "0.weight"),
    "inference-mode model": (lambda: (under_inference(), X), {}, InputError, "outside of it"),
    "nested tensor": (
        lambda: (mlp(), torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)])),
        {},
        InputError,
        "pad",
    ),
    "no model": (lambda: (None, X), {}, InputError, "hzo.Chain"),
    "scale": (lambda: (mlp(), X), {"scale": "x"}, InputError, "scaler.scale"),
    "scales": (lambda: (mlp(), X), {"scale": torch.ones(3)}, InputError, "tensor of one"),
    "memory": (lambda: (mlp(), X), {"memory": "1GB", **PLAN}, InputError, "bytes"),
    "1e300": (lambda: (mlp(), X), {"step": 1e300, **PLAN}, StepError, "leaves the range"),
    "1e30": (lambda: (mlp(), 1e30 * X), PLAN, NonFiniteError, "NaN or infinity"),
}


PLANNED = {
    "TorchScript": lambda: (torch.jit.script(mlp()), X),
    "TorchScript inside": lambda: (nn.Sequential(nn.Linear(6, 6), torch.jit.trace(mlp(), X)), X),
    "vmap": lambda: (Mapped(), X),
    "table": lambda: (Cached(False), X),
}


@pytest.mark.parametrize("name", PLANNED)
def test_planned_like_any_other_code(name):
    """What a recording by names of functions could not follow, a tape of operators does."""
    model, x = PLANNED[name]()
    model, x = model.double(), x.double()
    for _ in range(2):  # the first call may make tables
        model.zero_grad()
        hzo.backward(model, cross_entropy, x, Y, **PLAN)
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    cross_entropy(model(x), Y).backward()
    for n, p in model.named_parameters():
        assert float((found[n] - p.grad).norm()) <= 1e-6 * float(p.grad.norm())


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_way_on(name):
    make, options, error, message = CASES[name]
    model, x = make()
    y = Y[:4] if isinstance(model, Packed) else Y
    with pytest.raises(error, match=message):
        hzo.backward(model, cross_entropy, x, y, **options)
    if isinstance(model, nn.Module):
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["module", "inside", "function"])
def test_a_script_that_autograd_has_compiled_is_interpreted(kind):
    """After some runs TorchScript differentiates by itself, out of sight of a recording: it is told to forget that."""
    if kind == "function":
        model = Calling().double()
    else:
        scripted = scripted_after_training().double()
        model = scripted if kind == "module" else nn.Sequential(scripted, nn.Linear(3, 3)).double()
    x = X.double()
    for _ in range(2):
        for _ in range(4):
            model.zero_grad()
            cross_entropy(model(x), Y).backward()
        expected = {n: p.grad for n, p in model.named_parameters()}
        for _ in range(2):
            model.zero_grad()
            hzo.backward(model, cross_entropy, x, Y)
            for n, p in model.named_parameters():
                torch.testing.assert_close(p.grad, expected[n])


@pytest.mark.parametrize("loss", [None, "mse", nn.CrossEntropyLoss])
@pytest.mark.parametrize("options", [{}, PLAN])
def test_losses_that_cannot_be_called(loss, options):
    with pytest.raises(InputError, match="loss_fn"):
        hzo.backward(mlp(), loss, X, Y, **options)


def test_a_table_of_weights_that_was_kept():
    model = Cached(True)
    hzo.backward(model, cross_entropy, X, Y)
    with pytest.raises(TapeError, match="before the recording"):
        hzo.backward(model, cross_entropy, X, Y)


@pytest.mark.parametrize("change", ["hook", "pre-hook", "global hook", "layer", "forward"])
def test_a_chain_that_changed_after_it_was_traced(change):
    model = mlp()
    chain = hzo.trace(model, X)
    plan = hzo.plan(chain, **PLAN)
    handle = None
    if change == "hook":
        model[1].register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "pre-hook":
        model[2].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    elif change == "layer":
        model[1] = nn.ReLU()
    else:
        model[1].forward = torch.sin
    try:
        with pytest.raises(PlanError, match="trace and plan again"):
            hzo.backward(chain, cross_entropy, X, Y, plan=plan)
    finally:
        if handle is not None:
            handle.remove()
    hzo.backward(model, cross_entropy, X, Y, **PLAN)  # without a chain it is traced anew


def recorded(model, x):
    with hzo.record() as tape:
        loss = model(x).sum()
    tape.backward(loss)


def total(output):
    return output.sum()


INSIDE = {
    "record": recorded,
    "backward": lambda model, x: hzo.backward(model, total, x),
    "backward by a plan": lambda model, x: hzo.backward(model, total, x, **PLAN),
    "grad_and_value": lambda model, x: hzo.grad_and_value(model, total, x),
    "trace": hzo.trace,
    "check_gradient": lambda model, x: hzo.check_gradient(model, total, x),
    "check_structure": hzo.check_structure,
    "infer_structure": lambda model, x: hzo.infer_structure(model[0], x),
    "spsa": lambda model, x: hzo.baselines.spsa(model, total, x),
}


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
@pytest.mark.parametrize("name", INSIDE)
def test_inside_transforms(transform, name):
    model = mlp()

    def step(x):
        INSIDE[name](model, torch.atleast_2d(x))
        return x.sum()

    with pytest.raises(TapeError, match="inside of the block"):
        transform(step)(X)


def test_a_traced_chain_inside_a_transform():
    chain = hzo.trace(mlp(), X)
    plan = hzo.plan(chain, **PLAN)
    for estimate in (lambda x: hzo.backward(chain, total, x, plan=plan), lambda x: hzo.calibrate(chain, x, total)):

        def step(x, estimate=estimate):
            estimate(x)
            return x.sum()

        with pytest.raises(TapeError, match="inside of the block"):
            torch.func.grad(step)(X)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return torch.sparse.mm(x, self.weight)


def test_sparse_inputs_go_without_a_plan():
    model, x = Sparse(), X.to_sparse()
    with pytest.raises(InputError, match="dense inputs"):
        hzo.trace(model, x)
    with pytest.raises(InputError, match="dense inputs"):
        hzo.backward(model, cross_entropy, x, Y, **PLAN)
    hzo.backward(model, cross_entropy, x, Y)
    (exact,) = torch.autograd.grad(cross_entropy(model(x), Y), model.parameters())
    torch.testing.assert_close(model.weight.grad, exact)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_recordings_are_not_copied(copied):
    model = mlp()
    with hzo.record() as tape:
        loss = cross_entropy(model(X), Y)
    with pytest.raises(TapeError, match="is not copied or saved; take its gradients first"):
        copied(tape)
    tape.backward(loss)
    assert model[0].weight.grad is not None


def test_packed_sequences_go_without_a_plan():
    model, x = Packed(False), packed_batch()
    hzo.backward(model, cross_entropy, x, Y[:4])
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    cross_entropy(model(x), Y[:4]).backward()
    for mine, exact in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, exact.grad)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4"])
def test_big_endian_arrays_of_a_part(dtype):
    x = X.clone().requires_grad_()
    box = hzo.blackbox(lambda a: (3 * a).astype(dtype), numpy=True, step=0.5)
    y = box(x)
    assert torch.equal(y, torch.from_numpy((3 * X.numpy()).astype(dtype.replace(">", "<"))).to(y.dtype))
    y.sum().backward()
    if dtype != ">i4":
        torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))


def test_steps_of_a_part_beyond_the_range():
    with pytest.raises(StepError, match="leaves the range"):
        hzo.blackbox(torch.tanh, step=1e300)(X.clone().requires_grad_()).sum().backward()


def test_arrays_that_torch_does_not_know():
    with pytest.raises(InputError, match=r"of dtype (float|longdouble)"):
        hzo.blackbox(lambda a: a.astype(np.longdouble), numpy=True)(X.clone().requires_grad_())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    chain = hzo.trace(mlp(), X)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    hzo.save_plan(hzo.plan(chain, noise=hzo.Noise(1e-3), target_cosine=0.9, **PLAN), path)
    return chain, json.loads(path.read_text()), path.with_name("changed.json")


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


WRONG = [10**400, 1e30, -1, float("nan"), float("inf"), "x", None, [], True, [[[1]]], {}]


@pytest.mark.parametrize("wrong", WRONG, ids=[str(w)[:8] for w in WRONG])
def test_a_plan_file_with_a_wrong_value_anywhere(saved, wrong):
    """Either it is refused by an error of hzo's, or what was loaded can be printed."""
    chain, content, path = saved
    refused = 0
    for place in places(content):
        changed = json.loads(json.dumps(content))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if place:
            inner[place[-1]] = wrong
        path.write_text(json.dumps(changed if place else wrong))
        try:
            print(hzo.load_plan(chain, path))
        except HzoError:
            refused += 1
    assert refused > 15


@pytest.mark.parametrize(
    "content", [b"", bytes(range(256)), b"[" * 100_000, b"1" * 5000, b'{"format": 1e999}', "{}".encode("utf-16")]
)
def test_files_that_are_no_plans(saved, content):
    chain, _, path = saved
    path.write_bytes(content)
    with pytest.raises(PlanError):
        hzo.load_plan(chain, path)
    for no_path in (None, 3):
        with pytest.raises(InputError, match="path"):
            hzo.load_plan(chain, no_path)


def test_errors_of_the_users_own_pass_through():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hzo.backward(Fails(), cross_entropy, X, Y)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hzo.backward(mlp(), cross_entropy, torch.randn(10, 7), Y)
