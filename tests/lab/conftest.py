import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """These networks are tiny: a second thread costs more than it does."""
    torch.set_num_threads(1)
