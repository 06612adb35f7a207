"""Gradients by several processes are those of one, and a process that fails is heard of by all."""

import pytest
import torch
from torch import nn

import hzo
from hzo.errors import InputError
from support import meshes, ranks

SHAPES = [(1, 2), (2, 1), (2, 2)]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def found(request):
    """The shape of a mesh, and what its processes found."""
    shape = request.param
    return shape, ranks.results(meshes.on_mesh, shape[0] * shape[1], shape)


def tensors(grads):
    return [torch.tensor(g, dtype=torch.float64) for g in grads]


@pytest.mark.parametrize("name", meshes.CASES)
def test_as_by_one_process(found, name):
    (samples, queries), outcomes = found
    of_ranks = [outcome[name] for outcome in outcomes]
    assert all(o[1] == of_ranks[0][1] and o[0] == of_ranks[0][0] for o in of_ranks), "ranks drift apart"
    if name in {"BatchNorm", "dropout"} and samples > 1:  # local: the mean of what each finds for its own samples
        sizes = meshes.CASES[name][2]
        firsts = [sum(sizes[:k]) for k in range(samples)]
        alone = [meshes.one(name, slice(a, a + n), 1 + k) for k, (a, n) in enumerate(zip(firsts, sizes, strict=True))]
        loss = sum(a[0] for a in alone) / samples
        grads = [sum(g) / samples for g in zip(*(a[1] for a in alone), strict=True)]
        for rank, outcome in enumerate(of_ranks):
            assert outcome[2] == alone[rank // queries][2]
    else:
        loss, grads, buffers, _ = meshes.one(name)
        if samples == 1:
            assert all(o[2] == buffers for o in of_ranks)
    assert of_ranks[0][0] == pytest.approx(loss, rel=1e-12)
    for a, b in zip(tensors(of_ranks[0][1]), grads, strict=True):
        if samples == 1:
            assert torch.equal(a, b), "not to the bit"
        else:
            torch.testing.assert_close(a, b, rtol=1e-7 if name.startswith("a ") else 1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["a plan", "a box"])
def test_each_asks_its_share(found, name):
    """Together they ask what one process would, and none much more than its part."""
    (samples, queries), outcomes = found
    counts = [outcome[name][3] for outcome in outcomes]
    alone = meshes.one(name)[3]
    assert max(counts) <= 1.5 * alone / (samples * queries) + 40
    assert sum(counts) <= alone + 200


@pytest.mark.parametrize("ways", [2, 3])
def test_large_weights_and_few_directions_are_divided(ways, monkeypatch):
    monkeypatch.setattr("hzo.rules.divided._WORTH", 0)
    alone = meshes.all_weights(0, None)
    outcomes = ranks.results(meshes.all_weights, ways, ways)
    for found in outcomes:
        for (gradients, _), (expected, _) in zip(found, alone, strict=True):
            assert gradients == expected, "not to the bit"
        *by_weights, (_, kept), _ = found
        for (_, asked), (_, queries) in zip(by_weights, alone, strict=False):
            assert queries / ways <= asked <= queries / ways + 5  # a row more of each of five weights
        assert kept == alone[-2][1], "weights that are kept are not divided"
    asked = [found[-1][1] for found in outcomes]
    assert sum(asked) == alone[-1][1]
    assert max(asked) == alone[-1][1] / 2  # two directions for two of the processes


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2), {"tree": "flat", "assume": "nothing"}),
        ((1, 3), {"tree": "flat", "mu": 0.1, "draws": 2}),
        ((2, 1), {}),
    ],
)
def test_a_plan_says_what_each_process_does(shape, options):
    outcomes = ranks.results(meshes.planned, shape[0] * shape[1], shape, options)
    said = outcomes[0][0]
    assert all(outcome[0] == said for outcome in outcomes)
    for place, what in enumerate(("queries", "words", "exchanges")):
        assert max(did[place] for _, did in outcomes) == said[place], what
    assert max(did[3] for _, did in outcomes) == pytest.approx(said[3])


