"""How a declared module carries a cotangent back: by what its user promised of it, measured with impulses.

==============  ============================================================  ===============================
promise         the Jacobian is                                               queries
==============  ============================================================  ===============================
reindexing      a map of places                                               0
affine          one matrix for all samples (and tokens, channels)             one sample an input feature
stationary      a convolution                                                 (C/groups)·s² small canvases
==============  ============================================================  ===============================
"""

from hzo.declared.common import Adjoint, DeclaredCall, Shape, call_of, impulse_size, is_only_input
from hzo.declared.rules import find_adjoint

__all__ = ["Adjoint", "DeclaredCall", "Shape", "call_of", "find_adjoint", "impulse_size", "is_only_input"]
