"""Calls that pick or place elements by an index, each against autograd."""

import pytest
import torch
import torch.nn.functional as F

from hzo.errors import TapeError
from hzo.reverse import record
from hzo.rules import indexing
from hzo.rules.base import rules
from support.tape_oracle import check, leaves_of

aten = torch.ops.aten


def ints(*rows):
    return torch.tensor(rows)


TOKENS = ints([1, 0, 3], [3, 3, 2])
MASK = torch.tensor([[True, False, True], [False, False, True]])
ROWS, COLUMNS = ints(0, 2, 2, 1), ints(1, -1, 1, 0)
PLACES = ints([0, 2, 0], [1, 1, 0])  # for an axis of 3

CASES = [
    ("aten.embedding.default", lambda w: F.embedding(TOKENS, w), [(5, 4)]),
    ("aten.embedding.default", lambda w: F.embedding(TOKENS, w, padding_idx=3), [(5, 4)]),
    ("aten.embedding.default", lambda w: F.embedding(TOKENS, w, scale_grad_by_freq=True), [(5, 4)]),
    ("aten.embedding.default", lambda w: F.embedding(TOKENS.int(), w, padding_idx=-1), [(5, 4)]),
    ("aten.embedding.default", lambda w: F.embedding(torch.tensor(2), w), [(5, 4)]),
    ("aten.embedding.default", lambda w: F.embedding(TOKENS[:0], w), [(5, 4)]),
    ("aten.embedding.default", lambda w: F.embedding(TOKENS, w * 2, max_norm=1.0), [(5, 4)]),
    (
        "aten.embedding_dense_backward.default",
        lambda g: aten.embedding_dense_backward(g, TOKENS, 5, 3, False),
        [(2, 3, 4)],
    ),
    (
        "aten.embedding_dense_backward.default",
        lambda g: aten.embedding_dense_backward(g, TOKENS, 5, -1, False),
        [(2, 3, 4)],
    ),
    ("aten.index.Tensor", lambda x: x[ROWS], [(3, 2)]),
    ("aten.index.Tensor", lambda x: x[ROWS, COLUMNS], [(3, 2)]),
    ("aten.index.Tensor", lambda x: x[:, COLUMNS], [(3, 2, 2)]),
    ("aten.index.Tensor", lambda x: x[ROWS, :, COLUMNS], [(3, 4, 2)]),
    ("aten.index.Tensor", lambda x: x[ROWS[:, None], COLUMNS], [(3, 2)]),
    ("aten.index.Tensor", lambda x: x[MASK], [(2, 3)]),
    ("aten.index.Tensor", lambda x: x[MASK], [(2, 3, 2)]),
    ("aten.index.Tensor", lambda x: x[:, MASK], [(2, 2, 3)]),
    ("aten.index.Tensor", lambda x: x[MASK & False], [(2, 3, 2)]),
    ("aten.select.int", lambda x: x[torch.tensor(1)], [(3, 2)]),
    ("aten.index.Tensor", lambda x: x[[0, 2], 1:][..., None, ints(0, 0)], [(3, 3, 2)]),
    ("aten.index.Tensor", lambda x: x[torch.arange(3), ints(0, 1, 1)].mT[ROWS], [(3, 2, 3)]),
    ("aten.index.Tensor", lambda x: x[ROWS.to(torch.uint8) > 1], [(4, 2)]),
    ("aten._unsafe_index.Tensor", lambda x: aten._unsafe_index(x, [ROWS, None, COLUMNS % 2]), [(3, 4, 2)]),
    (
        "aten._unsafe_masked_index.default",
        lambda x: aten._unsafe_masked_index(x, ROWS < 2, [ROWS], 7.0),
        [(3,)],
    ),
    (
        "aten._unsafe_masked_index_put_accumulate.default",
        lambda x, v: aten._unsafe_masked_index_put_accumulate(x, ROWS < 2, [ROWS], v),
        [(3,), (4,)],
    ),
    ("aten.index_put.default", lambda x, v: x.index_put((ROWS[:2], COLUMNS[:2]), v), [(3, 2), (2,)]),
    ("aten.index_put.default", lambda x, v: x.index_put((ROWS,), v, accumulate=True), [(3, 2), (4, 2)]),
    ("aten.index_put.default", lambda x, v: x.index_put((ROWS,), v, accumulate=True), [(3, 2), (2,)]),
    ("aten.index_put.default", lambda x, v: x.index_put((ROWS, COLUMNS), v, accumulate=True), [(3, 2), ()]),
    ("aten.index_put.default", lambda x, v: x.index_put((MASK,), v), [(2, 3), (3,)]),
    ("aten.index_put.default", lambda x, v: x.index_put((MASK,), v), [(2, 3), (1,)]),
    ("aten.index_put.default", lambda x, v: aten.index_put(x, [None, COLUMNS[:2]], v), [(3, 2), (3, 2)]),
    ("aten._unsafe_index_put.default", lambda x, v: aten._unsafe_index_put(x, [ROWS], v, True), [(3, 2), (4, 2)]),
    ("aten._index_put_impl.default", lambda x, v: aten._index_put_impl_(x * 1, [ROWS], v, True), [(3, 2), (4, 2)]),
    ("aten.index_select.default", lambda x: x.index_select(1, ROWS), [(2, 3, 2)]),
    ("aten.index_select.default", lambda x: x.index_select(-1, torch.tensor(1)), [(2, 3)]),
    ("aten.index_select.default", lambda x: x.index_select(0, ints(0)), [()]),
    ("aten.expand.default", lambda x: x.repeat_interleave(2, 1), [(2, 3)]),
    ("aten.index_select.default", lambda x: x.repeat_interleave(ints(0, 3, 1), -1), [(2, 3)]),
    ("aten.expand.default", lambda x: x.repeat_interleave(3), [(2, 3)]),
    ("aten.index_add.default", lambda x, y: x.index_add(0, ROWS, y), [(3, 2), (4, 2)]),
    ("aten.index_add.default", lambda x, y: x.index_add(-1, ROWS, y, alpha=-2), [(2, 3), (2, 4)]),
    ("aten.index_add.default", lambda x, y: x.index_add(0, ints(0), y), [(), ()]),
    ("aten.index_copy.default", lambda x, y: x.index_copy(1, ints(2, 0), y), [(2, 3), (2, 2)]),
    ("aten.index_copy.default", lambda x, y: x.index_copy(0, ints(1), y), [(3,), ()]),
    ("aten.index_fill.int_Scalar", lambda x: x.index_fill(1, ints(0, 2), 4.0), [(2, 3)]),
    ("aten.index_fill.int_Tensor", lambda x, v: x.index_fill(-1, ints(0, 2, 0), v), [(2, 3), ()]),
    ("aten.index_fill.int_Tensor", lambda x, v: torch.ones(3, dtype=x.dtype).index_fill(0, ints(1), v) * x, [(3,), ()]),
    ("aten.gather.default", lambda x: x.gather(1, PLACES), [(2, 3)]),
    ("aten.gather.default", lambda x: x.gather(-1, PLACES[:1]), [(2, 3)]),
    ("aten.gather.default", lambda x: x.gather(0, torch.tensor(0)), [()]),
    ("aten.gather.default", lambda x: torch.take_along_dim(x, PLACES, 1), [(1, 3)]),
    ("aten.scatter.src", lambda x, s: x.scatter(1, ints([0, 2], [1, 0]), s), [(2, 3), (2, 2)]),
    ("aten.scatter.value", lambda x: x.scatter(1, PLACES, 2.0), [(2, 3)]),
    ("aten.scatter_add.default", lambda x, s: x.scatter_add(1, PLACES, s), [(2, 3), (2, 3)]),
    ("aten.scatter_add.default", lambda s: torch.zeros(3, 3).double().scatter_add(-1, PLACES, s), [(2, 3)]),
    ("aten.masked_select.default", lambda x: x.masked_select(MASK), [(2, 3)]),
    ("aten.masked_select.default", lambda x: x.masked_select(MASK), [(3,)]),
    ("aten.masked_select.default", lambda x: x.masked_select(MASK[0]), [(4, 3)]),
    ("aten.masked_scatter.default", lambda x, s: x.masked_scatter(MASK, s), [(2, 3), (3,)]),
    ("aten.masked_scatter.default", lambda x, s: x.masked_scatter(MASK[:, None], s), [(2, 4, 3), (3, 7)]),
    (
        "aten.masked_scatter_backward.default",
        lambda g: aten.masked_scatter_backward(g, MASK, [5]),
        [(2, 3)],
    ),
    ("aten.take.default", lambda x: x.take(ints([0, 5], [5, -1])), [(2, 3)]),
    ("aten.take.default", lambda x: x.mT.take(ints(0, 1)), [(2, 3)]),
    ("aten.put.default", lambda x, s: x.put(ints([0, 5], [2, 3]), s), [(2, 3), (2, 2)]),
    ("aten.put.default", lambda x, s: x.put(ints(0, 5, 0), s, accumulate=True), [(2, 3), (3,)]),
    ("aten.sort.default", lambda x: x.sort()[0], [(2, 5)]),
    ("aten.sort.default", lambda x: x.sort(0, descending=True)[0], [(5, 2)]),
    ("aten.sort.default", lambda x: x.sort()[0], [()]),
    ("aten.sort.stable", lambda x: x.sort(stable=True, dim=0, descending=True)[0], [(5, 2)]),
    ("aten.sort.default", lambda x: x.gather(-1, x.argsort(-1)), [(2, 5)]),
    ("aten.topk.default", lambda x: x.topk(2)[0], [(3, 5)]),
    ("aten.topk.default", lambda x: x.topk(2, 0, False)[0], [(5, 3)]),
    ("aten.topk.default", lambda x: x.topk(1, dim=1, largest=True, sorted=False)[0], [(5, 3)]),
    ("aten.topk.default", lambda x: x.topk(1)[0], [()]),
    ("aten.searchsorted.Tensor", lambda x, y: x * torch.searchsorted(x.sort()[0], y), [(4,), (4,)]),
    ("aten.searchsorted.Scalar", lambda x: x * torch.searchsorted(x.sort()[0], 0.3), [(4,)]),
    ("aten.bucketize.Tensor", lambda x: x * torch.bucketize(x, torch.tensor([0.0, 0.5])), [(4,)]),
    ("aten.bucketize.Scalar", lambda x: x * torch.bucketize(0.2, x.sort()[0]), [(4,)]),
    ("aten.nonzero.default", lambda x: x.flatten()[x.nonzero()[:, 0]], [(4, 2)]),
    ("aten.nonzero_static.default", lambda x: x[x.nonzero_static(size=3)[:, 0]], [(4,)]),
    ("aten._unique2.default", lambda x: x[x.unique(return_inverse=True)[1]], [(4,)]),
    ("aten.unique_dim.default", lambda x: x[x.unique(dim=0, return_inverse=True)[1]], [(4, 2)]),
    ("aten.unique_consecutive.default", lambda x: x * torch.unique_consecutive(x, return_counts=True)[1], [(4,)]),
]  # fmt: skip

