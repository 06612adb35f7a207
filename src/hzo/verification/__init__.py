"""Slow and obviously right: is every promise about a model kept, and what does an unknown module keep."""

from hzo.verification.coloring import check_coloring
from hzo.verification.gradient import GradientCheck, Slope, check_gradient
from hzo.verification.inference import InferredStructure, infer_structure
from hzo.verification.structure import StructureReport, check_structure

__all__ = [
    "GradientCheck",
    "InferredStructure",
    "Slope",
    "StructureReport",
    "check_coloring",
    "check_gradient",
    "check_structure",
    "infer_structure",
]
