"""Networks by name, of near unit gain where possible: composed estimates stay accurate there."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hzo.errors import InputError
from hzo_lab.records import generator

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "leaky-relu": nn.LeakyReLU,
}


class Residual(nn.Module):
    """``x + scale · activation(layer(x))``: one layer beside a skip, its gain kept near one by ``scale``."""

    def __init__(self, layer: nn.Module, activation: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.activation = activation
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.activation(self.layer(x))
        return x + self.scale * branch


def mlp(inputs: int, classes: int, *, depth: int = 16, width: int = 64, activation: str = "gelu") -> nn.Module:
    """A residual MLP: a linear stem, ``depth`` blocks of one width, a linear head.

    The branches are scaled by 8/depth (at most 1/2), so that all of them together change an activation by as
    much whatever the depth.
    """
    scale = min(0.5, 8 / depth)
    blocks = [Residual(nn.Linear(width, width), _ACTIVATIONS[activation](), scale) for _ in range(depth)]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.Linear(width, classes))


def plain_mlp(inputs: int, classes: int, *, depth: int = 16, width: int = 64, activation: str = "gelu") -> nn.Module:
    """The same without skips: harder to train when deep, and harder to estimate."""
    layers = [nn.Sequential(nn.Linear(width, width), _ACTIVATIONS[activation]()) for _ in range(depth)]
    return nn.Sequential(nn.Linear(inputs, width), *layers, nn.Linear(width, classes))


def cnn(
    shape: tuple[int, ...], classes: int, *, depth: int = 8, width: int = 16, activation: str = "gelu"
) -> nn.Module:
    """A residual CNN without normalization: patches to an 8 × 8 map, ``depth`` blocks of one 3 × 3 layer, head."""
    scale = min(0.5, 8 / depth)
    blocks = [Residual(nn.Conv2d(width, width, 3, padding=1), _ACTIVATIONS[activation](), scale) for _ in range(depth)]
    return _on_patches(shape, classes, width, blocks)


def plain_cnn(
    shape: tuple[int, ...], classes: int, *, depth: int = 8, width: int = 16, activation: str = "gelu"
) -> nn.Module:
    """The same without skips."""
    layers = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), _ACTIVATIONS[activation]()) for _ in range(depth)]
    return _on_patches(shape, classes, width, layers)


class InvertedResidual(nn.Module):
    """``x + project(activation(expand(x)))``: the skip is narrow, the branch wide (Sandler et al., 2018), a 3 × 3
    layer and a 1 × 1 layer. The last layer starts at zero (Zhang et al., 2019, Fixup), so that at first the block is
    the identity: gain one without any normalization."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.activation = activation
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.project(self.activation(self.expand(x)))
        return x + branch


