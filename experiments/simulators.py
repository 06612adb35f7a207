"""Simulators that others wrote, inside networks: what is learned through them, by which gradient, at which price.

    PYTHONPATH=examples python experiments/simulators.py    # writes results/blackbox/simulators.json
    PYTHONPATH=examples python experiments/simulators.py neurons spice    # these parts anew, the others as they are
    PYTHONPATH=examples python experiments/simulators.py --missing    # only rows that the record does not have

The networks are those of examples/: Hodgkin–Huxley neurons (NEURON), a photonic chip (Perceval), a quantum circuit with
shots (PennyLane), a transistor circuit (ngspice), a pole on a cart (MuJoCo). Each is trained with the gradient of the
black box; with the forward pass of the simulator and a gradient from elsewhere: its own (PennyLane's parameter shift,
ngspice's ``.tf``, MuJoCo's ``mjd_transitionFD``) or autograd's of the same equations (``Equations``, ``Photons``); by
SPSA, with as many passes of the part a step as the box asks, rounded up to pairs; and with nothing trained through the
part. Rates are those of the examples, for SPSA the better of it and a third of it with the first seed, on the test set.

``cosine``: of the box's gradient to the trusted one, of all parameters in front of the part, the mean over batches and
seeds, after training. ``exact_cosine``: the same with a step that is made for it, where a part is trained with a wide
one. Seconds are those of one step, of which a backward pass is most.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import mujoco
import numpy as np
import pennylane as qml
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import digits
import hodgkin_huxley
import hzo
import pendulum
import photonic
import quantum
import spice
from common import RESULTS, cosine, table
from hzo_lab.records import commit

OUT = RESULTS.parent / "blackbox" / "simulators.json"
SEEDS, BATCHES = range(3), 4
Vjp = Callable[..., tuple[Tensor, ...]]
Rows = dict[str, dict[str, Any]]  # of one part, by method


class Equations(nn.Module):
    """Hodgkin and Huxley's equations by NEURON's scheme: implicit Euler for membranes, exponential Euler for gates."""

    def forward(self, drive: Tensor) -> Tensor:
        v = torch.full_like(drive, -65.0, dtype=torch.float64)
        current = hodgkin_huxley.CURRENT * drive.double()  # nA into 100 μm² are mA/cm²
        gates, total, ticks = (
            [steady for steady, _ in _rates(v)],
            0.0,
            int(hodgkin_huxley.MILLISECONDS / hodgkin_huxley.TICK),
        )
        for _ in range(ticks):
            m, h, n = gates
            sodium, potassium, leak = 0.12 * m**3 * h, 0.036 * n**4, 0.0003
            inert = 1e-3 / hodgkin_huxley.TICK
            driven = inert * v + current + 50 * sodium - 77 * potassium - 54.3 * leak
            v = driven / (inert + sodium + potassium + leak)
            gates = [
                steady + (gate - steady) * torch.exp(-hodgkin_huxley.TICK / constant)
                for gate, (steady, constant) in zip(gates, _rates(v), strict=True)
            ]
            total = total + v
        return ((total / ticks - hodgkin_huxley.CENTRE) / hodgkin_huxley.SPREAD).to(drive.dtype)


def _rates(v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Steady state and time constant of the gates m, h and n at 6.3 °C."""

    def trap(x: Tensor, scale: float) -> Tensor:  # x / (exp(x / scale) - 1)
        ratio = x / scale
        return torch.where(ratio.abs() < 1e-6, scale * (1 - ratio / 2), x / torch.expm1(ratio))

    opening = (0.1 * trap(-(v + 40), 10), 0.07 * torch.exp(-(v + 65) / 20), 0.01 * trap(-(v + 55), 10))
    closing = (4 * torch.exp(-(v + 65) / 18), 1 / (torch.exp(-(v + 35) / 10) + 1), 0.125 * torch.exp(-(v + 65) / 80))
    return [(a / (a + b), 1 / (a + b)) for a, b in zip(opening, closing, strict=True)]


