"""Lightning's automatic optimization around hzo.module.

``torchrun --nproc-per-node 2 examples/distributed/with_lightning.py``
"""

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import hzo
from task import BATCH, EPOCHS, RATE, accuracy, digits, network


class Digits(lightning.LightningModule):
    def __init__(self, by_hzo: bool = True) -> None:
        super().__init__()
        self.network = hzo.module(network()) if by_hzo else network()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)


def train(by_hzo: bool = True) -> torch.nn.Module:
    """Train on this rank's share of the data; the trained network, equal on all ranks."""
    model = Digits(by_hzo)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(digits(), BATCH))
    return model.network


if __name__ == "__main__":
    model = train()
    print(f"rank {torch.distributed.get_rank()}: {accuracy(model):.1f} % of the training digits")
    torch.distributed.destroy_process_group()
