"""DistributedDataParallel around hzo.module: ``torchrun --nproc-per-node 2 examples/distributed/with_ddp.py``."""

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hzo
from task import EPOCHS, RATE, accuracy, loader, network


def train(by_hzo: bool = True) -> torch.nn.Module:
    """Train on this rank's share of the data; the trained network, equal on all ranks."""
    network_here = hzo.module(network()) if by_hzo else network()
    model = DistributedDataParallel(network_here)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    batches = loader()
    for epoch in range(EPOCHS):
        batches.sampler.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return network_here


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    print(f"rank {torch.distributed.get_rank()}: {accuracy(train()):.1f} % of the training digits")
    torch.distributed.destroy_process_group()
