"""In-place code and views: the gradient is autograd's, whatever shares memory with what."""

import pytest
import torch
import torch.nn.functional as F

from hzo.reverse import record
from support.tape_oracle import check, leaves_of


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


# -- slices assigned, views of views ----------------------------------------------------------------------------------


def slice_assigned(x, y):
    h = x * 2
    h[1:3] = y
    return h * h


def row_assigned_and_read(x, y):
    h = x * 2
    h[1] = h[0] * y[0]
    h[0] = h[1] * h[2]
    return h.sin()


def element_assigned(x, y):
    h = x.clone()
    h[1, 2] = y[0, 0] ** 2
    return h * x


def number_assigned(x, y):
    h = x * 1
    h[:, 1] = 3.0
    h[2] = 0
    return h * h, y


def views_of_views(x, y):
    h = x * 2
    h[1:].t()[1:, ::2].mul_(y[:, :2].t()[1:] * 3)
    return h.exp()


def view_kept_and_written(x, y):
    h = x * 2
    v = h[1:3]
    w = v[:, 1:]
    v.mul_(y)
    w.add_(h[0, 1:])
    v[0].sin_()
    return h * 2, v, w * w


def base_written_view_read(x, y):
    h = x * 2
    v = h[1:3]
    h.mul_(3)
    return v * y


def view_written_base_read_twice(x, y):
    h = x * 2
    v = h[1:3]
    first = h.sum()
    v *= y
    second = h.sum()
    v *= y
    return first * second, h.prod()


def stale_aliases_out_of_order(x, y):
    h = x * 2
    a, b, c = h[0], h[0:2], h[:, 1]
    c.mul_(2)
    b.add_(y)
    d = a * 1
    a.exp_()
    return c * 3, d, b.sin(), h


def stale_view_created_before_many_writes(x, y):
    h = x + 1
    v = h.view(-1)[2:7]
    for k in range(4):
        h[k % 4] *= 1 + y[0] * k
        h[:, 0] += v.sum()
    return v.cos()


def chained_in_place(x, y):
    return (x * 2).mul_(y[0]).add_(1).sigmoid_().sub_(x).neg_()


def transposed_write(x, y):
    h = x * 2
    h.t()[0].copy_(y[0, 0] * h[:, 1])
    return h.t() * 2


def permuted_reshaped_write(x, y):
    h = (x * 2).view(2, 2, 3)
    p = h.permute(2, 0, 1)
    p[0] *= 3
    p[1:, 0].add_(y[0, 0])
    return h.reshape(-1) ** 2


def diagonal_written(x, y):
    h = x[:3] * 2
    h.diagonal().mul_(y[0])
    h.diagonal().copy_(h.diagonal(1).sum() * h[0])
    return h * h


def unfolded_view_read_after_write(x, y):
    h = x.flatten() * 2
    u = h.unfold(0, 4, 3)
    h[2:5] *= y[0]
    return u * u


def strided_view_read_after_write(x, y):
    h = x.flatten() * 2
    u = h.as_strided((3, 4), (2, 1), 1)
    h[2:5] *= y[0]
    return u * u, h.as_strided((2, 2), (1, 1))


def strided_of_a_transpose(x, y):
    h = (x * 2).t()
    return h.as_strided((2, 3), (3, 1), 2) * y


def flat_loop(x, y):
    h = x * 1
    for row in range(4):
        for column in range(3):
            h[row, column] = h[row, column] * h[row - 1, column - 1] + y[0, column]
    return h


def sum_into_slices(x, y):
    h = x * 1
    for k in range(1, 4):
        h[k] += h[k - 1] * y[0]
        h[k] /= 2
    return h


def expanded_then_cloned(x, y):
    h = x[0].expand(4, 3).clone()
    h[1] = y[0]
    h[:, 0] *= 2
    return h * x


def expanded_alias_of_a_written_base(x, y):
    h = x[0] * 2
    wide = h.expand(4, 3)
    h.mul_(y[0])
    return wide * x


