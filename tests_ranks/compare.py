"""Run by torchrun: train by an example of examples/distributed/ with hzo, then with autograd alone; compare weights."""

import importlib
import json
import sys
from pathlib import Path

import torch

import hzo


def gap(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference of any number in two networks, buffers included."""
    other = b.state_dict()
    return max(float((t.double() - other[name].double()).abs().max()) for name, t in a.state_dict().items())


def main(name: str, out: str) -> None:
    torch.set_num_threads(1)
    example = importlib.import_module(name)
    if name in {"with_ddp", "with_fsdp2"}:  # the libraries do it themselves
        torch.distributed.init_process_group("gloo")
    with hzo.count_queries() as count:
        by_hzo = example.train(True)
    exact = example.train(False)
    start = example.network()
    moved = max(float((p - q).abs().max()) for p, q in zip(exact.parameters(), start.parameters(), strict=True))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weights = torch.cat([p.detach().flatten() for p in by_hzo.parameters()])
    first = weights.clone()
    torch.distributed.broadcast(first, 0)
    report = {
        "ranks": ranks,
        "queries": count.queries,
        "to backprop": gap(by_hzo, exact),
        "to rank 0": float((weights - first).abs().max()),
        "moved": moved,
    }
    Path(out, f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
