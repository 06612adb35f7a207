"""Standard architectures at small sizes, written as their users write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo_lab.networks import GPT, Bottleneck, ProjectionBlock, ResNet, TransformerBlock


def resnet18(width: int = 4) -> nn.Module:
    return ResNet(ProjectionBlock, (2, 2, 2, 2), width, stem="imagenet")


def resnet20(width: int = 4) -> nn.Module:
    return ResNet(ProjectionBlock, (3, 3, 3), width)


def resnet50(width: int = 4) -> nn.Module:
    return ResNet(Bottleneck, (3, 4, 6, 3), width, stem="imagenet")


def vgg(width: int = 4) -> nn.Module:
    """Convolutions, max pooling, dropout."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(16, 10),
    )


class DenseNet(nn.Module):
    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        channels = 2 * growth
        for _ in range(2):
            layers = nn.ModuleList()
            for _ in range(3):
                layers.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels),
                        nn.ReLU(inplace=True),
                        nn.Conv2d(channels, growth, 3, padding=1, bias=False),
                    )
                )
                channels += growth
            self.blocks.append(layers)
            layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)
                )
            )
            channels //= 2
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            features = [x]
            for layer in block[:-1]:
                features.append(layer(torch.cat(features, 1)))
            x = block[-1](torch.cat(features, 1))
        x = F.relu(self.norm(x))
        return self.head(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))


class InvertedResidual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * inside
        self.body = nn.Sequential(
            nn.Conv2d(inside, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
        InvertedResidual(width, width, 1),
        InvertedResidual(width, 2 * width, 2),
        InvertedResidual(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * width, 10),
    )


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x).permute(0, 2, 3, 1)
        h = self.gamma * self.shrink(F.gelu(self.expand(self.norm(h))))
        return x + h.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class UNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def double(inside: int, outside: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
                nn.Conv2d(outside, outside, 3, padding=1), nn.GroupNorm(2, outside), nn.SiLU(),
            )  # fmt: skip

        self.down1, self.down2, self.middle = double(3, width), double(width, 2 * width), double(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2)
        self.up2 = double(4 * width, width)
        self.up1 = double(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.avg_pool2d(b, 2))
        h = self.up2(torch.cat([self.up(c), b], dim=1))
        h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.up1(torch.cat([h, a], dim=1)))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(4, width), MixerBlock(4, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class ViT(nn.Module):
    def __init__(self, width: int = 8, patches: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width))
        self.blocks = nn.Sequential(TransformerBlock(width, 2, False), TransformerBlock(width, 2, False))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def encoder(width: int = 8) -> nn.Module:
    """torch's own encoder, with its dropout."""
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
    return nn.Sequential(nn.Linear(3, width), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(4 * width, 10))


class UnrolledGRU(nn.Module):
    def __init__(self, features: int = 3, width: int = 5) -> None:
        super().__init__()
        self.x, self.h, self.out = nn.Linear(features, 3 * width), nn.Linear(width, 3 * width), nn.Linear(width, 10)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.width)
        for t in range(x.shape[1]):
            xr, xz, xn = self.x(x[:, t]).chunk(3, -1)
            hr, hz, hn = self.h(h).chunk(3, -1)
            r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + r * hn) + z * h
        return self.out(h)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Masked attention from products and a softmax."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


BATCH = 3


def images(size):
    return torch.randn(BATCH, 3, size, size, dtype=torch.float64)


def classes():
    return torch.randint(10, (BATCH,))


NETWORKS = {
    "resnet18": lambda: (resnet18(), images(32), classes()),
    "resnet20": lambda: (resnet20(), images(16), classes()),
    "resnet50": lambda: (resnet50(), images(32), classes()),
    "vgg": lambda: (vgg(), images(16), classes()),
    "densenet": lambda: (DenseNet(), images(8), classes()),
    "mobilenet": lambda: (mobilenet(), images(16), classes()),
    "convnext": lambda: (ConvNeXt(), images(16), classes()),
    "unet": lambda: (UNet(), images(16), torch.randint(2, (BATCH, 16, 16))),
    "mixer": lambda: (Mixer(), images(8), classes()),
    "vit": lambda: (ViT(), images(8), classes()),
    "gpt": lambda: (GPT(), torch.randint(11, (BATCH, 6)), torch.randint(11, (BATCH, 6))),
    "encoder": lambda: (encoder(), torch.randn(BATCH, 4, 3, dtype=torch.float64), classes()),
    "gru": lambda: (UnrolledGRU(), torch.randn(BATCH, 4, 3, dtype=torch.float64), classes()),
}
