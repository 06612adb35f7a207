"""A program in a process of its own: it answers, dies, hangs, babbles, and is asked again."""

import copy
import os
import signal
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from hzo.errors import InputError, QueryError, QueryTimeoutError
from support.oracles import normal
from support.state import assert_same, state

PROGRAM = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace as Pipe
import numpy as np
from numpy.lib.format import read_array, write_array

source, sink = Pipe(read=sys.stdin.buffer.read), Pipe(write=sys.stdout.buffer.write)
trouble = Path(sys.argv[1])
while True:
    x = read_array(source)
    match trouble.read_text():
        case "dies":
            os.kill(os.getpid(), 9)
        case "fails":
            raise ValueError("the chip is too hot")
        case "hangs":
            time.sleep(60)
        case "babbles":
            print("I am fine. " * 20, flush=True)
        case "nan":
            x = x * np.nan
        case "shape":
            x = x[:, :2]
    write_array(sink, np.sin(x) * x.sum(-1, keepdims=True))
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def simulator(tmp_path):
    program, trouble = tmp_path / "chip.py", tmp_path / "trouble"
    program.write_text(PROGRAM)
    trouble.write_text("none")
    with hzo.simulator([sys.executable, str(program), str(trouble)], timeout=10) as found:
        found.trouble = trouble
        yield found


def physics(x):
    return torch.sin(x) * x.sum(-1, keepdim=True)


def step(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def test_its_gradient(simulator):
    x = normal(5, 4).requires_grad_()
    hzo.blackbox(simulator, numpy=True)(x).sum().backward()
    found, x.grad = x.grad, None
    physics(x).sum().backward()
    assert torch.allclose(found, x.grad, rtol=1e-5)


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("dies", QueryError, "killed by signal 9 before it answered"),
        ("fails", QueryError, r"(?s)ended with status 1 before it answered; its last words.*the chip is too hot"),
        ("hangs", QueryTimeoutError, "gave no answer within 2 seconds and was stopped"),
        ("babbles", QueryError, r"wrote something else than 1 array.*standard error"),
        ("nan", hzo.errors.NonFiniteError, "returned NaN"),
        ("shape", InputError, "returned samples of shape"),
    ],
)
def test_trouble(simulator, trouble, error, message):
    """An error that names the query, weights as they were, and the next step works."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), hzo.blackbox(simulator, numpy=True), nn.Linear(4, 2)).double()
    x, y = normal(5, 3), torch.arange(5) % 2
    step(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    before = state(model)
    simulator.timeout = 2
    simulator.trouble.write_text(trouble)
    with pytest.raises(error, match=message) as caught:
        loss.backward()
    assert "the black box" in str(caught.value)
    assert_same(before, state(model))
    simulator.trouble.write_text("none")
    simulator.timeout = 10
    optimizer.zero_grad()
    first = step(model, x, y)
    optimizer.step()
    assert F.cross_entropy(model(x), y) < first


def test_killed_from_outside(simulator):
    box, x = hzo.blackbox(simulator, numpy=True), normal(5, 4).requires_grad_()
    y = box(x)
    os.kill(simulator._process.pid, signal.SIGKILL)
    simulator._process.wait()
    y.sum().backward()  # a program that is gone is started anew
    assert x.grad is not None


def test_several_results(tmp_path):
    program = tmp_path / "two.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            from types import SimpleNamespace as Pipe
            from numpy.lib.format import read_array, write_array
            source, sink = Pipe(read=sys.stdin.buffer.read), Pipe(write=sys.stdout.buffer.write)
            while True:
                a, b = read_array(source), read_array(source)
                write_array(sink, a * b)
                write_array(sink, a + b)
                sys.stdout.buffer.flush()
            """
        )
    )
    with hzo.simulator([sys.executable, str(program)], outputs=2) as two:
        a, b = normal(5, 4).requires_grad_(), normal(5, 4).requires_grad_()
        product, total = hzo.blackbox(two, numpy=True)(a, b)
        (product.sum() + 3 * total.sum()).backward()
        assert torch.allclose(a.grad, b + 3, rtol=1e-5)
        assert torch.allclose(b.grad, a + 3, rtol=1e-5)


def test_a_copy_has_a_process_of_its_own(simulator):
    x = np.ones((2, 3))
    simulator(x)
    with copy.deepcopy(simulator) as other:
        other(x)
        assert other._process.pid != simulator._process.pid


def test_options():
    with pytest.raises(InputError, match="as a list"):
        hzo.simulator("python chip.py")
    with pytest.raises(InputError, match="positive finite timeout"):
        hzo.simulator(["python"], timeout=0)
    with pytest.raises(InputError, match="outputs to be a whole number"):
        hzo.simulator(["python"], outputs=0)
    with pytest.raises(QueryError, match="cannot be started"):
        hzo.simulator(["no-such-program-anywhere"])(np.ones(2))


def test_a_box_without_numpy_gives_it_tensors(simulator):
    x = torch.tensor([[0.3, 0.8], [1.1, -0.4]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(hzo.blackbox(simulator)(x).sum(), x)
    (reference,) = torch.autograd.grad(physics(x).sum(), x)
    assert torch.allclose(found, reference, rtol=1e-5)
