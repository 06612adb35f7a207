"""The memory that tensors take, against sizes known beforehand."""

import torch

from hzo_lab.records.allocations import peak_of

MEBIBYTE = 2**20


def one_after_the_other():
    for _ in range(3):
        torch.zeros(MEBIBYTE, dtype=torch.uint8)


def all_at_once():
    return [torch.zeros(MEBIBYTE, dtype=torch.uint8) for _ in range(3)]


def test_what_is_released_does_not_add_up():
    assert peak_of(one_after_the_other) == MEBIBYTE
    assert peak_of(all_at_once) == 3 * MEBIBYTE


def test_ignored_sizes_do_not_count():
    assert peak_of(all_at_once, ignored=[MEBIBYTE]) == 0
