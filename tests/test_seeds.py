"""Streams of random numbers: the same everywhere, and nothing shared."""

import hashlib

from hzo._seeds import derive


def test_a_seed_is_the_same_on_every_machine():
    """Resumed runs and plans draw what they drew before: the value is BLAKE2b's, not the interpreter's."""
    by_hand = int.from_bytes(hashlib.blake2b(b"7/3/1/2", digest_size=8).digest(), "little") // 2
    assert derive(7, 3, 1, 2) == by_hand == 1043004396043119162


def test_neighbours_share_nothing():
    seeds = {derive(seed, label) for seed in range(100) for label in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
