"""hzo: train deep networks with forward passes only.

Data flows one way: model -> chain (``trace``) -> plan (``plan``) -> boundaries -> cotangents -> gradients
(``backward``, ``grad_and_value``, ``cotangents``).
"""

from hzo import baselines, presets
from hzo._version import __version__
from hzo.baselines import GradientComparison, compare_gradients
from hzo.execution import QueryCount, count_queries
from hzo.external import BlackBox, blackbox, module, plain, simulator, smoothed
from hzo.finite_differences import CrossTalk, estimate_vjp, report_crosstalk, tolerate_rounding
from hzo.gradients import backward, cotangents, grad_and_value
from hzo.measurement import calibrate
from hzo.noise import Noise
from hzo.planner import Calibration, plan
from hzo.plans import Plan, load_plan, save_plan
from hzo.pools import ray_executor
from hzo.progress import show_progress
from hzo.reverse import RecordedStep, record
from hzo.tracing import Chain, Local, declare, noisy
from hzo.tracing.recorder import trace
from hzo.verification import (
    GradientCheck,
    InferredStructure,
    StructureReport,
    check_coloring,
    check_gradient,
    check_structure,
    infer_structure,
)

__all__ = [
    "BlackBox",
    "Calibration",
    "Chain",
    "CrossTalk",
    "GradientCheck",
    "GradientComparison",
    "InferredStructure",
    "Local",
    "Noise",
    "Plan",
    "QueryCount",
    "RecordedStep",
    "StructureReport",
    "__version__",
    "backward",
    "baselines",
    "blackbox",
    "calibrate",
    "check_coloring",
    "check_gradient",
    "check_structure",
    "compare_gradients",
    "cotangents",
    "count_queries",
    "declare",
    "estimate_vjp",
    "grad_and_value",
    "infer_structure",
    "load_plan",
    "module",
    "noisy",
    "plain",
    "plan",
    "presets",
    "ray_executor",
    "record",
    "report_crosstalk",
    "save_plan",
    "show_progress",
    "simulator",
    "smoothed",
    "tolerate_rounding",
    "trace",
]
