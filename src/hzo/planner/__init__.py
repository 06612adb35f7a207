"""How a plan is chosen: the best tree, steps and repeats for a target or a budget, and the error model behind."""

from hzo.planner.accuracy import error_model, expected_errors, share
from hzo.planner.calibration import Bend, Calibration, Seconds, unitary
from hzo.planner.goal import points_of
from hzo.planner.mesh_cost import as_mesh, with_mesh, words_of_parameters
from hzo.planner.plan_chain import plan
from hzo.planner.tree_search import tree_edges

__all__ = [
    "Bend",
    "Calibration",
    "Seconds",
    "as_mesh",
    "error_model",
    "expected_errors",
    "plan",
    "points_of",
    "share",
    "tree_edges",
    "unitary",
    "with_mesh",
    "words_of_parameters",
]