def expanded_alias_seen_before(x, y):
    h = x[0] * 2
    wide = h.expand(4, 3)
    first = wide * 3
    h[1:].mul_(y[0, 1:])
    return first + wide * x


def narrow_and_select(x, y):
    h = x * 1
    h.narrow(0, 1, 2).mul_(y)
    h.select(1, 2).add_(h.select(1, 0))
    return h.narrow(1, 1, 2)


def squeezed_in_place(x, y):
    h = (x * 2)[None]
    h.squeeze_(0)
    h.unsqueeze_(-1)
    h.transpose_(0, 1)
    h.squeeze_()
    h.t_()
    return h[1:3] * y


def squeezed_with_views(x, y):
    h = x * 2
    v = h[1:3]
    h.t_()
    h[0] *= 3
    v.unsqueeze_(0)
    v.mul_(y)
    return h.sin(), v


def transposed_after_saved(x, y):
    h = x * 2
    s = h * h
    h.t_()
    return s.t() * h


# -- buffers filled ---------------------------------------------------------------------------------------------------


def rows_filled(x, y):
    out = zeros(5, 4)
    for t in range(5):
        out[t] = x.sum(1) * t + out[t - 1]
    return out * out


def stepwise_recurrence(x, y):
    states = torch.empty(4, 3, dtype=x.dtype)
    h = y[0]
    for t in range(4):
        h = torch.tanh(x[t] + h)
        states[t] = h
    return states[1:] * states[:-1]


def filled_by_column_through_a_view(x, y):
    out = zeros(3, 4)
    columns = out.t()
    for k in range(4):
        columns[k] = x[k] * (k + 1)
    return out.sin(), columns


def filled_view_of_a_view_of_constants(x, y):
    out = zeros(2, 5, 3)
    inner = out[0]
    inner[1:][::2] = y
    inner[0].add_(x[0])
    return out[0] * 2, out[1], inner


def constant_buffer_scaled_then_filled(x, y):
    out = torch.ones(4, 3, dtype=x.dtype)
    view = out[2:]
    out.mul_(2)
    view[0] = x[0]
    out[0] = view.sum(0)
    out.add_(1)
    return out * out


def accumulated_into_a_constant(x, y):
    total = zeros(3)
    for row in x:
        total += row.sin()
    total /= 4
    return total * y


def multiplied_constant(x, y):
    h = torch.full((4, 3), 2.0, dtype=x.dtype)
    h.mul_(x)
    h.mul_(x)
    return h


def copied_with_broadcast(x, y):
    out = zeros(4, 3)
    out.copy_(y[0])
    out[:, 1].copy_(x[:, 0])
    return out * x


def copied_from_another_dtype(x, y):
    out = torch.zeros(4, 3, dtype=torch.float32)
    out.copy_(x)
    out[1] = y[0]
    return out.double() * 2


def padded_by_assignment(x, y):
    out = x.new_zeros(6, 5)
    out[1:5, 1:4] = x
    return out.unfold(0, 3, 1).unfold(1, 3, 1).sum((-1, -2))


def shifted_within(x, y):
    h = x * 1
    h[1:] = h[:-1].clone()
    return h * x


# -- masks and indices ------------------------------------------------------------------------------------------------


def mask_assigned(x, y):
    h = x * 1
    h[h > 0] = 0.5
    h[x < -1] = y[0, 0]
    return h * x


def mask_assigned_tensor(x, y):
    h = x * 1
    m = x > 0
    h[m] = h[m] * 2 + 1
    h[~m] *= -1
    return h * h


def index_put(x, y):
    h = x * 1
    i = torch.tensor([0, 2])
    h[i] = y
    h[i, torch.tensor([1, 1])] += y[:, 0]
    h.index_put_((torch.tensor([1, 1, 3]),), x[:3], accumulate=True)
    h[i[:, None], i] *= 2
    return h * h


