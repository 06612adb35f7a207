"""hzo: train deep networks with forward passes only.

Data flows one way: model -> chain (``trace``) -> plan (``plan``) -> boundaries -> cotangents -> gradients
(``backward``, ``grad_and_value``, ``cotangents``).
"""

from hzo import baselines, presets
from hzo.blackbox import BlackBox, blackbox
from hzo.calibrate import calibrate
from hzo.calibration import Calibration
from hzo.chain import Chain, noisy
from hzo.checking import StructureReport, check_structure
from hzo.coloring_check import check_coloring
from hzo.criterion import smoothed
from hzo.crosstalk import CrossTalk, report_crosstalk
from hzo.declaring import Local, declare
from hzo.gradient import backward, cotangents, grad_and_value
from hzo.inference import InferredStructure, infer_structure
from hzo.noise import Noise
from hzo.plan import Plan
from hzo.plan_file import load_plan, save_plan
from hzo.planner import plan
from hzo.queries import QueryCount, count_queries
from hzo.simulator import simulator
from hzo.tracing import trace
from hzo.vjp import estimate_vjp

__all__ = [
    "BlackBox",
    "Calibration",
    "Chain",
    "CrossTalk",
    "InferredStructure",
    "Local",
    "Noise",
    "Plan",
    "QueryCount",
    "StructureReport",
    "backward",
    "baselines",
    "blackbox",
    "calibrate",
    "check_coloring",
    "check_structure",
    "cotangents",
    "count_queries",
    "declare",
    "estimate_vjp",
    "grad_and_value",
    "infer_structure",
    "load_plan",
    "noisy",
    "plan",
    "presets",
    "report_crosstalk",
    "save_plan",
    "simulator",
    "smoothed",
    "trace",
]
