"""The task that the examples of this folder share: scikit-learn's digits, and a small network with BatchNorm."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

BATCH, EPOCHS, RATE = 32, 2, 0.1


def digits() -> TensorDataset:
    """1,024 images of 8 × 8 numbers in [0, 1], and their digits."""
    found = load_digits()
    return TensorDataset(torch.tensor(found.data[:1024] / 16).float(), torch.tensor(found.target[:1024]).long())


def network() -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def loader() -> DataLoader:
    """Batches of this rank's share of the data."""
    data = digits()
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, shuffle=True, seed=0))


def accuracy(model: nn.Module) -> float:
    """On the training data, in percent."""
    model.eval()
    x, y = digits().tensors
    with torch.no_grad():
        scores: Tensor = model(x)
    return 100 * float((scores.argmax(1) == y).float().mean())