@pytest.mark.parametrize("options", [{}, meshes.PLAN], ids=["by rules", "a plan"])
def test_parameters_of_the_loss_are_averaged_too(options):
    model, loss_fn = meshes.network(), meshes.Temperature(2.0)
    hzo.backward(model, loss_fn, *meshes.batch(slice(None)), **options)
    expected = [p.grad for p in (*model.parameters(), loss_fn.at)]
    found = ranks.results(meshes.trained_loss, 2, (2, 1), options)
    assert found[0] == found[1], "ranks drift apart"
    for grad, one in zip(found[0], expected, strict=True):
        torch.testing.assert_close(torch.tensor(grad, dtype=torch.float64), one, rtol=1e-7, atol=1e-9)


def test_failures_are_heard_of_by_all():
    found = ranks.results(meshes.failures, 4)
    expected = {
        "weights": (3, "processes disagree about parameters: along the mesh those at (sample, query) = (1, 1) differ"),
        "plan": (1, "processes disagree about plan and options"),
        "batch": (2, "processes disagree about batch: along the query dimension"),
        "random state": (1, "processes disagree about random state"),
        "order": (2, "processes disagree about"),
        "frozen": (2, "processes disagree about names of parameters, or which are trained"),
        "another model": (1, "processes disagree about what the model is made of"),
        "another loss": (1, "processes disagree about plan and options"),
        "scale": (1, "processes disagree about plan and options"),
        "buffers": (1, "processes disagree about buffers: along the query dimension"),
        "loss weights": (3, "processes disagree about plan and options"),
        "input": (2, "processes disagree about shape of a sample"),
        "NaN": (0, "another process failed, number 0"),
        "loss": (2, "another process failed, number"),
        "no samples": (
            1,
            "another process failed before anything was computed: InputError: this process has no samples",
        ),
        "a part": (3, "another process failed, number 1 (QueryError"),
    }
    own = {"NaN": "NonFiniteError: ", "loss": "ValueError: of rank 2 alone", "no samples": "InputError: this process"}
    for what, (culprit, message) in expected.items():
        for rank, outcome in enumerate(found):
            said, kept = outcome[what]
            assert kept, (what, rank)
            if (rank == culprit or (what, rank) == ("NaN", 1)) and what in own:
                assert said.startswith(own[what]), (what, rank, said)
            elif rank == culprit and what == "a part":
                assert "the chip is too hot" in said
            elif what in {"NaN", "loss", "a part"}:
                assert said.startswith("DistributedError: another process failed"), (what, rank, said)
            else:
                assert message in said, (what, rank, said)
    assert all(outcome["nothing"][0] == "nothing" for outcome in found)


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_process_that_is_lost(how):
    outcomes = ranks.run(meshes.lost, 4, how)
    for outcome in outcomes[:3]:
        message, kept = outcome.result
        assert message.startswith("LostError: another process was lost, hangs or cannot be reached"), outcome
        assert kept
        assert outcome.seconds < 20
    assert (outcomes[3].status == -9) == (how == "killed")


@pytest.fixture
def single():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_mesh_is_checked(single):
    x = torch.ones(2, 2)
    with pytest.raises(InputError, match='dimensions named "sample" and "query"'):
        hzo.backward(nn.Linear(2, 1), torch.sum, x, mesh="cpu")
    wrong = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    with pytest.raises(InputError, match=r"got DeviceMesh with \('data',\)"):
        hzo.backward(nn.Linear(2, 1), torch.sum, x, mesh=wrong)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("sample",))
    with pytest.raises(hzo.errors.DistributedError, match="give one of them"):
        hzo.backward(nn.parallel.DistributedDataParallel(nn.Linear(2, 1)), torch.sum, x, mesh=mesh)
    model = nn.Linear(2, 1)
    hzo.backward(model, lambda out: out.sum(), x, mesh=mesh)
    assert model.weight.grad.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)], ids=str)
def test_what_a_box_asks_and_sends_is_said_before(shape):
    """``on_mesh`` of its plan, for one that is an operation of the network and one that is called with options."""
    of_ranks = ranks.results(meshes.box_on_mesh, shape[0] * shape[1], shape)
    box, z = hzo.blackbox(meshes.part), torch.randn(12, 3, dtype=torch.float64)
    for name, plan in (("operation", box.plan_for(z)), ("called", box.plan_for(z, gain=1.0))):
        share = plan.on_mesh(*shape)
        assert max(rank[name][0] for rank in of_ranks) == share.queries
        assert {rank[name][1] for rank in of_ranks} == {share.words}
