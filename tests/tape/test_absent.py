"""What the tape did not keep can be asked for its shape, and nothing can be computed with it."""

import pytest
import torch

from hzo.errors import TapeError
from hzo.tape.absent import Absent


@pytest.fixture
def absent():
    return Absent(torch.empty(2, 3, device="meta"))


def test_shape_and_dtype(absent):
    assert absent.shape == (2, 3)
    assert absent.dtype == torch.float32
    assert absent.is_meta
    assert absent.mT.shape == (3, 2)
    assert isinstance(absent.expand(4, 2, 3).sum(0), Absent)
    assert "Absent" in repr(absent)


REAL = torch.ones(2, 3)
CALLS = {
    "product": lambda x: torch.mm(REAL, x.mT),
    "product from the left": lambda x: torch.mm(x, REAL.mT),
    "sum": lambda x: REAL + x,
    "sum in place": lambda x: REAL.clone().add_(x),
    "copy": lambda x: REAL.clone().copy_(x),
    "index": lambda x: REAL[x.long()],
    "gather": lambda x: REAL.gather(0, x.long()),
    "convolution": lambda x: torch.nn.functional.conv1d(REAL[None], x[:, :, None]),
    "list": lambda x: torch.cat([REAL, x]),
}


@pytest.mark.parametrize("name", CALLS)
def test_computing_raises(absent, name):
    """Beside real tensors, PyTorch's own meta tensors are read as if memory were there in some of these."""
    with pytest.raises(TapeError, match="content was not kept"):
        CALLS[name](absent)
