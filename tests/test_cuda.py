"""On a CUDA device: the same gradients."""

import pytest
import torch
import torch.nn.functional as F

import hzo
import oracles
from cases import CASES
from oracles import relative_errors, worst
from test_precision import COSINES
from test_torch_ecosystem import autograd, batch, cosine, grads, network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("assume", ["nothing", "structure"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, assume):
    with torch.device("cuda"):
        problem = CASES[name].build()
    move = lambda tree: torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), tree)  # noqa: E731
    problem.module.cuda()
    problem = type(problem)(problem.model, problem.loss_fn, move(problem.x), move(problem.y))
    chain = hzo.trace(problem.model, problem.x)
    random = torch.cuda.get_rng_state()
    found, _ = hzo.grad_and_value(chain, *list(problem)[1:], assume=assume)
    torch.cuda.set_rng_state(random)
    exact, _ = oracles.gradients(problem, {**oracles.parameters_of(problem), **oracles.unregistered(chain)})
    assert worst(relative_errors(found, exact)) <= (oracles.KINKS if CASES[name].kinks else oracles.CENTRAL)


def test_autocast():
    model, (x, y) = network(), batch(32)
    exact = autograd(model, x, y)
    model = model.float().cuda()
    with torch.autocast("cuda", torch.float16):
        hzo.backward(model, F.cross_entropy, x.float().cuda(), y.cuda())
    assert cosine({n: g.cpu() for n, g in grads(model).items()}, exact) >= COSINES[torch.float16]
