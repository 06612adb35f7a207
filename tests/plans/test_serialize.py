"""Plans as files: equal when read back, refused when they are something else, and printed in a readable width."""

import json

import pytest
import torch
from torch import nn

import hzo
from hzo.errors import HzoError, InputError, PlanError, TraceError
from hzo.plans.plan import describe
from support.cases import CASES
from support.oracles import normal, solve


def small(batch=3, width=4):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
    return hzo.trace(nn.Sequential(*layers, nn.Linear(width, 2)).double(), normal(batch, width))


OPTIONS = {
    "default": {},
    "bisect": {"tree": "bisect", "assume": "nothing", "scheme": "forward", "step": 1e-3},
    "parts": {"tree": 3, "assume": "locality", "boundaries": "all"},
    "spacing": {"tree": "flat", "assume": "locality", "spacing": 2},
    "noise": {"noise": 1e-3, "assume": "nothing", "target_cosine": 0.999, "boundaries": "all"},
    "stages": {"noise": hzo.Noise(readout=1e-3, process=1e-4), "tree": "bisect", "repeats": "uniform", "budget": 500.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "convolutions", "attention"])
def test_a_plan_is_read_back_equal(tmp_path, name, options):
    chain = solve(name).chain
    plan = hzo.plan(chain, **options)
    hzo.save_plan(plan, tmp_path / "plan.json")
    assert hzo.load_plan(chain, tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_noise_of_every_stage_and_a_path_are_kept(tmp_path):
    chain = hzo.trace(nn.Sequential(*(nn.Linear(8, 8) for _ in range(12))), torch.randn(16, 8))
    full = hzo.plan(chain, tree="bisect", assume="nothing")
    noise = hzo.Noise(readout=tuple(0.001 * k for k in range(12)))
    plan = hzo.plan(chain, tree="bisect", assume="nothing", noise=noise, memory=full.activation_bytes // 2)
    assert plan.storage == "path"
    hzo.save_plan(plan, tmp_path / "plan.json")
    loaded = hzo.load_plan(chain, str(tmp_path / "plan.json"))
    assert loaded == plan
    assert loaded.recomputed > 0


def test_a_loaded_plan_gives_the_same_gradient_bit_for_bit(tmp_path):
    solved = solve("mlp")
    plan = hzo.plan(solved.chain, tree="bisect", noise=1e-6, target_cosine=0.99)
    hzo.save_plan(plan, tmp_path / "plan.json")
    ours, _ = solved.estimate(plan)
    theirs, _ = solved.estimate(hzo.load_plan(solved.chain, tmp_path / "plan.json"))
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name])


def test_another_batch_size_gets_the_same_decisions(tmp_path):
    hzo.save_plan(hzo.plan(small(3), noise=1e-3, target_cosine=0.99), tmp_path / "plan.json")
    loaded = hzo.load_plan(small(9), tmp_path / "plan.json")
    assert loaded.batch == 9
    assert loaded.edges == hzo.plan(small(3), noise=1e-3, target_cosine=0.99).edges
    assert loaded.activation_bytes == 3 * hzo.plan(small(3), noise=1e-3, target_cosine=0.99).activation_bytes