class Photons(nn.Module):
    """Two photons that meet with a visibility, counted where both arrive: what Perceval's counts are on average."""

    def forward(self, phases: Tensor) -> Tensor:
        modes, kind = photonic.MODES, torch.promote_types(phases.dtype, torch.complex64)
        coupler = torch.tensor([[1, 1j], [1j, 1]], dtype=kind) / 2**0.5  # perceval's BS()
        unitary = torch.eye(modes, dtype=kind).expand(len(phases), modes, modes)
        used = 0
        for layer in range(photonic.LAYERS):
            for mode in range(layer % 2, modes - 1, 2):
                shift = torch.stack([torch.exp(1j * phases[:, used]), torch.ones(len(phases), dtype=kind)], 1)
                pair = coupler @ (shift.unsqueeze(-1) * (coupler @ unitary[:, mode : mode + 2]))
                unitary = torch.cat([unitary[:, :mode], pair, unitary[:, mode + 2 :]], 1)
                used += 1
        found, visibility = [], photonic.NOISE.indistinguishability
        for a in range(modes):
            for b in range(a, modes):
                one, other = unitary[:, a, 0] * unitary[:, b, 2], unitary[:, b, 0] * unitary[:, a, 2]
                if a == b:
                    found.append(one.abs() ** 2 * (1 + visibility))
                else:
                    found.append(one.abs() ** 2 + other.abs() ** 2 + 2 * visibility * (one * other.conj()).real)
        return len(found) * torch.stack(found, 1)


