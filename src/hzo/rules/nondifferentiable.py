"""Calls that carry nothing back: their derivative is zero wherever it exists, or their results are no real numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hzo.rules.base import Call, Cotangents, vjp
from hzo.tape.functions import out_of_place

aten = torch.ops.aten

ROUNDING = "ceil floor round trunc sign floor_divide heaviside signbit"
COMPARISONS = "eq ne lt le gt ge isnan isinf isfinite isneginf isposinf isreal isin equal is_nonzero is_same_size"
LOGIC = (
    "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not any all "
    "_is_all_true _is_any_true"
)
INDICES = "argmax argmin argsort count_nonzero histc histogram bincount multinomial one_hot _unique"
VALUES = "is_coalesced _local_scalar_dense _assert_async _assert_scalar sym_size sym_numel hash_tensor"
FACTORIES = (
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_empty_strided new_zeros "
    "new_ones new_full _efficientzerotensor"
)
RANDOM = "normal_ bernoulli_ random_ uniform_ exponential_ cauchy_ geometric_ log_normal_"
FILLS = "zero uniform normal_functional exponential cauchy geometric log_normal random bernoulli poisson binomial"


def _operators(names: str) -> Iterator[Any]:
    """The overloads of operators of these names that return something of their own."""
    for name in names.split():
        packet = getattr(aten, name, None)
        overloads = [] if packet is None else packet.overloads()
        for overload in overloads:
            if "out" not in overload and isinstance(getattr(packet, overload), torch._ops.OpOverload):
                yield getattr(packet, overload)


def _random_writes() -> Iterator[Any]:
    """Random numbers written in place, of overloads without a form that does not write."""
    for name in RANDOM.split():
        packet = getattr(aten, name)
        for overload in packet.overloads():
            yield out_of_place(getattr(packet, overload), (0,))


@vjp(
    *dict.fromkeys(
        [
            *_operators(" ".join((ROUNDING, COMPARISONS, LOGIC, INDICES, VALUES, FACTORIES, FILLS))),
            *_random_writes(),
            aten.fill.Scalar,
            aten.normal.Tensor_float,
            aten.normal.float_Tensor,
            aten.normal.Tensor_Tensor,
        ]
    ),
)
def nothing(_: Call) -> Cotangents:
    """No cotangent for any operand."""
    return {}
