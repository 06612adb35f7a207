"""On a CUDA device: the same gradients."""

import pytest
import torch
import torch.nn.functional as F

import hzo
from support import oracles
from support.cases import CASES
from support.oracles import relative_errors, worst
from support.training import COSINES, autograd, batch, cosine, grads, network

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


def test_black_boxes():
    """NumPy code beside the device, a chain on it, random numbers of the device as noise."""
    x = torch.randn(8, 4, device="cuda", dtype=torch.float64, requires_grad=True)
    for box in (hzo.blackbox(lambda a: a**3, numpy=True), hzo.blackbox([torch.sin, lambda a: torch.asin(a) ** 3])):
        (found,) = torch.autograd.grad(box(0.3 * x).sum(), x)
        (exact,) = torch.autograd.grad((0.3 * x).pow(3).sum(), x)
        assert torch.allclose(found, exact, rtol=1e-5)
    noisy = hzo.blackbox(lambda a: torch.sin(a) + 0.01 * torch.randn_like(a), noise="measured", target_cosine=0.9)
    before = torch.cuda.get_rng_state()
    noisy(x).sum().backward()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert cosine({"x": x.grad.cpu()}, {"x": x.detach().cos().cpu()}) > 0.8


def test_smoothed_losses():
    z, y = torch.randn(64, 3, device="cuda", requires_grad=True), torch.arange(64, device="cuda") % 3
    hzo.smoothed(lambda z, y: (z.argmax(1) == y).float(), maximize=True)(z, y).backward()
    assert z.grad.device.type == "cuda"
    assert z.grad.any()


def test_a_graph_repeats_a_gradient():
    """A whole gradient, recording and sweep, captured in a CUDA graph."""
    model, (x, y) = network(), batch(32)
    model, x, y = model.float().cuda(), x.float().cuda(), y.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model.zero_grad()
            hzo.backward(model, F.cross_entropy, x, y)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = hzo.backward(model, F.cross_entropy, x, y)
    x.copy_(torch.randn_like(x))
    model.zero_grad(set_to_none=False)
    graph.replay()
    found, of_replay = grads(model), loss.clone()
    exact = autograd(model, x, y)
    assert cosine(found, exact) >= COSINES[x.dtype]
    assert torch.allclose(of_replay, F.cross_entropy(model(x), y))


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_differences_do_not_round_to_tf32(scheme):
    """PyTorch's setting for convolutions: a step of a difference would drown in it."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4 * 8 * 8, 10)).cuda()
    x, y = torch.randn(8, 4, 8, 8, device="cuda"), torch.arange(8, device="cuda")
    assert torch.backends.cudnn.allow_tf32
    chain = hzo.trace(model, x)
    hzo.backward(chain, F.cross_entropy, x, y, tree="bisect", assume="locality", scheme=scheme)
    found = grads(model)
    assert cosine(found, autograd(model, x, y)) >= (0.9999 if scheme == "central" else 0.99)
    assert torch.backends.cudnn.allow_tf32
