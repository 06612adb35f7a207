"""The commands ``hzo train``, ``hzo compare``, ``hzo plan`` and ``hzo reproduce``."""