def masked_fill(x, y):
    h = x @ y.t()
    h.masked_fill_(torch.eye(4, 2, dtype=torch.bool), float("-inf"))
    return h.softmax(0)


def masked_fill_of_a_view(x, y):
    h = x * 2
    h[:2].masked_fill_(y > 0, 1.0)
    h.t()[1].masked_fill_(torch.tensor([True, False, False, True]), y[0, 0])
    return h * h


def scattered(x, y):
    h = x * 1
    h.scatter_(1, torch.tensor([[0], [1], [2], [0]]), 7.0)
    h.scatter_add_(0, torch.tensor([[0, 1, 2], [0, 0, 0]]), y)
    h.index_add_(0, torch.tensor([0, 3]), y)
    h.index_fill_(1, torch.tensor([1]), 2.0)
    h.index_copy_(0, torch.tensor([2]), y[:1])
    return h * h


def where_and_clamp(x, y):
    h = x * 1
    h[:2].clamp_(min=0)
    h[1:].clamp_(-0.5, 0.5)
    return h * x, torch.where(h > 0, h, y.sum())


def triangular(x, y):
    h = x[:3] @ y[0].diag()
    h.tril_()
    h.fill_diagonal_(1.0)
    return h @ h


# -- what autograd does not see ---------------------------------------------------------------------------------------


def written_under_no_grad(x, y):
    h = x * 2
    with torch.no_grad():
        h[0] = 5.0
        h[1:].mul_(0.5)
    return h * h


def view_read_after_no_grad(x, y):
    h = x * 2
    v = h[1:3]
    with torch.no_grad():
        h.add_(1)
    return v * v, h * 1


def no_grad_then_written(x, y):
    h = x * 2
    v = h[1:3]
    with torch.no_grad():
        v.add_(1)
    h[0] *= 3
    v.mul_(y)
    with torch.no_grad():
        h.mul_(2)
    return h * h, v.exp()


def leaf_written_under_no_grad(x, y):
    with torch.no_grad():
        x[1] = 0.5
        y[0].fill_(2.0)
    h = x * y[0]
    k = x + y[1]
    return h, k * k


def data_written(x, y):
    h = x * 2
    h.data[1] = 4.0
    return h * h


def data_of_a_view_written(x, y):
    h = x * 2
    v = h[:2]
    v.data.mul_(3)
    return h.sin(), v * y


def detached_written(x, y):
    h = x * 2
    h.detach().add_(1)
    return h * h


def detached_gets_a_history(x, y):
    h = x * 2
    d = h.detach()
    d.mul_(y[0])
    return d * 3, h * h


def detached_view_gets_a_history(x, y):
    h = x * 2
    d = h.detach()[1:3]
    d.mul_(y)
    d[0].add_(x[0])
    return d * 3, h * h


def gaussian_likelihood(x, y):
    return F.gaussian_nll_loss(x, torch.ones_like(x), (y[:1] ** 2).expand(4, 3).clone() * 1e-9 + x**2)


def cosine(x, y):
    return F.cosine_similarity(x * 1e-12, y[0], dim=-1), F.cosine_similarity(x, y[:1])


# -- layers and lists -------------------------------------------------------------------------------------------------


def relu_in_place_after_convolution(x, y):
    h = F.conv1d(x.t()[None], y[:, :, None])
    h = F.relu(h, inplace=True) * 2
    return F.dropout(h, 0.5, True, inplace=True)


def relu_in_place_after_normalization(x, y):
    h = F.batch_norm(x * 2, None, None, y[0], y[1], training=True)
    h = F.relu(h, inplace=True)
    h += x
    return F.leaky_relu(h, 0.1, inplace=True)


def residual_added(x, y):
    h = x * 2
    for _ in range(3):
        r = torch.tanh(h @ y.t() @ y)
        h += r
    return h


