"""One vector-Jacobian product by finite differences: steps, probes, sparsity and coloring."""

from hzo.finite_differences.coloring import Coloring, color, thin
from hzo.finite_differences.places import (
    Stencil,
    coarse_steps,
    element_scale,
    element_steps,
    of_one_sign,
    stencil,
)
from hzo.finite_differences.probes import Probe, States, decode
from hzo.finite_differences.random_signs import DRAWS, CrossTalk, over_signs, report_crosstalk
from hzo.finite_differences.scales import immovable, real_parts, scale_of
from hzo.finite_differences.sparsity import (
    Link,
    Links,
    Matrix,
    Pattern,
    either,
    follow,
    identity,
    matrix_of,
    without_full,
)
from hzo.finite_differences.steps import (
    Scheme,
    accumulation_dtype,
    check_scheme,
    check_step,
    default_step,
    evaluations,
    narrowest,
    relative_step,
    scaled_step,
    stepped,
)
from hzo.finite_differences.vjp import RunCopies, directions_per_chunk, estimate_vjp, tolerate_rounding, vjp_rows

__all__ = [
    "DRAWS",
    "Coloring",
    "CrossTalk",
    "Link",
    "Links",
    "Matrix",
    "Pattern",
    "Probe",
    "RunCopies",
    "Scheme",
    "States",
    "Stencil",
    "accumulation_dtype",
    "check_scheme",
    "check_step",
    "coarse_steps",
    "color",
    "decode",
    "default_step",
    "directions_per_chunk",
    "either",
    "element_scale",
    "element_steps",
    "estimate_vjp",
    "evaluations",
    "follow",
    "identity",
    "immovable",
    "matrix_of",
    "narrowest",
    "of_one_sign",
    "over_signs",
    "real_parts",
    "relative_step",
    "report_crosstalk",
    "scale_of",
    "scaled_step",
    "stencil",
    "stepped",
    "thin",
    "tolerate_rounding",
    "vjp_rows",
    "without_full",
]
