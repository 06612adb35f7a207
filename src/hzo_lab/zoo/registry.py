"""The libraries of the zoo: each lists families by name and builds one of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from hzo_lab.zoo.case import Case, NotBuiltError

# Name on the command line, module that holds the families, distribution whose version is recorded.
_LIBRARIES: dict[str, tuple[str, str]] = {
    "transformers": ("transformers_models", "transformers"),
    "timm": ("timm_models", "timm"),
    "torchvision": ("torchvision_models", "torchvision"),
    "torch_geometric": ("graph_convolutions", "torch-geometric"),
    "diffusers": ("diffusers_models", "diffusers"),
    "recurrent": ("recurrent_layers", "torch"),
    "peft": ("peft_adapters", "peft"),
    "spiking": ("spiking_cells", "snntorch"),
}
LIBRARIES = tuple(_LIBRARIES)


@dataclass(frozen=True)
class Family:
    """One architecture of a library; ``str(family)`` is its name on the command line and in results."""

    library: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


def _module(library: str) -> Any:
    return importlib.import_module(f"hzo_lab.zoo.{_LIBRARIES[library][0]}")


def distribution(library: str) -> str:
    """The installed distribution that a library's families come from."""
    return _LIBRARIES[library][1]


def preload(library: str) -> None:
    """Import what the families of a library share, so that each process does not have to."""
    getattr(_module(library), "preload", lambda: None)()


def families(library: str, further: bool = False) -> list[Family]:
    """The families of a library. ``further``: of transformers, the other heads of every model type as well.

    Raises NotBuiltError: the library is not installed.
    """
    module = _module(library)
    names = list(module.families())
    if further:
        names += getattr(module, "further_families", list)()
    return [Family(library, name) for name in names]


def build(family: Family, dtype: torch.dtype) -> Case:
    """The family with random weights, in training mode. Raises NotBuiltError: it cannot be made, and why."""
    try:
        case: Case = _module(family.library).build(family.name, dtype)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    return case
