"""Numerical tests, slow and simple: is a gradient right, is every promise kept, what may be promised of a module."""

from hzo.verification.coloring import check_coloring
from hzo.verification.gradient import GradientCheck, check_gradient
from hzo.verification.inference import InferredStructure, infer_structure
from hzo.verification.localize import WrongOperation
from hzo.verification.slopes import Slope
from hzo.verification.structure import StructureReport, check_structure

__all__ = [
    "GradientCheck",
    "InferredStructure",
    "Slope",
    "StructureReport",
    "WrongOperation",
    "check_coloring",
    "check_gradient",
    "check_structure",
    "infer_structure",
]
