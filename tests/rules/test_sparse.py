"""Sparse matrices: autograd's gradients in float64."""

import pytest
import torch

from hzo.reverse import record
from support.tape_oracle import check, leaves_of


def sparse_matrix(dtype=torch.float64):
    dense = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return torch.where(dense.abs() > 0.6, dense, 0)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("weights", [(), (0,)], ids=str)
def test_constant_sparse_matrix(layout, weights):
    a = sparse_matrix().to_sparse() if layout == "coo" else sparse_matrix().to_sparse_csr()
    check(lambda x: a @ x, leaves_of((4, 3)), weights=weights)
    check(lambda x: torch.sparse.mm(a, x), leaves_of((4, 3)), weights=weights)
    check(lambda x: a @ x, leaves_of((4,)), weights=weights)
    if layout == "coo":
        check(lambda c, x: torch.sparse.addmm(c, a, x, alpha=0.5, beta=2), leaves_of((4, 3), (4, 3)))
        check(lambda x: x @ a, leaves_of((3, 4)))
        x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        with record() as step:  # autograd does not know how to: it multiplies dense by sparse
            loss = (torch.bmm(torch.stack([a, a]), x) * 2).sum()
        assert torch.allclose(step.gradients(loss)[0][1], 2 * a.to_dense().T @ torch.ones(2, 4, 3, dtype=a.dtype))


def test_learned_sparse_matrix():
    a = sparse_matrix().to_sparse().requires_grad_()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.grad((torch.sparse.mm(a, x) * factor).sum(), [a, x])
    with record() as step:
        loss = (torch.sparse.mm(a, x) * factor).sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    for leaf, g in zip((a, x), expected, strict=True):
        assert torch.allclose(found[id(leaf)].to_dense(), g.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin"])
def test_reductions_of_rows(reduce):
    a = sparse_matrix().to_sparse_csr()
    check(lambda x: torch.sparse.mm(a, x, reduce), leaves_of((4, 3)), calls=["aten._sparse_mm_reduce_impl.default"])


@pytest.mark.parametrize("weights", [(), (0,)], ids=str)
def test_sparse_matrix_of_given_values(weights):
    """As a graph convolution with learned weights of edges has it."""
    indices = sparse_matrix().nonzero().t()

    def function(values, x):
        return torch.sparse_coo_tensor(indices, values, (4, 4)) @ x

    check(function, leaves_of((indices.shape[1],), (4, 3)), weights=weights)
    repeated = torch.tensor([[0, 0, 1], [1, 1, 2]])
    check(lambda v, x: torch.sparse.mm(torch.sparse_coo_tensor(repeated, v, (4, 4)), x), leaves_of((3,), (4, 3)))


@pytest.mark.parametrize("function", [torch.sparse.softmax, torch.sparse.log_softmax])
def test_softmax_over_entries(function):
    """Attention over the edges of a graph."""
    indices = sparse_matrix().nonzero().t()

    def weighed(values):
        return function(torch.sparse_coo_tensor(indices, values, (4, 4)).coalesce(), 1).to_dense().nan_to_num()

    check(weighed, leaves_of((indices.shape[1],)))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_made_sparse_and_dense_again():
    check(lambda x: (torch.relu(x).to_sparse() * 1).to_dense() * x, leaves_of((4, 3)))
