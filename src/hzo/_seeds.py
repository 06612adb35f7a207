"""Seeds of streams of random numbers, each derived from one seed and the names of what draws from it."""

from __future__ import annotations

import hashlib


def derive(seed: int, *labels: object) -> int:
    """A seed for one stream, from 0 to 2⁶³ − 1.

    Hashed: neighbouring seeds and labels share nothing, and every machine and version of Python finds the same.
    """
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
