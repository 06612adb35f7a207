import pytest
import torch
from hypothesis import settings

# These networks are tiny: a second thread costs more than it does.
torch.set_num_threads(1)

# The first example of a shape pays for torch's own warming up; on a busy machine no deadline is a fair one. The same
# examples every time: a run that failed can be repeated.
settings.register_profile("hzo", deadline=None, derandomize=True)
settings.load_profile("hzo")


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)
