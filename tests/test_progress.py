"""The bar moves with what is counted, and ends where the plan said."""

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hzo
from hzo.errors import InputError

pytest.importorskip("tqdm")


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def test_a_planned_gradient_ends_at_the_length_of_the_bar():
    model, x, y = small(), torch.randn(6, 4), torch.randn(6, 2)
    chain = hzo.trace(model, x)
    for options in ({"tree": "bisect", "assume": "nothing"}, {}):
        plan = hzo.plan(chain, **options)
        shown = io.StringIO()
        with hzo.show_progress(plan, gradients=2, file=shown, unit_scale=False, mininterval=0) as count:
            for _ in range(2):
                hzo.backward(chain, mse_loss, x, y, plan=plan)
        total = 2 * (plan.queries + plan.adjoints)
        assert count.queries + count.adjoints == total
        assert f"{total}/{total}" in shown.getvalue()


def test_without_a_plan_it_counts_up():
    shown = io.StringIO()
    with hzo.show_progress(file=shown, desc="step", mininterval=0) as count:
        hzo.backward(small(), mse_loss, torch.randn(6, 4), torch.randn(6, 2))
    assert count.adjoints > 0
    assert "step: " in shown.getvalue()
    assert "%" not in shown.getvalue()


def test_checks_are_not_counted_and_an_error_passes_through():
    shown = io.StringIO()
    with pytest.raises(ZeroDivisionError), hzo.show_progress(file=shown) as count:
        raise ZeroDivisionError
    assert count.queries == 0


@pytest.mark.parametrize("workers", [None, 2])
def test_the_queries_of_a_box_move_the_bar_as_their_answers_come(workers):
    done = []

    def part(t):
        done.append(bar.queries - bar.under_way)
        time.sleep(0.01)  # longer than it takes to send the next one
        return torch.sin(t)

    def pool():
        return ThreadPoolExecutor(workers)

    options = {} if workers is None else {"executor": pool}
    box, x = hzo.blackbox(part, batched=1, **options), torch.randn(4, 3, requires_grad=True)
    with hzo.show_progress(disable=True) as bar:
        box(x).sum().backward()  # tests and a plan, too
    plan, before, shown = box.plan_for(x), len(done), io.StringIO()
    out = box(x)
    with hzo.show_progress(plan, file=shown, unit_scale=False, mininterval=0) as bar:
        out.sum().backward()
    assert bar.queries == plan.queries
    assert bar.under_way == 0
    assert f"{plan.queries}/{plan.queries}" in shown.getvalue()
    seen = done[before:][-plan.queries :]
    assert max(seen) >= plan.queries // 2  # when the last calls run, most are shown to be done
    assert len(set(seen)) >= plan.queries // 4


def test_what_is_missing_or_wrong_is_said(monkeypatch):
    with pytest.raises(InputError, match="gradients"), hzo.show_progress(gradients=0):
        pass
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(InputError, match=r"hzo\[progress\]"), hzo.show_progress():
        pass


def test_a_label_in_the_place_of_the_plan():
    with pytest.raises(InputError, match="desc="), hzo.show_progress("training"):
        pass
