"""Fused attention: autograd's gradients in float64, by one call of the kernel's own adjoint."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hzo.reverse import record
from hzo.rules.base import rules
from support.by_hand import by_hand
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
HEADS = ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8))


def masks():
    generator = torch.Generator().manual_seed(4)
    seen = torch.rand(5, 6, generator=generator) > 0.4
    nothing = seen.clone()
    nothing[2] = False
    return {
        "added": torch.randn(5, 6, generator=generator, dtype=torch.float64),
        "boolean": seen,
        "of each sample": (torch.rand(2, 1, 5, 6, generator=generator) > 0.4),
        "a row sees nothing": nothing,
        "minus infinity": torch.zeros(5, 6, dtype=torch.float64).masked_fill(~seen, float("-inf")),
        "a large number": torch.zeros(5, 6, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min),
    }


@pytest.mark.parametrize("weights", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}], ids=str)
def test_attention(options, weights):
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), leaves_of(*HEADS), weights=weights,
          calls=[FLASH])  # fmt: skip


@pytest.mark.parametrize("mask", masks())
def test_masked_attention(mask):
    given = masks()[mask]
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, given), leaves_of(*HEADS), calls=[FLASH])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_that_share_keys_and_values(groups):
    shared = (2, groups, 6, 8)
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
          leaves_of((2, 4, 6, 8), shared, shared), calls=[FLASH])  # fmt: skip


def test_other_layouts():
    """Heads split from features: views with the strides of what they are split from; long sequences in blocks."""

    def split(x):
        return x.view(2, 5, 2, 4).transpose(1, 2)

    def function(q, k, v):
        return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(2, 5, 8)

    check(function, leaves_of((2, 5, 8), (2, 5, 8), (2, 5, 8)), calls=[FLASH])
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sum(-1), leaves_of(*HEADS), calls=[FLASH])
    check(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), leaves_of((1, 2, 300, 4)), calls=[FLASH])


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :3]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.4),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], dropout_p=0.4, enable_gqa=True),
    ],
)
def test_attention_that_is_decomposed(function):
    check(function, leaves_of(*HEADS))


def test_a_mask_that_is_learned():
    check(F.scaled_dot_product_attention, leaves_of(*HEADS, (4, 5, 6)), weights=(3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    """The same kernel as autograd's, so that the numbers are the same ones."""
    leaves = leaves_of(*HEADS, dtype=dtype)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).square().sum(), leaves)
    with record() as step:
        loss = F.scaled_dot_product_attention(*leaves).square().sum()
    found = {id(t): g for t, g in step.gradients(loss)}
    for leaf, g in zip(leaves, expected, strict=True):
        assert torch.equal(found[id(leaf)], g)


# ---- layers ---------------------------------------------------------------------------------------------------------


def gradients_agree(layer, *inputs, call=None, tolerance=1e-9):
    """Of all parameters and of the first input, under the same random numbers."""
    x = inputs[0].clone().requires_grad_()
    leaves = [x, *layer.parameters()]

    def loss():
        torch.manual_seed(5)
        out = call(layer, x, *inputs[1:]) if call else layer(x, *inputs[1:])
        return sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum()
                   for t in (out if isinstance(out, tuple) else (out,)) if t is not None)  # fmt: skip

    expected = torch.autograd.grad(loss(), leaves, allow_unused=True)
    with record() as step:
        value = loss()
    assert not [op.name for op in step.tape.operations if op.target not in rules]
    found = {id(t): g for t, g in step.gradients(value)}
    for k, (leaf, g) in enumerate(zip(leaves, expected, strict=True)):
        if g is None:
            continue
        error = float((found[id(leaf)] - g).abs().max()) / max(float(g.abs().max()), 1e-3)
        assert error <= tolerance, f"leaf {k} is off by {error:.1e}"


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"bias": False}, {"add_bias_kv": True},
                                     {"add_zero_attn": True}, {"batch_first": True}], ids=str)  # fmt: skip
def test_multihead_attention(options, need_weights):
    layer = nn.MultiheadAttention(8, 2, **options).double()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    gradients_agree(layer, x, call=lambda m, x: m(x, x, x, need_weights=need_weights))
    gradients_agree(layer.eval(), x, call=lambda m, x: m(x, x, x, need_weights=need_weights))


def test_multihead_attention_of_other_sizes():
    layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=3).double()
    k, v = (torch.randn(6, 3, n, dtype=torch.float64) for n in (5, 3))
    mask = torch.ones(4, 6, dtype=torch.bool).triu(2)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    gradients_agree(layer, x, call=lambda m, x: m(x, k, v, key_padding_mask=padding, attn_mask=mask))
    gradients_agree(layer, x, call=lambda m, x: m(x, k, v, key_padding_mask=padding, need_weights=False))


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"dropout": 0.0}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(options, training):
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options).double().train(training)
    gradients_agree(encoder, x)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    gradients_agree(encoder, x, call=lambda m, x: m(x, causal, is_causal=True))
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, **options).double().train(training)
    gradients_agree(decoder, x, torch.randn(2, 5, 8, dtype=torch.float64))


def test_a_transformer():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).double()
    gradients_agree(model, torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64))


# ---- kernels of GPUs: what their adjoints are called with, on tensors without content -------------------------------

META = {
    "_scaled_dot_product_flash_attention": ((0.0, True), {"scale": 0.3}, (2, 4, 6, 8)),
    "_scaled_dot_product_efficient_attention": ((None, True, 0.1, False), {}, (2, 4, 6, 8)),
    "_scaled_dot_product_cudnn_attention": ((None, True), {"scale": 0.3}, (2, 4, 6, 8)),
    "_flash_attention_forward": ((None, None, 6, 6, 0.0, True, False), {}, (2, 6, 4, 8)),
    "_efficient_attention_forward": ((None, None, None, None, None, 0.0, 0, True), {}, (2, 6, 4, 8)),
}


@pytest.mark.parametrize("name", META)
def test_kernels_of_gpus(name):
    more, options, shape = META[name]
    q, k, v = (torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=True) for _ in range(3))
    target = getattr(aten, name).default
    with torch.no_grad():
        out = target(q, k, v, *more, **options)
    grads = [torch.empty_like(out[0]), *[None] * (len(out) - 1)]
    found = by_hand(target, (q, k, v, *more), out, grads, kwargs=options)
    assert {key: g.shape for key, g in found.items()} == {0: q.shape, 1: k.shape, 2: v.shape}


def test_a_bias_asks_the_kernel_of_gpus():
    q, k, v = (torch.empty(2, 4, 8, 8, dtype=torch.float16, device="meta", requires_grad=True) for _ in range(3))
    bias = torch.empty(2, 4, 8, 8, dtype=torch.float16, device="meta", requires_grad=True)
    target = aten._scaled_dot_product_efficient_attention.default
    with torch.no_grad():
        out = target(q, k, v, bias, True)
    found = by_hand(target, (q, k, v, bias, True), out, [torch.empty_like(out[0]), None, None, None])
    assert found[3].shape == bias.shape
