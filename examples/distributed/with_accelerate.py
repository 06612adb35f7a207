"""Accelerate around hzo.module: ``torchrun --nproc-per-node 2 examples/distributed/with_accelerate.py``."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import hzo
from task import BATCH, EPOCHS, RATE, accuracy, digits, network


def train(by_hzo: bool = True) -> torch.nn.Module:
    """Train on this rank's share of the data, with accumulation and clipping; the network, equal on all ranks."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = hzo.module(network()) if by_hzo else network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(digits(), BATCH))
    for _ in range(EPOCHS):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    model = train()
    print(f"rank {torch.distributed.get_rank()}: {accuracy(model):.1f} % of the training digits")
    torch.distributed.destroy_process_group()
