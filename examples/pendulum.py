"""A policy that balances a pole on a cart, trained by the derivative of MuJoCo's step.

The step takes a state and an action and gives the next state. Through fifty of them the gradient of a cost flows back
to the policy: five inputs, ten queries a sample and step. MuJoCo computes the steps of a whole batch in one call.
"""

import mujoco
import numpy as np
import torch
from mujoco import rollout
from torch import Tensor, nn

import hzo
from digits import options

BATCH, STEPS, UPDATES = 32, 50, 60
MODEL = mujoco.MjModel.from_xml_string("""<mujoco><option timestep="0.02"/><worldbody><body>
  <joint name="slide" type="slide" axis="1 0 0" damping="0.5"/><geom type="box" size="0.2 0.1 0.1" mass="1"/>
  <body><joint type="hinge" axis="0 1 0" damping="0.01"/>
    <geom type="capsule" fromto="0 0 0 0 0 0.6" size="0.03" mass="0.2"/></body>
</body></worldbody><actuator><motor joint="slide" gear="20"/></actuator></mujoco>""")
DATA = mujoco.MjData(MODEL)


def step(state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """(samples, 4) positions and velocities of cart and pole, (samples, 1) force -> the same, 20 ms later."""
    full = np.concatenate([np.zeros((len(state), 1)), state], 1)  # MuJoCo's begins with the time
    return rollout.rollout(MODEL, DATA, full, action[:, None].astype(float))[0][:, -1, 1:]


def starts(count: int, seed: int) -> Tensor:
    return (2 * torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) - 1) * 0.4


def episode(policy: nn.Module, physics: nn.Module, state: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cost of each sample, and where it ends."""
    cost = torch.zeros(len(state))
    for _ in range(STEPS):
        state = physics(state, policy(state))
        cost = cost + (state[:, 1] ** 2 + 0.1 * state[:, 0] ** 2 + 0.01 * state[:, 2:].square().sum(1)) / STEPS
    return cost, state


def main() -> None:
    given = options(__doc__)
    torch.manual_seed(given.seed)
    policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Tanh())
    physics, adam = hzo.blackbox(step, numpy=True, state=None), torch.optim.Adam(policy.parameters(), lr=2e-2)
    for name, updates in (("untrained", 0), ("hzo", UPDATES // 3 if given.quick else UPDATES)):
        for update in range(updates):
            adam.zero_grad()
            episode(policy, physics, starts(BATCH, update))[0].mean().backward()
            adam.step()
        with torch.no_grad():
            cost, end = episode(policy, physics, starts(256, 10**6))
        print(f"{name:12} {100 * (end[:, 1].abs() < 0.2).double().mean():5.1f} % upright, cost {cost.mean():.3f}")


if __name__ == "__main__":
    main()