REDUCTIONS = ["sum", "prod", "mean", "amax", "amin"]


@pytest.mark.parametrize(("name", "function", "shapes"), CASES)
def test_gradient(name, function, shapes):
    check(function, leaves_of(*shapes), calls=[name])


@pytest.mark.parametrize(("name", "function", "shapes"), CASES)
def test_second_use(name, function, shapes):
    """The operand has another cotangent, too, and the result several."""

    def twice(*leaves):
        results = function(*[leaf * 1.5 for leaf in leaves])
        return [results * results, results.sin(), *[leaf * 2 for leaf in leaves]]

    check(twice, leaves_of(*shapes), calls=[name])


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ties", [False, True])
def test_scatter_reduce(reduce, include_self, ties):
    """Also with ties and with factors of zero, once and twice in one place."""
    x, source = leaves_of((4, 3), (4, 3))
    places = ints([0, 1, 2], [0, 1, 2], [0, 2, 1], [1, 1, 0])
    if ties:
        x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        source = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    check(
        lambda x, s: x.scatter_reduce(0, places, s, reduce, include_self=include_self),
        [x, source],
        calls=["aten.scatter_reduce.two"],
    )


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS[1:])
@pytest.mark.parametrize("ties", [False, True])
def test_index_reduce(reduce, include_self, ties):
    """Also with ties and with factors of zero, once and twice in one place."""
    x, source = leaves_of((2, 3), (2, 5))
    if ties:
        x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
        source = torch.tensor([[1.0, 0.0, 2.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    check(
        lambda x, s: x.index_reduce(-1, ints(0, 1, 2, 1, 2), s, reduce, include_self=include_self),
        [x, source],
        calls=["aten.index_reduce.default"],
    )


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin", "prod"])
def test_index_smaller_than_source(reduce):
    """PyTorch has no derivative here: compare with the part of the source that is used."""
    x, source = leaves_of((4, 3), (5, 4))
    places = ints([0, 1], [0, 2], [3, 2])

    def gradients(source_of):
        x_, s_ = (t.detach().clone().requires_grad_() for t in (x, source))
        with record() as step:
            loss = x_.scatter_reduce(0, places, source_of(s_), reduce).sin().sum()
        found = {id(leaf): g for leaf, g in step.gradients(loss)}
        return found[id(x_)], found[id(s_)]

    for whole, part in zip(gradients(lambda s: s), gradients(lambda s: s[:3, :2]), strict=True):
        assert torch.equal(whole, part)
    assert gradients(lambda s: s)[1][:3, :2].any()


@pytest.mark.parametrize("call", ["scatter", "scatter_add"])
def test_scatter_by_a_smaller_index(call):
    x, source = leaves_of((4, 3), (5, 4))
    places = ints([0, 1], [3, 2])
    with record() as step:
        loss = (getattr(x, call)(0, places, source) ** 2).sum()
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    part = source[:2, :2]
    (expected,) = torch.autograd.grad((getattr(x, call)(0, places, part) ** 2).sum(), part)
    assert torch.allclose(found[id(source)][:2, :2], expected)
    assert not found[id(source)][2:].any()
    assert not found[id(source)][:, 2:].any()


@pytest.mark.parametrize(("reduce", "equal"), [("add", "sum"), ("multiply", "prod")])
@pytest.mark.parametrize("number", [False, True])
def test_scatter_with_a_reduction(reduce, equal, number):
    """PyTorch has no derivative here: compare with that of ``scatter_reduce``."""
    x, source = leaves_of((2, 3), (2, 3))
    given = 1.7 if number else source
    with record() as step:
        loss = x.scatter(1, PLACES, given, reduce=reduce).sin().sum()
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    spread = torch.full_like(x, 1.7) if number else source
    same = x.scatter_reduce(1, PLACES, spread, equal).sin().sum()
    expected = torch.autograd.grad(same, [x] if number else [x, source])
    for leaf, g in zip([x, source], expected, strict=False):
        assert torch.allclose(found[id(leaf)], g)


BAGS = [
    {},
    {"mode": "sum"},
    {"mode": "max"},
    {"mode": "sum", "scale_grad_by_freq": True},
    {"mode": "mean", "padding_idx": 3},
    {"mode": "sum", "padding_idx": 3},
    {"mode": "max", "padding_idx": 3},
    {"mode": "mean", "include_last_offset": True},
]


@pytest.mark.parametrize("options", BAGS)
def test_embedding_bag(options):
    offsets = ints(0, 2, 2, 6) if "include_last_offset" in options else ints(0, 2, 2)
    check(
        lambda w: F.embedding_bag(TOKENS.flatten(), w, offsets, **options),
        leaves_of((5, 4)),
        calls=["aten._embedding_bag.default"],
    )


@pytest.mark.parametrize("weights", [(), (0,)])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"include_last_offset": True}])
def test_embedding_bag_with_factors(weights, options):
    offsets = ints(0, 2, 2, 6) if "include_last_offset" in options else ints(0, 2, 2)
    check(
        lambda w, f: F.embedding_bag(TOKENS.flatten(), w, offsets, mode="sum", per_sample_weights=f * 1, **options),
        leaves_of((5, 4), (6,)),
        weights=weights,
        calls=["aten._embedding_bag.default"],
    )


