"""Functions of activities in the many ways in which they are called.

A name stands for all functions of this name that a table holds: ``torch.add`` and ``torch.Tensor.add``.
"""

import torch

from hzo.adjoints import FUNCTIONS

CLOSED = 1e-9
INF = float("inf")
CONSTANT = torch.arange(12.0, dtype=torch.float64).view(6, 2)


def forms(*, operands=1, shape=(4, 6), other=None, **by_name):
    """Calls by name: each of ``function, x, y``; how many operands are to have a rule."""
    return {name: (calls, operands, shape, other or shape) for name, calls in by_name.items()}


def index(*values):
    return torch.tensor(values)


def like(x, *values):
    """Places along dimension 2, the same for all samples."""
    return torch.tensor(values).expand(x.shape[0], x.shape[1], len(values))


_PLUS = [lambda f, x, y: f(x, y), lambda f, x, y: f(x, y[:, :1]), lambda f, x, y: f(x[:, :, :1], y)]
_SCALED = [lambda f, x, y: f(x, y, alpha=3), lambda f, x, y: f(x, other=y, alpha=0.5)]
_IN_PLACE = [lambda f, x, y: f(x * 1, y), lambda f, x, y: f(x * 1, y[:, :1]), lambda f, x, y: f(x * 1, x)]
_ONE = [lambda f, x, y: f(x, 2.5), lambda f, x, y: f(x, 2)]
_TWO_DIMS = [
    lambda f, x, y: f(x, 1, 2),
    lambda f, x, y: f(x, -1, -2),
    lambda f, x, y: f(x, -1, 1),
    lambda f, x, y: f(x, 2, 2),
]
_CAT = [
    lambda f, x, y: f([x, y], 1),
    lambda f, x, y: f((x, y, x), dim=-1),
    lambda f, x, y: f(tensors=[y, x], dim=2),
    lambda f, x, y: f([x, y], axis=2),
    lambda f, x, y: f([x, torch.ones(x.shape[0], 1, 6, dtype=x.dtype), y], 1),
    lambda f, x, y: f([x, y[:, :0]], 1),
]
_SPLIT = [lambda f, x, y: f(x, 2, 1), lambda f, x, y: f(x, 4, -1), lambda f, x, y: f(x, 3, dim=2)]
_REDUCE = [
    lambda f, x, y: f(x, 1),
    lambda f, x, y: f(x, -1, True),
    lambda f, x, y: f(x, (1, 2)),
    lambda f, x, y: f(x, dim=[-2, -1], keepdim=True),
    lambda f, x, y: f(x, axis=1),
    lambda f, x, y: f(x, dim=2, keepdims=True),
]
_SOFTMAX = [
    lambda f, x, y: f(x, 1),
    lambda f, x, y: f(x, -1),
    lambda f, x, y: f(x, dim=2),
    lambda f, x, y: f(x * 50, dim=-2),
]
_FILL = [
    lambda f, x, y: f(x * 1, y > 0, -INF),
    lambda f, x, y: f(x * 1, mask=y > 0, value=2.0),
    lambda f, x, y: f(x * 1, torch.tensor([True, False] * 3), 0.5),
]

