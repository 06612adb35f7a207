"""timm: one family for every module file (`timm.list_modules()`), its smallest model, on small images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo_lab.zoo.case import Case, NotBuiltError
from hzo_lab.zoo.imports import library

MOST_PARAMETERS, MOST_PARAMETERS_AT_ALL = 12_000_000, 30_000_000
CLASSES = 5
# Files that hold several architectures give a further family each.
FURTHER = ("resnet18", "resnext50_32x4d", "seresnet50", "mobilenetv2_050", "mixnet_s", "mnasnet_small", "spnasnet_100",
           "gmixer_12_224", "gmlp_ti16_224", "resmlp_12_224", "botnet26t_256", "lambda_resnet26t", "gcresnet33ts",
           "eca_halonext26ts", "coatnet_nano_rw_224", "maxvit_nano_rw_256", "maxxvit_rmlp_nano_rw_256")  # fmt: skip


def preload() -> None:
    library("timm")


def families() -> list[str]:
    timm = library("timm")
    return sorted(timm.list_modules()) + [f"model/{name}" for name in FURTHER if timm.is_model(name)]


def build(name: str, dtype: torch.dtype) -> Case:
    timm = library("timm")
    # The names say which are small; the count of parameters, without memory, says which is smallest.
    names = [name.removeprefix("model/")] if name.startswith("model/") else timm.list_models(module=name)
    sizes = []
    for model_name in sorted(names, key=_promise)[:8]:
        with torch.device("meta"):
            try:
                model = timm.create_model(model_name, pretrained=False, num_classes=CLASSES)
            except Exception:
                continue
        sizes.append((sum(p.numel() for p in model.parameters()), model_name))
    if not sizes:
        raise NotBuiltError(f"timm.list_models(module={name!r}) has no model that can be created")
    reasons = []
    for parameters, model_name in sorted(sizes)[:3]:
        for side, options in _attempts(timm, model_name):
            try:
                return _attempt(timm, model_name, dtype, side, options, parameters)
            except Exception as error:
                if "img_size" not in str(error):  # not every model is told the size of its images
                    reasons.append(f"{model_name} at {side}: {type(error).__name__}: {error}")
    raise NotBuiltError(reasons[0])


_SMALL = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xxt",
    "xx_small",
    "tiny",
    "_ti_",
    "_ti16",
    "mini",
    "_xs",
    "small",
    "_s0",
    "_b0",
    "_t0",
    "_m0",
    "_t8",
    "_s_",
    "_s",
    "18",
    "26",
    "050",
    "035",
)


def _promise(name: str) -> tuple[int, int]:
    """Names that say small come first."""
    return next((k for k, word in enumerate(_SMALL) if word in name), len(_SMALL)), len(name)


def _attempts(timm: Any, model_name: str) -> list[tuple[int, dict[str, Any]]]:
    config = timm.get_pretrained_cfg(model_name)
    side = config.input_size[-1] if config is not None else 224
    small = [(s, o) for s in (32, 64, 96, 128) if s < side for o in ({"img_size": s}, {})]
    return [*small, (side, {})]


def _attempt(
    timm: Any, model_name: str, dtype: torch.dtype, side: int, options: dict[str, Any], parameters: int
) -> Case:
    torch.manual_seed(0)
    thinner: list[dict[str, Any]] = [{}]
    if parameters > MOST_PARAMETERS:
        thinner = [{"depth": 2}, {"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {"stages": (1, 1, 1, 1)}, {}]
    reason: Exception | None = None
    for less in thinner:
        try:
            model: nn.Module = timm.create_model(model_name, pretrained=False, num_classes=CLASSES, **options, **less)
        except Exception as error:
            reason = error
            continue
        count = sum(p.numel() for p in model.parameters())
        if count > MOST_PARAMETERS_AT_ALL:
            reason = NotBuiltError(f"{count:,} parameters")
            continue
        model = model.train().to(dtype)
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        labels = torch.tensor([1, 3])

        def call(model: nn.Module = model, x: Tensor = x, labels: Tensor = labels) -> Tensor:
            out = model(x)
            if isinstance(out, (tuple, list)):  # distilled and auxiliary heads
                return torch.stack([F.cross_entropy(o, labels) for o in out]).sum()
            return F.cross_entropy(out, labels)

        call()
        return Case(model, call, f"{model_name} at {side}, {count:,} parameters")
    raise NotBuiltError(str(reason))