def activations_in_place(x, y):
    h = F.elu(x * 1, inplace=True)
    h = F.hardtanh(h * 2, inplace=True)
    h = F.silu(h + 1, inplace=True)
    h = F.hardswish(h * 3, inplace=True)
    h = F.threshold(h, 0.1, 0.2, inplace=True)
    return F.mish(F.celu(h * 1, inplace=True), inplace=True)


def chunks_written(x, y):
    a, b = torch.unsafe_chunk(x * 2, 2)
    a.mul_(b)
    b.add_(a)
    return a * y, b


def chunks_written_under_no_grad(x, y):
    h = x * 2
    a, _ = h.chunk(2)
    with torch.no_grad():
        a.mul_(3)
    return h * h


def rows_written_under_no_grad(x, y):
    h = x * 2
    with torch.no_grad():
        for row in h.unbind():
            row.add_(1)
    return h * h


def lists(x, y):
    hs = [x * 2, y * 3]
    torch._foreach_add_(hs, 1.0)
    torch._foreach_mul_(hs, [2.0, 3.0])
    torch._foreach_mul_(hs, [x, y])
    torch._foreach_sub_(hs, [y[:1], x[0]], alpha=0.1)
    torch._foreach_addcmul_(hs, [x, y], [x, y], value=0.5)
    torch._foreach_sigmoid_(hs)
    out = torch._foreach_exp(hs)
    norms = torch._foreach_norm(out)
    more = torch._foreach_addcdiv(torch._foreach_lerp(out, hs, 0.3), out, hs, [0.5, 2.0])
    most = torch._foreach_maximum(torch._foreach_minimum(more, 2.0), [0.5, 0.6])
    return [*norms, *torch._foreach_pow(most, [2.0, 3.0]), *torch._foreach_add(torch._foreach_neg(hs), hs, alpha=3)]


def lists_of_views(x, y):
    h = x * 2
    torch._foreach_mul_([h[0], h[2]], list(y.unbind()))
    return h * h


def fused_product_in_place(x, y):
    h = x[:2].t() * 2
    h.addmm_(y.t(), x[:2, :2], beta=0.5, alpha=2)
    h.addcmul_(h.clone(), y.t()).addcdiv_(y.t(), h.detach().abs() + 1)
    return h


def random_numbers_over_a_history(x, y):
    h = x * 2
    h[1:].normal_()
    h[0].uniform_()
    h[0, 0] = y[0, 0]
    return h * x


def zeroed(x, y):
    h = x * 2
    k = h * y[0]
    h.zero_()
    h[1] += x[1]
    h[2].fill_(3.0)
    h[3].fill_(y[0, 0])
    return h * h, k


def swapped_rows(x, y):
    h = x * 1
    h[[0, 1]] = h[[1, 0]]
    a, b = h[2].clone(), h[3].clone()
    h[2], h[3] = b, a
    return h * x


def running_maximum(x, y):
    best = x[0].clone()
    for row in x[1:]:
        best[:] = torch.maximum(best, row)
    return best * y


def cumulative_in_place(x, y):
    h = x * 1
    h.cumsum_(0)
    h[:, 0].cumsum_(0)
    return h * h


def complex_views(x, y):
    z = torch.complex(x, x * 2)
    z.real.mul_(y[0])
    r = torch.view_as_real(z)
    r[..., 1] += 3 * x
    z[0] *= 2
    z.imag[1] = y[1]
    return z * z, r


def complex_conjugate_written(x, y):
    z = torch.complex(x, x * 2)
    c = z.conj()
    z[1:] *= 2j
    c[0].mul_(1 + 2j)
    z.imag.add_(1)
    return c * 2, z * z.conj()


