"""A recording holds what autograd would save, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.tape.memory import storage_of
from hzo_lab.records import peak_of


class Block(nn.Module):
    """A transformer block: products on tokens, whose results are seen through views."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(4, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 8, 16))
        return x + self.down(F.gelu(self.up(x)))


class Residual(nn.Module):
    """A convolutional block that widens its input with zeros."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + F.pad(x, (0, 0, 0, 0, 2, 2)))


CASES = {
    "attention": lambda: (nn.Sequential(Block(), Block(), nn.Linear(16, 3)), torch.randn(4, 8, 16)),
    "padding": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), nn.Conv2d(8, 3, 3)), torch.randn(2, 3, 9, 9)),
    "channels last": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.Flatten(1, 2), nn.Unflatten(1, (5, 5)), nn.GELU(), nn.Linear(8, 3)),
        torch.randn(2, 5, 5, 6),
    ),
}


def bytes_of(tensors, but):
    but = {storage_of(t) for t in but}
    return sum({storage_of(t): t.untyped_storage().nbytes() for t in tensors if storage_of(t) not in but}.values())


@pytest.mark.parametrize("case", list(CASES))
def test_as_much_is_held_as_autograd_saves(case):
    torch.manual_seed(0)
    model, x = CASES[case]()
    outside = [*model.parameters(), *model.buffers(), x]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).square().mean()
    with hzo.record() as step:
        loss = model(x).square().mean()
    step._recorder.release()  # as the sweep does before its first step
    held = [t for t in step.tape.tensors if t is not None and storage_of(t) != storage_of(loss)]
    assert bytes_of(held, outside) <= bytes_of(saved, outside)


def test_views_of_results_that_nobody_reads_go_while_the_step_runs(monkeypatch):
    monkeypatch.setattr("hzo.tape.record._CANDIDATES", 1)
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    with hzo.record() as step:
        loss = (model(x) + 1 + 1 + 1).square().sum()
        product, view = (
            v
            for op in step.tape.operations[:4]
            for v in op.writes
            if op.name in ("aten.addmm.default", "aten.view.default")
        )
        assert step.tape.tensors[product] is None
        assert step.tape.tensors[view] is None
    step.backward(loss)
    expected = torch.autograd.grad((model(x) + 3).square().sum(), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, expected)


def test_what_the_user_still_holds_is_kept_and_may_be_written_to(monkeypatch):
    monkeypatch.setattr("hzo.tape.record._CANDIDATES", 1)
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(2, 3, 6)

    def loss_of():
        view = model(x).view(6, 4)
        first = view[:2]
        total = (view + 1 + 1 + 1).sum()
        first.mul_(2)  # a write to a window of what was only seen through views
        return total + view.square().sum()

    with hzo.record() as step:
        loss = loss_of()
    step.backward(loss)
    expected = torch.autograd.grad(loss_of(), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, expected)


def test_peak_of_a_small_mlp_beside_backprop():
    """Sixteen layers, of which each is small beside the whole: nothing that is not needed is held for long."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(16) for m in (nn.Linear(64, 64), nn.ReLU())))
    x, y = torch.randn(64, 64), torch.randn(64, 64)

    def by_backprop():
        model.zero_grad()
        F.mse_loss(model(x), y).backward()

    def by_tape():
        model.zero_grad()
        hzo.backward(model, F.mse_loss, x, y)

    peaks = []
    for gradient in (by_backprop, by_tape):
        gradient()  # whatever is made once
        peaks.append(peak_of(gradient))
    assert peaks[1] <= 1.05 * peaks[0]