def inverted_cnn(
    shape: tuple[int, ...], classes: int, *, depth: int = 8, width: int = 8, activation: str = "gelu"
) -> nn.Module:
    """A residual CNN without normalization whose boundaries are narrow: a query perturbs those, not what is wide.

    Overlapping patches to an 8 × 8 map, ``depth`` inverted residual blocks, a linear layer that sees every position.
    """
    channels, height, across = shape
    patch = max(1, height // 8)
    kernel = patch + 2 * (patch // 2)
    stem = nn.Sequential(
        nn.Conv2d(channels, 4 * width, kernel, stride=patch, padding=patch // 2),
        _ACTIVATIONS[activation](),
        nn.Conv2d(4 * width, width, 1),
    )
    blocks = [InvertedResidual(width, _ACTIVATIONS[activation]()) for _ in range(depth)]
    positions = (height // patch) * (across // patch)
    return nn.Sequential(stem, *blocks, nn.Flatten(), nn.Linear(width * positions, classes))


def _on_patches(shape: tuple[int, ...], classes: int, width: int, body: Sequence[nn.Module]) -> nn.Module:
    channels, height, _ = shape
    patch = max(1, height // 8)
    stem = nn.Conv2d(channels, width, patch, stride=patch)
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class BasicBlock(nn.Module):
    """He et al. (2016), section 4.2: two 3 × 3 layers; where the map shrinks, the skip takes every second
    pixel and fills the new channels with zeros (their option A)."""

    def __init__(self, channels: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = _ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = _ACTIVATIONS[activation]()
        self.stride = stride
        self.added = outputs - channels

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        if self.stride != 1 or self.added:
            skip = x[:, :, :: self.stride, :: self.stride]
            skip = nn.functional.pad(skip, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        y = self.act1(self.bn1(self.conv1(x)))
        out: Tensor = self.act2(self.bn2(self.conv2(y)) + skip)
        return out


def resnet(
    shape: tuple[int, ...], classes: int, *, depth: int = 20, width: int = 16, activation: str = "relu"
) -> nn.Module:
    """The CIFAR ResNet with BatchNorm (He et al., 2016): 6n + 2 layers, widths w, 2w, 4w.

    The stem of larger images takes a stride that makes a 32 × 32 map of them, as ImageNet ResNets reduce theirs early:
    the blocks then cost what they cost on CIFAR.
    """
    if depth % 6 != 2 or depth < 8:
        raise InputError(f"expected a ResNet's depth to be 6n + 2 (8, 14, 20, …), got {depth}: give another --depth.")
    blocks: list[nn.Module] = []
    channels = width
    for group, outputs in enumerate((width, 2 * width, 4 * width)):
        for index in range((depth - 2) // 6):
            blocks.append(BasicBlock(channels, outputs, 2 if group and not index else 1, activation))
            channels = outputs
    stride = max(1, shape[1] // 32)
    stem = nn.Sequential(
        nn.Conv2d(shape[0], width, 2 * stride + 1, stride=stride, padding=stride, bias=False),
        nn.BatchNorm2d(width),
        _ACTIVATIONS[activation](),
    )
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@dataclass(frozen=True)
class Model:
    """A network by name.

    Attributes:
        make: from a shape and a number of classes, with ``depth``, ``width`` and ``activation`` by keyword.
        images: whether examples must be images, ``make`` taking their shape; else it takes a number of inputs.
        recipe: settings of ``TrainConfig`` that suit it, where they differ from the defaults.
    """

    make: Callable[..., nn.Module]
    images: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, Model] = {
    "mlp": Model(mlp),
    "plain-mlp": Model(plain_mlp, recipe={"lr": 0.02}),
    "cnn": Model(cnn, images=True),
    "resnet20": Model(resnet, images=True, recipe={"lr": 0.2, "probe_size": 64}),
    "plain-cnn": Model(plain_cnn, images=True),
    "inverted-cnn": Model(inverted_cnn, images=True, recipe={"lr": 0.02, "batch_size": 32}),
}
"""All that takes, lists or completes names of models reads this table."""


def own_size(name: str) -> dict[str, Any]:
    """Depth, width and activation that a network has where none are asked for."""
    parameters = inspect.signature(MODELS[name].make).parameters
    return {key: parameters[key].default for key in ("depth", "width", "activation")}


def initialise(model: nn.Module, seed: int) -> None:
    """Set every weight from ``seed`` alone: the same numbers whatever else was drawn before, on any device.

    Convolutions followed by ReLU-like functions get He's fan-out; linear layers the uniform ±1/√fan-in that
    PyTorch uses; the last layer of an inverted residual starts at zero.
    """
    random = generator(seed, "weights")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=random)
            else:
                nn.init.uniform_(module.weight, -bound, bound, generator=random)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=random)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, InvertedResidual):
            nn.init.zeros_(module.project.weight)
            nn.init.zeros_(module.project.bias)  # type: ignore[arg-type]


def build(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    *,
    depth: int | None = None,
    width: int | None = None,
    activation: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """The network ``name`` for examples of ``shape``, its weights a function of ``seed``."""
    asked = {"depth": depth, "width": width, "activation": activation}
    own: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if name not in MODELS:
        raise InputError(f"expected a model of the names {', '.join(MODELS)}, got {name!r}.")
    known = MODELS[name]
    if known.images and len(shape) != 3:
        raise InputError(f"expected images for {name}, the data give vectors of {shape[0]}: choose --model mlp.")
    model = known.make(shape if known.images else math.prod(shape), classes, **own)
    if not known.images and len(shape) > 1:
        model = nn.Sequential(nn.Flatten(), *model.children())
    with torch.no_grad():
        initialise(model, seed)
    return model
