"""fully_shard around hzo.module: each rank keeps a share of each part's weights, gradients and optimizer state.

``torchrun --nproc-per-node 2 examples/distributed/with_fsdp2.py``
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import hzo
from task import EPOCHS, RATE, accuracy, loader, network


def train(by_hzo: bool = True) -> nn.Module:
    """Train on this rank's share of the data; a whole network with the trained weights, equal on all ranks."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    layers = network()
    # Each part that is gathered by itself is a module of its own.
    parts = [nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])]
    model = nn.Sequential(*(fully_shard(hzo.module(part) if by_hzo else part, mesh=mesh) for part in parts))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    batches = loader()
    for epoch in range(EPOCHS):
        batches.sampler.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    for name, buffer in model.named_buffers():  # statistics of BatchNorm are each rank's own: take those of rank 0
        torch.distributed.broadcast(buffer, 0)
        state[name] = buffer
    whole = nn.Sequential(nn.Sequential(*network()[:3]), nn.Sequential(*network()[3:]))
    whole.load_state_dict(state)
    return whole


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    print(f"rank {torch.distributed.get_rank()}: {accuracy(train()):.1f} % of the training digits")
    torch.distributed.destroy_process_group()
