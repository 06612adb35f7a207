"""The families of transformers that continuous integration tries: one of each kind of architecture, the fastest."""

SMOKE: tuple[str, ...] = ()