CASES = [
    slice_assigned, element_assigned, number_assigned, views_of_views, view_kept_and_written,
    base_written_view_read, view_written_base_read_twice, stale_aliases_out_of_order,
    stale_view_created_before_many_writes, permuted_reshaped_write, unfolded_view_read_after_write,
    strided_view_read_after_write, strided_of_a_transpose, expanded_then_cloned, expanded_alias_of_a_written_base,
    expanded_alias_seen_before, narrow_and_select, squeezed_in_place, squeezed_with_views, rows_filled,
    stepwise_recurrence, filled_by_column_through_a_view, filled_view_of_a_view_of_constants,
    constant_buffer_scaled_then_filled, accumulated_into_a_constant, multiplied_constant, copied_with_broadcast,
    copied_from_another_dtype, padded_by_assignment, shifted_within, mask_assigned, mask_assigned_tensor, index_put,
    masked_fill, masked_fill_of_a_view, scattered, where_and_clamp, triangular, written_under_no_grad,
    view_read_after_no_grad, no_grad_then_written, leaf_written_under_no_grad, data_written, data_of_a_view_written,
    detached_written, detached_gets_a_history, detached_view_gets_a_history, gaussian_likelihood, cosine,
    relu_in_place_after_convolution, chunks_written_under_no_grad, rows_written_under_no_grad, lists,
    lists_of_views, fused_product_in_place, random_numbers_over_a_history, swapped_rows, cumulative_in_place,
    complex_views, complex_conjugate_written,
]  # fmt: skip

# Autograd refuses these: what it saved was written over. The tape keeps a copy, and gives the gradient all the same.
REFUSED = [
    row_assigned_and_read, chained_in_place, transposed_write, diagonal_written, flat_loop, sum_into_slices,
    transposed_after_saved, relu_in_place_after_normalization, residual_added, activations_in_place, chunks_written,
    zeroed, running_maximum,
]  # fmt: skip


def leaves():
    torch.manual_seed(0)
    return leaves_of((4, 3), (2, 3))


@pytest.mark.parametrize("function", CASES)
def test_gradient(function):
    check(function, leaves())


@pytest.mark.parametrize("function", REFUSED)
def test_gradient_where_autograd_refuses(function):
    given = leaves()

    def value(*tensors):
        results = function(*tensors)
        return sum(
            (r.sin() * 0.7**k).sum() for k, r in enumerate(results if isinstance(results, tuple) else (results,))
        )

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value(*given).backward()
    with record() as step:
        loss = value(*given)
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    for k, leaf in enumerate(given):
        gradient = found.get(id(leaf), torch.zeros_like(leaf)).flatten()
        for place in range(leaf.numel()):
            moved = [[t.detach().clone() for t in given] for _ in range(2)]
            moved[0][k].view(-1)[place] += 1e-6
            moved[1][k].view(-1)[place] -= 1e-6
            slope = (value(*moved[0]) - value(*moved[1])) / 2e-6
            assert abs(float(gradient[place] - slope)) < 1e-6 * max(1, abs(float(slope)))


def numbers_changed_later(x, y):
    buffer = torch.arange(3.0, dtype=x.dtype)
    first = x * buffer
    buffer.add_(1)
    second = x * buffer
    view = buffer[1:]
    buffer[2] = 10.0
    return first, second, x[:, 1:] * view


def numbers_changed_later_(x, y):
    def row(*n):
        return torch.tensor(n, dtype=x.dtype)

    return x * row(0, 1, 2), x * row(1, 2, 3), x[:, 1:] * row(2, 10)


def mask_changed_later(x, y):
    mask = torch.zeros(4, 3, dtype=torch.bool)
    first = x.masked_fill(mask, 0.0)
    mask[1:3] = True
    second = x.masked_fill(mask, 0.0)
    mask.logical_not_()
    return first, second * 2, x.masked_fill(mask, 1.0) * 3


def mask_changed_later_(x, y):
    mask = torch.zeros(4, 3, dtype=torch.bool)
    other = mask.clone()
    other[1:3] = True
    return x.masked_fill(mask, 0.0), x.masked_fill(other, 0.0) * 2, x.masked_fill(~other, 1.0) * 3


def index_changed_later(x, y):
    i = torch.tensor([0, 1])
    first = x[i]
    i += 1
    return first, x[i] * 2