def test_embedding_bag_of_a_batch():
    check(lambda w, f: F.embedding_bag(TOKENS, w, mode="sum", per_sample_weights=f.exp()), leaves_of((5, 4), (2, 3)))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("options", [{"lengths": ints(2, 0, 3)}, {"offsets": ints(0, 2, 2, 5)}])
def test_segment_reduce(reduce, options):
    check(
        lambda x: torch.segment_reduce(x, reduce, unsafe=True, initial=1.0, **options),
        leaves_of((5, 2)),
        calls=["aten.segment_reduce.default"],
    )


@pytest.mark.parametrize("function", [lambda x: x.sort()[0], lambda x: x.topk(3)[0], lambda x: x.sort(stable=True)[0]])
def test_ties(function):
    """Which of equal elements stands first is up to the kernel, and the cotangent goes there."""
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    check(function, [x])


def test_one_hot():
    check(lambda x: F.one_hot(x.argmax(-1), 4) * x, leaves_of((3, 4)))


def test_values_that_occur():
    """PyTorch has no derivative of the values either."""
    (x,) = leaves_of((4,))
    with record() as step:
        loss = x.unique().sum()
    with pytest.raises(TapeError, match="by index"):
        step.gradients(loss)


def test_every_rule_has_a_case():
    named = {name for name, *_ in CASES}
    named |= {"aten.scatter_reduce.two", "aten.index_reduce.default", "aten._embedding_bag.default"}
    named |= {"aten.segment_reduce.default", "aten.scatter.reduce", "aten.scatter.value_reduce"}
    own = {str(target) for target, rule in rules.items() if rule.vjp.__module__ == indexing.__name__}
    assert own <= named, own - named
