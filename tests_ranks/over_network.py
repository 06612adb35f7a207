"""Run as each of two processes that reach each other over a network: gradients until the other one is lost."""

import os
import time
from datetime import timedelta

import torch
from torch import nn

import hzo
from hzo.errors import DistributedError

LIMIT = 4.0  # seconds that one waits for the other in a gradient


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("sample", "query"))
    torch.manual_seed(0)
    box = hzo.blackbox(lambda z: time.sleep(0.01) or z.sin(), batched=1)
    model, x = nn.Sequential(nn.Linear(4, 4), box, nn.Linear(4, 1)), torch.randn(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(10**6):
        state = [p.detach().clone() for p in model.parameters()], [p.grad for p in model.parameters()]
        began = time.monotonic()
        try:
            hzo.backward(model, lambda out: out.square().mean(), x, mesh=mesh, timeout=LIMIT)
        except DistributedError as error:
            kept = all(torch.equal(p, q) and p.grad is g for p, q, g in zip(model.parameters(), *state, strict=True))
            print(f"after {time.monotonic() - began:.1f} s, everything as before: {kept}: {error}", flush=True)
            os._exit(3)  # the process group would wait for the other one
        optimizer.step()
        print(f"step {step}", flush=True)


if __name__ == "__main__":
    main()
