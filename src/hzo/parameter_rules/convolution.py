"""Parameters of convolutions: the correlation of the input with the cotangent. Cost: one convolution of the
layer's own size, by the kernel that torch has for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo.parameter_rules.common import Arguments, Entry, lift


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _padded(x: Tensor, a: Arguments, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """The input, padded by hand where the kernel cannot do it, and the padding left for the kernel."""
    padding, axes = a.get("padding", 0), len(dilation)
    if a.get("padding_mode", "zeros") != "zeros":
        return F.pad(x, a["_reversed_padding_repeated_twice"], mode=a["padding_mode"]), [0] * axes
    if padding == "valid":
        return x, [0] * axes
    if padding == "same":
        both = [d * (k - 1) for d, k in zip(dilation, a["weight"].shape[2:], strict=True)]
        if any(total % 2 for total in both):  # the odd one goes behind
            behind_first = [side for total in reversed(both) for side in (total // 2, total - total // 2)]
            return F.pad(x, behind_first), [0] * axes
        return x, [total // 2 for total in both]
    return x, _per_axis(padding, axes)


def _convolution(transposed: bool, a: Arguments, g: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    weight = a["weight"]
    axes = weight.ndim - 2
    if g.ndim == axes + 1:  # a single sample
        g = g.unsqueeze(0)
    found = {"bias": g.sum([0, *range(2, g.ndim)])} if "bias" in wanted else {}
    if "weight" not in wanted:
        return found
    x = lift(a, "input", g)
    x = x.unsqueeze(0) if x.ndim == axes + 1 else x
    stride, dilation = (_per_axis(a.get(name, 1), axes) for name in ("stride", "dilation"))
    x, padding = _padded(x, a, dilation)
    extra = [0] * axes
    if transposed:  # what the sizes say: the module may have chosen it from an output_size
        least = zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
        extra = [
            size - ((n - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, (n, s, p, d, k) in zip(g.shape[2:], least, strict=True)
        ]
    _, found["weight"], _ = torch.ops.aten.convolution_backward(
        g, x, weight.to(g.dtype), None, stride, padding, dilation, transposed, extra, a.get("groups", 1),
        [False, True, False],
    )  # fmt: skip
    return found


_CONVOLUTION = partial(_convolution, False)
_TRANSPOSED = partial(_convolution, True)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ATTRIBUTES = ("weight", "stride", "padding", "dilation", "groups")
_PADDED = (*_ATTRIBUTES, "padding_mode", "_reversed_padding_repeated_twice")

MODULES: dict[type[nn.Module], Entry] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Entry(_CONVOLUTION, ("input",), attributes=_PADDED)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        Entry(_TRANSPOSED, ("input", "output_size"), attributes=_ATTRIBUTES),
    ),
}
FUNCTIONS: dict[Callable[..., Any], Entry] = {
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), Entry(_CONVOLUTION, _NAMES)
    ),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), Entry(_TRANSPOSED, _TRANSPOSED_NAMES)
    ),
}
