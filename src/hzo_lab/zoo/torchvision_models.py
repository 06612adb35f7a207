"""torchvision's models of classification, segmentation, video and optical flow, on small images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo_lab.zoo.case import Case
from hzo_lab.zoo.imports import library

# Depth makes a model slow and not different: of every kind the smallest is taken.
CLASSIFICATION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_16",
    "wide_resnet50_2",
)
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
FLOW = ("raft_small", "raft_large")
SIDES = {"inception_v3": 299, "alexnet": 64, "maxvit_t": 56, "vit_b_16": 32}
OPTIONS: dict[str, dict[str, Any]] = {"vit_b_16": {"image_size": 32}}
CLASSES = 5


def preload() -> None:
    library("torchvision.models")


def families() -> list[str]:
    return [f"{kind}/{name}" for kind, names in _KINDS.items() for name in names]


_KINDS = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION, "video": VIDEO, "flow": FLOW}


def build(name: str, dtype: torch.dtype) -> Case:
    models = library("torchvision.models")
    kind, model_name = name.split("/")
    torch.manual_seed(0)
    options: dict[str, Any] = dict(OPTIONS.get(model_name, {}))
    if kind == "segmentation":
        options |= {"weights_backbone": None, "num_classes": CLASSES}
        if model_name != "lraspp_mobilenet_v3_large":
            options["aux_loss"] = True
    elif kind != "flow":
        options["num_classes"] = CLASSES
    if model_name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": model_name == "inception_v3"}
    made = _made_by_hand(models, model_name)
    model: nn.Module = made if made is not None else models.get_model(model_name, weights=None, **options)
    model = model.train().to(dtype)
    draw = torch.Generator().manual_seed(1)

    def images(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    if kind == "classification":
        side = SIDES.get(model_name, 32)
        x, labels = images(2, 3, side, side), torch.tensor([1, 3])

        def call() -> Tensor:
            out = model(x)
            if isinstance(out, tuple):  # the main head and an auxiliary one
                return F.cross_entropy(out[0], labels) + 0.4 * F.cross_entropy(out[1], labels)
            return F.cross_entropy(out, labels)
    elif kind == "segmentation":
        x, labels = images(2, 3, 33, 33), torch.arange(2 * 33 * 33).reshape(2, 33, 33) % CLASSES

        def call() -> Tensor:
            out = model(x)
            return torch.stack([F.cross_entropy(o, labels) for o in out.values()]).sum()
    elif kind == "video":
        size = (2, 3, 16, 224, 224) if model_name == "s3d" else (2, 3, 4, 32, 32)
        x, labels = images(*size), torch.tensor([1, 3])

        def call() -> Tensor:
            return F.cross_entropy(model(x), labels)
    else:
        x, y, flow = images(1, 3, 128, 128), images(1, 3, 128, 128), images(1, 2, 128, 128)

        def call() -> Tensor:
            steps = model(x, y, num_flow_updates=2)
            return torch.stack([0.8 ** (len(steps) - k) * (s - flow).abs().mean() for k, s in enumerate(steps)]).sum()

    return Case(model, call, f"{model_name}, {sum(p.numel() for p in model.parameters()):,} parameters")


def _made_by_hand(models: Any, name: str) -> nn.Module | None:
    """Models whose functions take no sizes, from their classes."""
    if name == "maxvit_t":
        made: nn.Module = models.maxvit.MaxVit(
            input_size=(56, 56),
            stem_channels=16,
            partition_size=7,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.2,
            num_classes=CLASSES,
        )
        return made
    return _multiscale(models, name) if name.startswith("mvit") else None


def _multiscale(models: Any, name: str) -> nn.Module:
    """A multiscale vision transformer of three blocks, of the first or of the second version."""
    mvit = models.video.mvit
    second = name == "mvit_v2_s"
    blocks = [
        mvit.MSBlockConfig(
            num_heads=heads, input_channels=a, output_channels=b, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3],
            stride_q=[1, s, s], stride_kv=[1, 2, 2],
        )
        for heads, a, b, s in ((1, 16, 32, 1), (2, 32, 32, 2), (2, 32, 32, 1))
    ]  # fmt: skip
    made: nn.Module = mvit.MViT(
        spatial_size=(32, 32), temporal_size=4, block_setting=blocks, residual_pool=second,
        residual_with_cls_embed=not second, rel_pos_embed=second, proj_after_attn=second, dropout=0.1,
        attention_dropout=0.0, stochastic_depth_prob=0.2, num_classes=CLASSES,
    )  # fmt: skip
    return made
