"""What a plan is: a tree of nodes, their probes and price, and which activations are stored; plans as files."""

from hzo.plans.activation_schedule import Schedule, schedule
from hzo.plans.choice import Allowed
from hzo.plans.cost import bytes_per_direction, share_of
from hzo.plans.fit import check_fits
from hzo.plans.memory import with_storage
from hzo.plans.nodes import (
    Wanted,
    check_queries,
    has_rule,
    make_node,
    plan_without_nodes,
    possible,
    wanted_by,
    with_edges,
)
from hzo.plans.options import Boundaries, PlanOptions, check_boundaries, check_not_modelled, check_smoothing
from hzo.plans.plan import Cost, Expected, MeshCost, Node, ParameterProbe, Plan, PlannedEdge, RankCost, expectation
from hzo.plans.serialize import load_plan, save_plan
from hzo.plans.trees import (
    FIXED,
    TREES,
    Edge,
    Tree,
    b_ary,
    check_tree,
    fixed_tree,
    flat,
    longest_path,
    stagewise,
    total_length,
)

__all__ = [
    "FIXED",
    "TREES",
    "Allowed",
    "Boundaries",
    "Cost",
    "Edge",
    "Expected",
    "MeshCost",
    "Node",
    "ParameterProbe",
    "Plan",
    "PlanOptions",
    "PlannedEdge",
    "RankCost",
    "Schedule",
    "Tree",
    "Wanted",
    "b_ary",
    "bytes_per_direction",
    "check_boundaries",
    "check_fits",
    "check_not_modelled",
    "check_queries",
    "check_smoothing",
    "check_tree",
    "expectation",
    "fixed_tree",
    "flat",
    "has_rule",
    "load_plan",
    "longest_path",
    "make_node",
    "plan_without_nodes",
    "possible",
    "save_plan",
    "schedule",
    "share_of",
    "stagewise",
    "total_length",
    "wanted_by",
    "with_edges",
    "with_storage",
]
