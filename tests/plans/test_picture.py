"""Plans and other results as a notebook and a prompt show them."""

from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hzo

X, Y = torch.randn(6, 4), torch.randn(6, 4)
SVG = "{http://www.w3.org/2000/svg}"


def chain_of(n):
    return hzo.trace(nn.Sequential(*(m for _ in range(n) for m in (nn.Linear(4, 4), nn.Tanh()))), X)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tree": "bisect", "assume": "nothing"},
        {"noise": hzo.Noise(1e-2), "target_cosine": 0.9, "assume": "nothing"},
    ],
)
def test_every_edge_is_an_arc_inside_the_picture(options):
    plan = hzo.plan(chain_of(5), **options)
    page = ElementTree.fromstring(plan._repr_html_())  # well-formed
    picture = page.find("svg")
    _, _, width, height = map(float, picture.get("viewBox").split())
    arcs = picture.findall("path")
    assert len(arcs) == len(plan.edges)
    for arc in arcs:
        _, left, base, _, _, rise, _, _, _, right, _ = arc.get("d").split()
        assert 0 <= float(left) < float(right) <= width
        assert float(rise) < float(base) <= height
    assert "forward equivalents" in page.find("details/summary").text


def test_labels_are_text_not_markup():
    from hzo.plans.picture import tree_as_html

    page = tree_as_html([(1, 2, 3)], ["a", "<b>&"], "head\ncost <x>")
    assert "&lt;b&gt;&amp;" in page
    assert "3 times" in page
    ElementTree.fromstring(page)


def test_a_prompt_shows_a_line_that_helps():
    chain = chain_of(2)
    plan = hzo.plan(chain)
    assert repr(plan).startswith("<Plan: tree planned, assume structure, ")
    assert repr(chain) == "<Chain of 4 stages, traced for a batch of 6; print() lists them>"
    assert "every query is deterministic" in repr(hzo.calibrate(chain, X, mse_loss, Y))
    assert "readout noise up to" in repr(hzo.calibrate(hzo.noisy(chain, readout=1e-3), X, mse_loss, Y))
    with hzo.record() as step:
        loss = chain.model(X).sum()
    assert "to be swept" in repr(step)
    step.backward(loss)
    assert "swept and released" in repr(step)
    with hzo.count_queries() as count:
        assert repr(count) == "QueryCount()"
        hzo.backward(chain, mse_loss, X, Y, plan=plan)
    assert f"queries={count.queries}" in repr(count)
    assert "tanh" in repr(hzo.blackbox(torch.tanh))
    assert "0 of 2 running" in repr(hzo.simulator(["cat"], copies=2))
    report = hzo.check_gradient(chain.model, mse_loss, X, Y)
    assert repr(report) == str(report)
