"""The claims of the paper, each tried by one command: ``hzo reproduce``.

One file a claim, each with one function that takes a ``Setting`` and returns a ``Finding``; ``registry`` lists them,
``record`` writes what they found.
"""
