"""Random numbers of a run: streams of their own, and states that are put back."""

import random

import numpy as np
import torch

from hzo_lab.records.seeds import (
    generator,
    generator_states,
    restore_generators,
    seed_everything,
    separate_random_numbers,
)


def drawn():
    return float(torch.rand(())), float(np.random.rand()), float(np.random.randn()), random.gauss(0, 1)


def test_streams_are_told_apart_by_their_labels():
    once, again, other = (
        torch.rand(4, generator=generator(3, *label)) for label in (("order",), ("order",), ("crop",))
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_the_three_generators_are_seeded():
    seed_everything(5)
    first = drawn()
    seed_everything(5)
    assert drawn() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(drawn(), first, strict=True))


def test_states_are_put_back_to_the_bit():
    seed_everything(1)
    drawn()  # half of a pair of normal numbers waits
    tensors, values = generator_states()
    expected = drawn()
    seed_everything(2)
    restore_generators(tensors, values)
    assert drawn() == expected


def test_a_block_with_numbers_of_its_own_leaves_the_others_alone():
    seed_everything(1)
    expected = drawn()
    seed_everything(1)
    with separate_random_numbers(7):
        assert drawn() != expected
    assert drawn() == expected