class Own(nn.Module):
    """The simulator as it is, with a gradient from elsewhere."""

    def __init__(self, part: Callable[..., np.ndarray], vjp: Vjp) -> None:
        super().__init__()
        self.part, self.vjp = part, vjp

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = _Own.apply(self.part, self.vjp, *inputs)
        return found


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Any, vjp: Any, *inputs: Tensor) -> Tensor:
        ctx.vjp = vjp
        ctx.save_for_backward(*inputs)
        return torch.as_tensor(part(*(x.numpy() for x in inputs))).to(inputs[0].dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        inputs = ctx.saved_tensors
        return (None, None, *(found.to(x.dtype) for found, x in zip(ctx.vjp(inputs, g), inputs, strict=True)))


def of_twin(twin: Callable[..., Tensor]) -> Vjp:
    """Autograd's, through the same in PyTorch."""

    def vjp(inputs: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            given = tuple(x.detach().double().requires_grad_() for x in inputs)
            return torch.autograd.grad(twin(*given), given, g.double())

    return vjp


_analytic = qml.QNode(quantum.spins, qml.device("default.qubit", wires=quantum.QUBITS), diff_method="backprop")


def exact_spins(angles: Tensor) -> Tensor:
    """What the shots are on average."""
    return torch.stack(_analytic(angles), 1)


def parameter_shift(inputs: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, ...]:
    """PennyLane's rule, whose own implementation takes no batch: half the difference over ±π/2, with shots."""
    (angles,) = inputs
    found = torch.empty_like(angles)
    for k in range(angles.shape[1]):
        shift = torch.zeros(angles.shape[1])
        shift[k] = math.pi / 2
        above, below = (torch.as_tensor(quantum.measured((angles + s).numpy())) for s in (shift, -shift))
        found[:, k] = (g * (above - below) / 2).sum(1)
    return (found,)


def transfers(volts: np.ndarray) -> np.ndarray:
    """(outputs, inputs): small-signal transfer functions at one operating point, by as many analyses ``.tf``."""
    lines = ["transfers", spice.SUBCIRCUIT, *(f"v0_{k} i0_{k} 0 {float(v):.12g}" for k, v in enumerate(volts))]
    outputs, inputs = range(2 * spice.PAIRS), range(spice.INPUTS)
    lines.append(f"x0 {' '.join([*(f'i0_{k}' for k in inputs), *(f'o0_{k}' for k in outputs)])} vcc layer")
    lines += [".control", "set numdgt=12"]
    lines += [line for o in outputs for k in inputs for line in (f"tf v(o0_{o}) v0_{k}", "print transfer_function")]
    run = subprocess.run(
        ["ngspice", "-b", "/dev/stdin"],
        input="\n".join([*lines, ".endc", ".end"]),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line.split(" = ")[1] for line in run.stdout.splitlines() if line.startswith("transfer_function")]
    return np.array(found, float).reshape(len(outputs), len(inputs))


def transfer(inputs: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, ...]:
    """ngspice's small-signal transfer functions, ``.tf``."""
    (volts,) = inputs
    return (torch.stack([torch.as_tensor(transfers(v)).T @ h.double() for v, h in zip(volts.numpy(), g, strict=True)]),)


def transition(inputs: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, ...]:
    """MuJoCo's differences of its own, ``mjd_transitionFD``."""
    state, action = inputs
    data, found = mujoco.MjData(pendulum.MODEL), []
    by_state, by_action = np.zeros((4, 4)), np.zeros((4, 1))
    for s, a, h in zip(state.double().numpy(), action.double().numpy(), g.double().numpy(), strict=True):
        data.qpos[:], data.qvel[:], data.ctrl[:] = s[:2], s[2:], a
        mujoco.mjd_transitionFD(pendulum.MODEL, data, 1e-6, True, by_state, by_action, None, None)
        found.append((by_state.T @ h, by_action.T @ h))
    by_states, by_actions = zip(*found, strict=True)
    return torch.as_tensor(np.stack(by_states)), torch.as_tensor(np.stack(by_actions))


def neurons(drive: np.ndarray) -> np.ndarray:
    """As many membranes as NEURON has, for any number of samples."""
    rows = [drive[k : k + hodgkin_huxley.BATCH] for k in range(0, len(drive), hodgkin_huxley.BATCH)]
    full = [np.resize(part, (hodgkin_huxley.BATCH, part.shape[1])) for part in rows]
    return np.concatenate([hodgkin_huxley.potentials(f)[: len(r)] for f, r in zip(full, rows, strict=True)])


@dataclass(frozen=True)
class Part:
    """One of the examples on digits.

    Attributes:
        example: its module. part: what is simulated. rate, epochs, classes: how it is trained.
        others: gradients from elsewhere, the first one for training beside the box's. trusted: for the cosine.
        spsa_step: in parameters. exact: options of a box for its exact derivative, where it is trained with others.
    """

    example: Any
    part: Callable[..., np.ndarray]
    rate: float
    epochs: int
    others: dict[str, Vjp]
    trusted: str
    trusted_vjp: Vjp
    spsa_step: float = 1e-2
    classes: int = 10
    exact: dict[str, Any] = field(default_factory=dict)


PARTS = {
    "neurons": Part(
        hodgkin_huxley, neurons, 2e-2, 8, {"autograd, same equations": of_twin(Equations())},
        "autograd, same equations", of_twin(Equations()), 1e-2,
        exact={"elementwise": True, "step": 1e-5},
    ),
    "photonic": Part(
        photonic, photonic.counts, 3e-2, 3, {"autograd, ideal counts": of_twin(Photons())},
        "autograd, ideal counts", of_twin(Photons()), 1e-1, photonic.CLASSES,
    ),
    "quantum": Part(
        quantum, quantum.measured, 2e-2, 5, {"parameter shift, with shots": parameter_shift},
        "backprop without shots", of_twin(exact_spins), 1e-1,
    ),
    "spice": Part(
        spice, spice.operating_points, 3e-2, 5, {"ngspice's .tf": transfer}, "ngspice's .tf", transfer, 1e-2,
        spice.CLASSES,
    ),
}  # fmt: skip


def network(part: Part, how: str, seed: int) -> nn.Module:
    model = part.example.network(seed)
    if how in part.others:
        model[1] = Own(part.part, part.others[how])
    elif how == "trusted":
        model[1] = Own(part.part, part.trusted_vjp)
    elif how == "exact":
        model[1] = hzo.blackbox(part.part, numpy=True, state=None, **part.exact)
    elif how == "frozen":
        digits.last_layer_only(model)
    return model


def batches(part: Part, seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = digits.examples("train")
    x, y = x[y < part.classes], y[y < part.classes]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(64)[:BATCHES]
    return [(x[rows], y[rows]) for rows in order]


def before_part(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad()
    digits.autograd(model, cross_entropy, *batch)
    return torch.cat([p.grad.flatten() for p in model[0].parameters()])


def price(part: Part) -> dict[str, Any]:
    """The plan of the box, what a step asks and how long it takes."""
    model, (batch, *_) = network(part, "hzo", 0), batches(part, 0)
    before_part(model, batch)  # what is done once
    with hzo.count_queries() as count:
        began = time.perf_counter()
        before_part(model, batch)
        seconds = time.perf_counter() - began
    plan = model[1].plan_for(model[0](batch[0]).detach())
    return {"plan": str(plan), "passes": count.queries / 64, "queries": count.queries, "seconds_a_step": seconds}


def runs(
    part: Part, method: str, seeds: list[int], passes: float, epochs: int
) -> tuple[list[nn.Module], dict[str, Any]]:
    def run(seed: int, rate: float) -> tuple[nn.Module, float]:
        model, how = network(part, method, seed), {}
        if method == "spsa":
            noise = torch.Generator().manual_seed(seed)
            spsa = partial(hzo.baselines.spsa, samples=math.ceil(passes / 2), mu=part.spsa_step, generator=noise)
            how = {"gradient": spsa}
        digits.train(model, epochs, rate, seed=seed, classes=part.classes, **how)
        return model, digits.accuracy(model, classes=part.classes)

    first = [(rate, run(seeds[0], rate)) for rate in ((part.rate, part.rate / 3) if method == "spsa" else (part.rate,))]
    rate, found = max(first, key=lambda trial: trial[1][1])
    all_of_them = [found, *(run(seed, rate) for seed in seeds[1:])]
    scores = [score for _, score in all_of_them]
    return [model for model, _ in all_of_them], {"rate": rate, **summary(scores)}


def summary(scores: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return {"score": statistics.mean(scores), "deviation": deviation, "runs": scores}


def cosines(part: Part, models: list[nn.Module], how: str) -> list[float]:
    """Of the box's gradients to trusted ones, where training has ended."""
    found = []
    for seed, model in enumerate(models):
        mine, theirs = (network(part, name, seed) for name in (how, "trusted"))
        for other in (mine, theirs):
            other.load_state_dict(model.state_dict())
        found += [cosine(before_part(mine, batch), before_part(theirs, batch)) for batch in batches(part, seed)]
    return found


def rows_of(name: str, part: Part, seeds: list[int], quick: bool, kept: Rows) -> Iterator[dict[str, Any]]:
    cost = kept.get("hzo") or price(part)
    for method in ("hzo", *part.others, "spsa", "frozen"):
        if method in kept:
            continue
        models, row = runs(part, method, seeds, cost["passes"], 1 if quick else part.epochs)
        row = {"part": name, "method": method, "measure": "test accuracy, %", **row}
        if method == "hzo":
            row |= {**cost, "trusted": part.trusted, "cosine": statistics.mean(cosines(part, models, "hzo"))}
            if part.exact:
                row["exact_cosine"] = statistics.mean(cosines(part, models, "exact"))
        elif method == "spsa":
            row["passes"] = 2.0 * math.ceil(cost["passes"] / 2)
        yield row


# ---- a policy ---


class Episode(nn.Module):
    """state -> cost of each sample."""

    def __init__(self, policy: nn.Module, physics: nn.Module) -> None:
        super().__init__()
        self.policy, self.physics = policy, physics

    def forward(self, state: Tensor) -> Tensor:
        return pendulum.episode(self.policy, self.physics, state)[0]


def trained(method: str, seed: int, rate: float, updates: int) -> tuple[Episode, float]:
    torch.manual_seed(seed)
    physics = hzo.blackbox(pendulum.step, numpy=True, state=None)
    model = Episode(policy(), Own(pendulum.step, transition) if method == "mjd_transitionFD" else physics)
    adam, noise = torch.optim.Adam(model.policy.parameters(), lr=rate), torch.Generator().manual_seed(seed)
    for update in range(0 if method == "frozen" else updates):
        adam.zero_grad()
        start = pendulum.starts(pendulum.BATCH, 1000 * seed + update)
        if method == "spsa":
            hzo.baselines.spsa(model, lambda cost, _: cost.mean(), start, start, samples=5, mu=1e-2, generator=noise)
        else:
            model(start).mean().backward()
        adam.step()
    with torch.no_grad():
        _, end = pendulum.episode(model.policy, physics, pendulum.starts(256, 10**6))
    return model, 100 * float((end[:, 1].abs() < 0.2).double().mean())


def policy_rows(seeds: list[int], quick: bool, kept: Rows) -> Iterator[dict[str, Any]]:
    updates = 4 if quick else pendulum.UPDATES
    for method in ("hzo", "mjd_transitionFD", "spsa", "frozen"):
        if method in kept:
            continue
        rates = (2e-2, 2e-2 / 3) if method == "spsa" else (2e-2,)
        first = [(rate, trained(method, seeds[0], rate, updates)) for rate in rates]
        rate, found = max(first, key=lambda trial: trial[1][1])
        done = [found, *(trained(method, seed, rate, updates) for seed in seeds[1:])]
        row = {"part": "pole", "method": method, "measure": "upright, %", "rate": rate}
        row |= summary([score for _, score in done])
        if method == "hzo":
            row |= policy_price([model for model, _ in done])
        elif method == "spsa":
            row["passes"] = 10.0
        yield row


def policy_price(models: list[Episode]) -> dict[str, Any]:
    """What an update asks, and the cosine of the whole gradient, through all steps."""
    found: list[float] = []
    start = pendulum.starts(pendulum.BATCH, 7)

    def gradient(model: nn.Module) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(model(start).mean(), list(model.policy.parameters()))]
        )

    for model in models:
        mine = gradient(model)
        found.append(cosine(mine, gradient(Episode(model.policy, Own(pendulum.step, transition)))))
    with hzo.count_queries() as count:
        began = time.perf_counter()
        gradient(models[0])
        seconds = time.perf_counter() - began
    plan = models[0].physics.plan_for(start, models[0].policy(start).detach())
    passes = count.queries / pendulum.BATCH / pendulum.STEPS
    return {"plan": str(plan), "passes": passes, "queries": count.queries, "seconds_a_step": seconds} | {
        "trusted": "mjd_transitionFD", "cosine": statistics.mean(found)
    }  # fmt: skip


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Tanh())


def ngspice_version() -> str:
    shown = subprocess.run(["ngspice", "--version"], capture_output=True, text=True, check=True).stdout
    return shown.partition("ngspice-")[2].split()[0]


def main() -> None:
    asked = [a for a in sys.argv[1:] if not a.startswith("-")] or [*PARTS, "pole"]
    quick = "--quick" in sys.argv
    commit()  # of the code that runs, which may have changed in the checkout by the time a row is written
    seeds = list(SEEDS)[:1] if quick else list(SEEDS)
    for name in asked:
        kept = recorded(name) if "--missing" in sys.argv and not quick else {}
        rows = list(kept.values())
        found = policy_rows(seeds, quick, kept) if name == "pole" else rows_of(name, PARTS[name], seeds, quick, kept)
        for row in found:
            rows.append(row | {"commit": commit()})
            print(row, flush=True)
            if not quick:
                keep(rows[-1], seeds)
        table(rows, ("part", "method", "score", "deviation", "passes", "rate", "cosine", "exact_cosine"))


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    return found


def recorded(name: str) -> Rows:
    return {row["method"]: row for row in record()["rows"] if row["part"] == name}


def keep(row: dict[str, Any], seeds: list[int]) -> None:
    """Put a row in place of the one that was there, as soon as it is known."""
    kept = record()
    rows = [r for r in kept["rows"] if (r["part"], r["method"]) != (row["part"], row["method"])]
    methods = (
        "hzo",
        *(other for part in PARTS.values() for other in part.others),
        "mjd_transitionFD",
        "spsa",
        "frozen",
    )
    order = [(part, method) for part in (*PARTS, "pole") for method in methods]
    kept["rows"] = sorted([*rows, row], key=lambda r: order.index((r["part"], r["method"])))
    packages = ("neuron", "perceval-quandela", "pennylane", "mujoco", "torch", "scikit-learn")
    kept |= {"command": "PYTHONPATH=examples python experiments/simulators.py", "seeds": seeds}
    kept["versions"] = {package: version(package) for package in packages} | {"ngspice": ngspice_version()}
    OUT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