def test_the_file_is_small_and_has_totals_for_the_reader(tmp_path):
    plan = hzo.plan(small(), tree="bisect", assume="nothing", noise=1e-3)
    hzo.save_plan(plan, tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert len(text.splitlines()) == 20 + len(plan.edges)
    assert '"where": "boundary 7"' in text
    summary = json.loads(text)["summary"]
    assert summary["queries"] == plan.queries
    assert summary["lowest_cosine"] == plan.expected.cosine


@pytest.fixture
def saved(tmp_path):
    chain = small()
    path = tmp_path / "plan.json"
    hzo.save_plan(hzo.plan(chain, tree="bisect", assume="nothing", noise=1e-3, target_cosine=0.999), path)
    return chain, path


def changed(**fields):
    return lambda values: values.update(fields)


def edge(index, **fields):
    return lambda values: values["edges"][index].update(fields)


def first(name, value):
    def change(values):
        errors = values["edges"][0]["errors"]
        errors[next(iter(errors)) if name is None else name] = value

    return change


TAMPERED = {
    "not an object": (lambda values: [1], "JSON object"),
    "other format": (changed(format="run"), "not a plan's file"),
    "version": (changed(version=99), "version 99"),
    "no format": (lambda values: values.pop("format"), "'format' is missing"),
    "missing": (lambda values: values.pop("storage"), "'storage' is missing"),
    "unknown": (changed(steps=3), "unknown field 'steps'"),
    "other chain": (changed(fingerprint="0123"), "another chain"),
    "calls as text": (changed(calls="linear"), "calls: expected a list of calls"),
    "tree": (changed(tree="oak"), "tree: expected tree 'planned'"),
    "tree as a list": (changed(tree=[2]), "expected tree"),
    "assume": (changed(assume="luck"), "assume"),
    "scheme": (changed(scheme="backward"), "scheme"),
    "boundaries": (changed(boundaries="none"), "boundaries"),
    "spacing": (changed(spacing=0), "spacing"),
    "storage": (changed(storage="tape"), "storage"),
    "step": (changed(step=-0.1), "step"),
    "step as text": (changed(step="0.1"), "step"),
    "noise": (changed(noise=0.1), "readout and process"),
    "noise below zero": (changed(noise={"readout": -1, "process": 0}), "standard deviation"),
    "noise as text": (changed(noise={"readout": "1", "process": 0}), "numbers"),
    "noise of other stages": (changed(noise={"readout": [0.1], "process": 0}), "9 stages"),
    "edges": (changed(edges={}), "to be a list"),
    "no edges": (changed(edges=[]), "no edge estimates boundary"),
    "edge": (changed(edges=[3]), r"edges\[0\] to be a JSON object"),
    "repeats": (edge(1, repeats=-2), r"edges\[1\], repeats: expected a whole number from 1 on, got -2"),
    "half repeats": (edge(1, repeats=1.5), "whole number"),
    "true repeats": (edge(1, repeats=True), "whole number"),
    "backwards": (edge(0, source=1), "target < source"),
    "beyond the end": (edge(0, source=99), "target < source ≤ 14"),
    "unknown source": (edge(0, source=8, target=5), "no edge before it"),
    "twice": (edge(1, target=11, source=14), "same target"),
    "edge step": (edge(0, relative_step=0), "relative_step"),
    "edge field": (edge(0, colour="red"), "unknown field 'colour'"),
    "edge without errors": (lambda values: values["edges"][0].pop("errors"), "'errors' is missing"),
    "errors of others": (first("77", 0.1), "errors are not those"),
    "error below zero": (first(None, -0.1), "from 0 on"),
    "error as text": (first(None, "small"), "from 0 on"),
    "errors without expected": (changed(expected=None), "unknown field 'errors'"),
    "seconds": (changed(expected={"seconds": -1, "parameters": {}}), "seconds"),
    "seconds without end": (changed(expected={"seconds": float("inf"), "parameters": {}}), "seconds"),
    "expected": (changed(expected=[]), "expected to be a JSON object"),
    "parameters": (changed(expected={"seconds": None, "parameters": {"theta": 0.1}}), "theta"),
}


@pytest.mark.parametrize(("change", "message"), TAMPERED.values(), ids=TAMPERED)
def test_what_is_no_plan_of_this_chain_is_refused(saved, change, message):
    chain, path = saved
    values = json.loads(path.read_text())
    replaced = change(values)
    path.write_text(json.dumps(replaced if isinstance(replaced, list) else values))
    with pytest.raises(PlanError, match=message):
        hzo.load_plan(chain, path)


@pytest.mark.parametrize("content", [b"", b"tree", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_json_is_refused(saved, content):
    chain, path = saved
    path.write_bytes(content)
    with pytest.raises(PlanError, match="JSON"):
        hzo.load_plan(chain, path)


def test_paths_and_arguments_that_do_not_fit(saved, tmp_path):
    chain, path = saved
    plan = hzo.load_plan(chain, path)
    with pytest.raises(InputError, match="does not exist"):
        hzo.load_plan(chain, tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        hzo.load_plan(chain, tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        hzo.save_plan(plan, tmp_path / "no" / "plan.json")
    with pytest.raises(InputError, match="made by hzo"):
        hzo.save_plan(chain, path)
    with pytest.raises(InputError, match="traced chain"):
        hzo.load_plan(chain.model, path)
    with pytest.raises(TraceError):
        hzo.load_plan(hzo.Chain([nn.Linear(2, 2)]), path)
    with pytest.raises(PlanError, match="another chain"):
        hzo.load_plan(small(width=6), path)
    assert hzo.load_plan(chain, path) == plan


def test_truncated_files_are_refused_wherever_they_end(saved):
    chain, path = saved
    content = path.read_bytes()
    for size in range(0, len(content) - 2, 37):
        path.write_bytes(content[:size])
        with pytest.raises(HzoError):
            hzo.load_plan(chain, path)


def test_a_description_tells_what_is_expected():
    plan = hzo.plan(small(), tree="bisect", assume="nothing", noise=1e-3, target_cosine=0.9999)
    text = str(plan)
    assert f"lowest cosine {plan.expected.cosine:.4f}" in text
    assert "all stored" in text
    for node in plan.nodes:
        assert f"step {node.relative_step:.3g}" in text
        assert f"{node.repeats} repeat" in text
        assert f"cosine {plan.expected.cosine_of((node.target, node.value)):.4f}" in text
    assert plan == hzo.plan(small(), tree="bisect", assume="nothing", noise=1e-3, target_cosine=0.9999)
    assert plan != hzo.plan(small(), tree="bisect", assume="nothing", noise=1e-3, target_cosine=0.999)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", list(CASES)[::4])
def test_lines_keep_to_the_width(name, options):
    if name == "frozen_start" and options.get("boundaries") == "all":
        pytest.skip("nothing before the end is asked for")
    plan = hzo.plan(solve(name).chain, **options)
    longest = 125 if "spacing" in options else 120  # such colorings take a whole line to say
    assert max(map(len, str(plan).splitlines())) <= longest
    assert len(describe(plan, rows=1).splitlines()) <= len(str(plan).splitlines())


def test_a_plan_for_another_chain_names_the_first_call_that_differs(saved):
    chain, path = saved
    other = list(chain.model.children())
    other[3] = nn.Sigmoid()
    with pytest.raises(PlanError, match=r"boundary 3 aten\.sigmoid\.default .* where aten\.tanh\.default .* had run"):
        hzo.load_plan(hzo.trace(nn.Sequential(*other).double(), normal(3, 4)), path)
    values = json.loads(path.read_text())
    del values["calls"]  # as files of before were
    path.write_text(json.dumps(values))
    assert len(hzo.load_plan(chain, path).edges) == len(values["edges"])