def index_changed_later_(x, y):
    return x[torch.tensor([0, 1])], x[torch.tensor([1, 2])] * 2


def detached_and_changed(x, y):
    h = x * 2
    d = h.detach()
    first = d * y[0]
    h.add_(1)
    return first, d * h, h * 2


def detached_and_changed_(x, y):
    h = x * 2
    k = h + 1
    return h.detach() * y[0], k.detach() * k, k * 2


def history_given_up(x, y):
    h = x * 2
    k = h.sin()
    h.detach_()
    first = h * y[0]
    h.add_(y[0])
    return h * k, first


def history_given_up_(x, y):
    h = x * 2
    d = h.detach()
    return (d + y[0]) * h.sin(), d * y[0]


def made_without_history(x, y):
    with torch.no_grad():
        h = x * 2
        v = h[1:3]
    w = h * y[0]
    with torch.no_grad():
        v.mul_(3)
    return w + h * y[0], v * y


def made_without_history_(x, y):
    h = (x * 2).detach()
    scaled = torch.cat([h[:1], h[1:3] * 3, h[3:]])
    return h * y[0] + scaled * y[0], scaled[1:3] * y


def history_begun(x, y):
    h = torch.ones(3, dtype=x.dtype)
    first = h * x
    h.requires_grad_()
    second = h * x
    with torch.no_grad():
        h.mul_(2)
    return first, second, h * y[0]


def history_begun_(x, y):
    h = torch.ones(3, dtype=x.dtype)
    return h * x, h * x, 2 * h * y[0]


PAIRS = [
    (numbers_changed_later, numbers_changed_later_), (mask_changed_later, mask_changed_later_),
    (index_changed_later, index_changed_later_), (detached_and_changed, detached_and_changed_),
    (history_given_up, history_given_up_), (made_without_history, made_without_history_),
    (history_begun, history_begun_),
]  # fmt: skip


@pytest.mark.parametrize(("function", "written_out"), PAIRS)
def test_constants_that_change(function, written_out):
    """Autograd refuses the first of each pair; the second says the same without in-place code."""
    given = leaves()

    def value(results):
        return sum((r.sin() * 0.7**k).sum() for k, r in enumerate(results))

    with record() as step:
        loss = value(function(*given))
    expected_loss = value(written_out(*given))
    torch.testing.assert_close(loss, expected_loss)
    found = {id(leaf): g for leaf, g in step.gradients(loss)}
    for leaf, g in zip(given, torch.autograd.grad(expected_loss, given, allow_unused=True), strict=True):
        if g is not None:
            torch.testing.assert_close(found[id(leaf)], g)


@pytest.mark.parametrize("function", CASES + REFUSED + [f for f, _ in PAIRS])
def test_replay(function):
    """Run again from the tape, call by call, every value comes out as it was: the tape has no side effects."""
    given = leaves()
    torch.manual_seed(1)
    with record(keep=True) as step:
        results = function(*given)
    results = [r for r in (results if isinstance(results, (tuple, list)) else [results]) if r.requires_grad]
    tape = step.tape
    held = list(tape.tensors)
    for op in tape.operations:
        if torch.Tag.nondeterministic_seeded in getattr(op.target, "tags", ()) or "out of place" in op.name:
            continue
        with torch.no_grad():
            got = op.target(*tape.resolve(op.args), **{k: tape.resolve(v) for k, v in op.kwargs.items()})
        got = got if isinstance(got, (tuple, list)) else [got]
        assert len(got) == len(op.writes)
        for value, tensor in zip(op.writes, got, strict=True):
            kept = held[value]
            assert kept is not None, f"{op!r} lost its result"
            torch.testing.assert_close(tensor.resolve_conj(), kept.detach().resolve_conj(), rtol=0, atol=1e-12)
    for r in results:
        kept = tape.tensors[step._recorder.read(r)]
        torch.testing.assert_close(kept, r)