FORMS = {
    **forms(add=_PLUS + _SCALED, sub=_PLUS + _SCALED, operands=2),
    **forms(mul=_PLUS, multiply=_PLUS, __add__=_PLUS, __sub__=_PLUS, __mul__=_PLUS, operands=2),
    **forms(__radd__=_PLUS, __rsub__=_PLUS, __rmul__=_PLUS, operands=2),
    **forms(add_=_IN_PLACE, sub_=_IN_PLACE, __iadd__=_IN_PLACE, __isub__=_IN_PLACE, operands=2),
    **forms(mul_=_IN_PLACE, __imul__=_IN_PLACE, operands=2),
    **forms(neg=[lambda f, x, y: f(x)]),
    **forms(
        matmul=[
            lambda f, x, y: f(x, y),
            lambda f, x, y: f(x[:, None], y[:, None].repeat(1, 2, 1, 1)),
            lambda f, x, y: f(x, x.mT),
        ],
        __matmul__=[lambda f, x, y: f(x, y)],
        bmm=[lambda f, x, y: f(x, y), lambda f, x, y: f(x, x.mT)],
        operands=2,
        other=(6, 5),
    ),
    **forms(__rmatmul__=[lambda f, x, y: f(x, y)], operands=2, other=(5, 4)),
    **forms(transpose=_TWO_DIMS, swapaxes=_TWO_DIMS, swapdims=_TWO_DIMS),
    **forms(
        permute=[
            lambda f, x, y: f(x, (0, 2, 1)),
            lambda f, x, y: f(x, dims=(2, 0, 1)),
            lambda f, x, y: f(x, [-1, 1, 0]),
        ],
        movedim=[lambda f, x, y: f(x, 1, 2), lambda f, x, y: f(x, (0, -1), (-1, 0))],
        moveaxis=[lambda f, x, y: f(x, source=2, destination=0)],
        flip=[lambda f, x, y: f(x, (1, 2)), lambda f, x, y: f(x, [-1])],
        roll=[lambda f, x, y: f(x, 1, 2), lambda f, x, y: f(x, shifts=(2, -1), dims=(1, 2))],
        rot90=[lambda f, x, y: f(x, 1, (1, 2)), lambda f, x, y: f(x, k=3, dims=[-1, 1])],
        tril=[lambda f, x, y: f(x), lambda f, x, y: f(x, diagonal=-1)],
        triu=[lambda f, x, y: f(x, 1)],
        diagonal=[lambda f, x, y: f(x, 0, 1, 2), lambda f, x, y: f(x, offset=1, dim1=1, dim2=2)],
    ),
    **forms(
        reshape=[lambda f, x, y: f(x, (-1, 24)), lambda f, x, y: f(x, (x.shape[0] * 4, 6))],
        view=[lambda f, x, y: f(x, x.shape[0], 24), lambda f, x, y: f(x, (-1, 2, 12))],
        flatten=[lambda f, x, y: f(x, 1), lambda f, x, y: f(x, start_dim=0, end_dim=1)],
        unflatten=[lambda f, x, y: f(x, 2, (2, -1)), lambda f, x, y: f(x, dim=-1, sizes=(3, 2))],
        squeeze=[lambda f, x, y: f(x[:, :1], 1), lambda f, x, y: f(x[..., :1], dim=-1), lambda f, x, y: f(x[:, 0:1])],
        unsqueeze=[lambda f, x, y: f(x, 1), lambda f, x, y: f(x, dim=-1)],
        contiguous=[lambda f, x, y: f(x.transpose(1, 2))],
        clone=[lambda f, x, y: f(x), lambda f, x, y: f(x.mT, memory_format=torch.contiguous_format)],
        view_as=[lambda f, x, y: f(x, y.reshape(-1, 24))],
        reshape_as=[lambda f, x, y: f(x.mT, other=y)],
    ),
    **forms(
        expand=[lambda f, x, y: f(x[:, :1], -1, 5, -1), lambda f, x, y: f(x[..., :1], (x.shape[0], 4, 3))],
        expand_as=[lambda f, x, y: f(x[:, :1], y)],
        repeat=[lambda f, x, y: f(x, 1, 2, 3), lambda f, x, y: f(x, (1, 1, 2))],
        tile=[lambda f, x, y: f(x, (2, 1))],
        repeat_interleave=[lambda f, x, y: f(x, 2, 1), lambda f, x, y: f(x, index(0, 1, 2, 0, 1, 3), dim=-1)],
        index_select=[lambda f, x, y: f(x, 2, index(0, 5, 0)), lambda f, x, y: f(x, dim=-2, index=index(3, 3))],
        gather=[lambda f, x, y: f(x, 2, like(x, 0, 0, 5)), lambda f, x, y: f(x, dim=-1, index=like(x, 2))],
        take_along_dim=[lambda f, x, y: f(x, like(x, 4, 0, 4), 2), lambda f, x, y: f(x, indices=like(x, 1), dim=2)],
        __getitem__=[
            lambda f, x, y: f(x, (slice(None), 1)),
            lambda f, x, y: f(x, (Ellipsis, None, slice(1, None, 2))),
            lambda f, x, y: f(x, (slice(None), slice(1, 3), -1)),
            lambda f, x, y: f(x, (slice(None), [0, 2, 0])),
            lambda f, x, y: f(x, (slice(None), index(3, 3), index(0, 0))),
            lambda f, x, y: f(x, (slice(None), index(0, 2)[:, None], index(0, 5, 5))),
            lambda f, x, y: f(x, (Ellipsis, torch.tensor([True, False] * 3))),
            lambda f, x, y: f(x, (slice(None), True)),
            lambda f, x, y: f(x, (torch.arange(x.shape[0]), slice(None), 2)),
            lambda f, x, y: f(x, slice(None)),
        ],
    ),
    **forms(
        stack=[
            lambda f, x, y: f([x, y], 1),
            lambda f, x, y: f((x, x, y), dim=-1),
            lambda f, x, y: f(tensors=[y, x], dim=2),
            lambda f, x, y: f([x, torch.ones(x.shape[0], 4, 6, dtype=x.dtype), y], axis=1),
            lambda f, x, y: f([x.sin(), y.new_ones(4, 6).expand(x.shape[0], 4, 6), y]),
        ],
        hstack=[lambda f, x, y: f([x, y, x])],
        vstack=[lambda f, x, y: f((x, y))],
        cat=_CAT,
        concat=_CAT,
        concatenate=_CAT,
        operands=2,
    ),
    **forms(
        chunk=_SPLIT,
        split=[*_SPLIT, lambda f, x, y: f(x, [1, 2, 3], -1), lambda f, x, y: f(x, split_size_or_sections=3, dim=1)],
        tensor_split=[lambda f, x, y: f(x, 4, 2), lambda f, x, y: f(x, (1, 4), dim=-1)],
        unbind=[lambda f, x, y: f(x, 1), lambda f, x, y: f(x[..., :3], dim=-1)],
        narrow=[lambda f, x, y: f(x, 1, 1, 2), lambda f, x, y: f(x, dim=-1, start=0, length=5)],
        select=[lambda f, x, y: f(x, 1, 2), lambda f, x, y: f(x, dim=-1, index=-1)],
    ),
    **forms(
        pixel_shuffle=[lambda f, x, y: f(x, 2)], channel_shuffle=[lambda f, x, y: f(x, 2)], shape=(4, 3, 2)
    ),
    **forms(pixel_unshuffle=[lambda f, x, y: f(x, 2)], shape=(2, 4, 6)),
    **forms(
        pad=[
            lambda f, x, y: f(x, (1, 2)),
            lambda f, x, y: f(x, (1, -2, 0, 3)),
            lambda f, x, y: f(x, (1, 2), value=7.0),
            lambda f, x, y: f(x, (2, 1), "reflect"),
            lambda f, x, y: f(x, (2, 1), mode="replicate"),
            lambda f, x, y: f(x, (2, 6), mode="circular"),
            lambda f, x, y: f(input=x, pad=[0, 1, 2, 0]),
        ]
    ),
    **forms(masked_fill=_FILL, masked_fill_=_FILL[:1], sum=_REDUCE, mean=_REDUCE),
    **forms(softmax=_SOFTMAX, log_softmax=_SOFTMAX),
    **forms(
        where=[
            lambda f, x, y: f(x > y, x, y),
            lambda f, x, y: f(x > 0, x, y[:, :1]),
            lambda f, x, y: f(y > 0, input=x, other=y),
            lambda f, x, y: f(condition=y > 0, input=x, other=y),
            lambda f, x, y: f(torch.tensor([True, False] * 3), x, -INF) + f(y > 0, y, 2.0),
            lambda f, x, y: f(x > 0, 1.0, x) + f(x > 0, y, y),
        ],
        operands=2,
    ),
    **forms(
        einsum=[
            lambda f, x, y: f("btc,bsc->bts", x, y),
            lambda f, x, y: f("btc, bsc -> b", x, y),
            lambda f, x, y: f("btc,bsd,btc->bsc", x, y, x),
        ],
        operands=2,
    ),
    **forms(relu=[lambda f, x, y: f(x)], relu_=[lambda f, x, y: f(x * 1)]),
}  # fmt: skip
_SIZE = [lambda f, x, y: f(x, (x.shape[0], 6)) + y]
FORMS |= {name: ([lambda f, x, y: f(x) + y], 1, (6,), (6,)) for name in ("zeros_like", "ones_like")}
FORMS |= dict.fromkeys(("new_zeros", "new_ones"), (_SIZE, 1, (6,), (6,)))
FORMS["full_like"] = ([lambda f, x, y: f(x, 3.0) + y], 1, (6,), (6,))
FORMS["new_full"] = ([lambda f, x, y: f(x, (x.shape[0], 6), 3.0) + y], 1, (6,), (6,))
FORMS["__get__"] = ([lambda f, x, y: f(f(x.flatten(1)))], 1, (4, 6), (6,))  # .T and .mT
FORMS["mm"] = ([lambda f, x, y: f(x, CONSTANT)], 1, (6,), (6,))
FORMS["t"] = ([lambda f, x, y: f(x)], 1, (4,), (4,))


def functions_named(name):
    return [f for f in FUNCTIONS if getattr(f, "__name__", "") == name]
