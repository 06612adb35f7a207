"""All that a forward pass could change, and whether it did."""

import torch


def state(module):
    """All that a forward pass could change, copied."""
    return {
        "tensors": {k: t.detach().clone() for k, t in [*module.named_parameters(), *module.named_buffers()]},
        "identities": [id(t) for t in [*module.parameters(), *module.buffers()]],
        "training": [m.training for m in module.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(a, b):
    assert a["identities"] == b["identities"]
    assert a["training"] == b["training"]
    assert torch.equal(a["random"], b["random"])
    assert a["tensors"].keys() == b["tensors"].keys()
    for name, tensor in a["tensors"].items():
        torch.testing.assert_close(tensor, b["tensors"][name], rtol=0, atol=0, equal_nan=True)
