"""Run by ``mpiexec -n 3 python -m mpi4py.futures``: a gradient over two workers, and that of a serial run."""

import torch
from mpi4py.futures import MPIPoolExecutor

import hzo
from parts import work

if __name__ == "__main__":
    x, found = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5), []
    with MPIPoolExecutor() as executor:
        for options in ({"executor": executor}, {}):
            z = x.clone().requires_grad_()
            hzo.blackbox(work, numpy=True, **options)(z).sum().backward()
            found.append(z.grad)
    print("equal to the bit:", torch.equal(*found))
