"""``embedding(sparse=True)``: gradients as sparse as autograd's, whatever stands in ``.grad`` and beside them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo


class Table(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.kind = kind
        bag = kind.startswith("bag")
        self.table = (
            nn.EmbeddingBag(7, 3, sparse=True, mode=kind[4:])
            if bag
            else nn.Embedding(7, 3, sparse=True, padding_idx=2 if kind == "padding" else None)
        )

    def forward(self, tokens):
        if self.kind.startswith("bag"):
            return self.head(self.table(tokens))
        rows = self.table(tokens).sum(1)
        if self.kind == "twice":
            rows = rows * self.table(tokens.flip(1)).mean(1)
        if self.kind == "tied":
            rows = rows + F.softmax(rows @ self.table.weight.T, -1) @ self.table.weight
        return self.head(rows)


def problem(kind):
    torch.manual_seed(0)
    return Table(kind).double(), torch.randint(7, (4, 5)), torch.randint(2, (4,))


@pytest.mark.parametrize("before", ["nothing", "a sparse gradient", "a dense gradient", "zeros"])
@pytest.mark.parametrize("kind", ["rows", "padding", "twice", "tied", "bag sum", "bag mean"])
def test_as_sparse_as_for_autograd(kind, before):
    found = []
    for way in ("autograd", "hzo"):
        model, tokens, y = problem(kind)
        weight = model.table.weight
        if before == "a sparse gradient":
            weight.grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 3), (7, 3), dtype=torch.float64)
        elif before != "nothing":
            weight.grad = torch.full_like(weight, float(before == "a dense gradient"))
        if way == "autograd":
            F.cross_entropy(model(tokens), y).backward()
        else:
            hzo.backward(model, F.cross_entropy, tokens, y)
        found.append(weight.grad)
    expected, ours = found
    assert ours.layout == expected.layout
    torch.testing.assert_close(ours.to_dense(), expected.to_dense())


def test_a_step_of_an_optimizer_for_sparse_gradients():
    model, tokens, y = problem("rows")
    before = model.table.weight.detach().clone()
    hzo.backward(model, F.cross_entropy, tokens, y)
    torch.optim.SparseAdam([model.table.weight], lr=0.1).step()
    moved = (model.table.weight != before).any(1)
    assert moved.tolist() == [k in tokens for k in range(7)]


@pytest.mark.parametrize("options", [{}, {"tree": "bisect"}], ids=["recorded", "planned"])
def test_by_name_checked_and_compared(options):
    model, tokens, y = problem("padding")
    gradients, _ = hzo.grad_and_value(model, F.cross_entropy, tokens, y, **options)
    assert gradients["table.weight"].is_sparse is not bool(options)
    assert hzo.compare_gradients(model, F.cross_entropy, tokens, y, **options).cosine > 1 - 1e-9
    found = hzo.check_gradient(model, F.cross_entropy, tokens, y, **options)
    assert found.holds, str(found)  # a row of padding, which has no gradient by convention, is not moved


def test_a_computed_table_is_dense():
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    with hzo.record() as tape:
        loss = F.embedding(torch.tensor([1, 1, 4]), 2 * weight, sparse=True).square().sum()
    tape.backward(loss)
    expected = torch.zeros(7, 3, dtype=torch.float64)
    expected[1], expected[4] = 16 * weight[1].detach(), 8 * weight[4].detach()
    torch.testing.assert_close(weight.grad, expected)
