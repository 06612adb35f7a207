"""``nn.MultiheadAttention`` taken apart: the same outputs, the gradients of autograd, no weight perturbed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hzo
from support import oracles
from support.adjoint_cases import Run, normal
from support.cases import Problem

TOKENS, WIDTH, HEADS, BATCH = 4, 6, 2, 3
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
ADDED = torch.where(CAUSAL, -math.inf, 0.2).double()


def attention(**options):
    return nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})


def padding(x):
    """True where a token is to be left out: some of the last ones, other ones in every sample."""
    last = torch.arange(TOKENS, device=x.device) == TOKENS - 1
    return last & (x.sum((1, 2)) > 0).unsqueeze(1)


def with_column_sums(result):
    """The weights matter too."""
    output, weights = result
    return output + weights.sum(-2).unsqueeze(-1)


def of_second_head(result):
    output, weights = result
    return output + weights[:, 1].sin().sum(-2).unsqueeze(-1)


def tokens_first(module, x):
    y = x.transpose(0, 1)
    return module(y, y, y, need_weights=False)[0].transpose(0, 1)


def keys_are_values(module, x):
    y = x.tanh()
    return module(x, y, y)[0]


CALLS = {
    "itself": (attention(), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "weights": (attention(), lambda m, x: m(x, x, x)[0]),
    "no bias": (attention(bias=False), lambda m, x: m(x, x, x)[0]),
    "averaged weights": (attention(), lambda m, x: with_column_sums(m(x, x, x))),
    "weights of heads": (attention(), lambda m, x: of_second_head(m(x, x, x, average_attn_weights=False))),
    "causal hint": (
        attention(),
        lambda m, x: m(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0],
    ),
    "bool mask": (attention(), lambda m, x: m(x, x, x, attn_mask=CAUSAL, need_weights=False)[0]),
    "bool mask and weights": (attention(), lambda m, x: m(x, x, x, attn_mask=CAUSAL)[0]),
    "float mask": (attention(), lambda m, x: m(x, x, x, attn_mask=ADDED)[0]),
    "padding": (attention(), lambda m, x: m(x, x, x, key_padding_mask=padding(x), need_weights=False)[0]),
    "both masks": (attention(), lambda m, x: m(x, x, x, padding(x), attn_mask=CAUSAL)[0]),
    "mask of each head": (
        attention(),
        lambda m, x: m(x, x, x, attn_mask=CAUSAL.expand(x.shape[0] * HEADS, -1, -1), need_weights=False)[0],
    ),
    "tokens first": (attention(batch_first=False), tokens_first),
    "cross": (attention(), lambda m, x: m(x[:, :2], x.sin(), x.sin(), need_weights=False)[0]),
    "keys are values": (attention(), keys_are_values),
    "other widths": (
        nn.MultiheadAttention(WIDTH, HEADS, kdim=3, vdim=2, batch_first=True),
        lambda m, x: m(x, x[..., :3], x[..., 2:4])[0],
    ),
    "dropout": (attention(dropout=0.3), lambda m, x: m(x, x, x, need_weights=False)[0]),
}


def curved(output):
    """A loss of its own for every element: that of normalized outputs must not be their norm."""
    rows = output.flatten(1)
    return (rows * torch.linspace(0.3, 2, rows.shape[1], dtype=rows.dtype)).sin().sum(1)


def assert_right(model, x, y=None, loss_fn=curved):
    problem = Problem(model.double(), loss_fn, x, y)
    chain = hzo.trace(model, x)
    plan = hzo.plan(chain)
    torch.manual_seed(oracles.SEED)
    found, loss = hzo.grad_and_value(chain, problem.loss_fn, x, y, plan=plan)
    torch.manual_seed(oracles.SEED)
    exact, exact_loss = oracles.gradients(problem)
    torch.testing.assert_close(loss, exact_loss)
    assert oracles.worst(oracles.relative_errors(found, exact)) <= oracles.CENTRAL
    return plan


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    module, call = CALLS[name]
    module = copy.deepcopy(module)
    for p in module.parameters():  # biases are zero at first
        nn.init.normal_(p, std=0.5)
    plan = assert_right(
        Run(lambda first, m, x: call(m, first(x)), nn.Linear(WIDTH, WIDTH), module), normal(TOKENS, WIDTH)
    )
    assert not plan.perturbed
    assert all(node.probe.kind in ("adjoint", "elementwise") for node in plan.nodes if node.operations)


@pytest.mark.parametrize("options", [{"bias": False}, {"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_what_is_not_covered_stays_whole(options):
    module = attention(**options)
    plan = assert_right(Run(lambda m, x: m(x, x, x)[0], module), normal(TOKENS, WIDTH))
    assert bool(plan.perturbed) == ("bias" not in options)


def test_a_hook_keeps_it_whole():
    module = attention()
    module.register_forward_hook(lambda module, args, output: (output[0].sin(), output[1]))
    assert assert_right(Run(lambda m, x: m(x, x, x)[0], module), normal(TOKENS, WIDTH)).perturbed


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder(norm_first, training):
    """torch's own encoder as it comes: dropout 0.1, ReLU; in evaluation mode without its fused kernel."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(3, WIDTH), encoder, nn.Flatten(), nn.Linear(TOKENS * WIDTH, 5)).train(training)
    y = torch.randint(5, (BATCH,))
    plan = assert_right(model, normal(TOKENS, 3), y, F.cross_entropy)
    assert not plan.perturbed
    assert {node.probe.kind for node in plan.nodes if node.operations} <= {"adjoint", "elementwise"}


def test_decoder():
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dropout=0.1, activation="gelu", batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2)
    model = Run(
        lambda e, d, x: d(e(x[:, 1:]), e(x).sin(), tgt_mask=ADDED[1:, 1:], tgt_is_causal=True),
        nn.Linear(3, WIDTH),
        decoder,
    )
    assert not assert_right(model, normal(TOKENS, 3)).perturbed


def test_the_fast_path_of_torch_is_as_before():
    enabled = torch.backends.mha.get_fastpath_enabled()
    hzo.trace(attention().eval(), (torch.randn(BATCH, TOKENS, WIDTH),) * 3)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
