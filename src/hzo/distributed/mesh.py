"""One gradient by many processes: samples and queries divided over the dimensions of a ``DeviceMesh``.

Every process runs the same calls. What can fail runs between exchanges, and every exchange begins with one number a
process, by which all learn that one has failed, or is somewhere else than the others: nobody waits longer than a limit
in time for a process that does not come.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from hashlib import sha256
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hzo._options import positive
from hzo.distributed.wrappers import kind_of_wrapper, mean_over, refuse_wrappers
from hzo.errors import DistributedError, HzoError, InputError

SAMPLE, QUERY = "sample", "query"

LeafGradients = Sequence[tuple[Tensor, Tensor]]


class Shares:
    """What of one gradient is this process's: the samples that it was given, and every k-th query.

    Args:
        mesh: a ``torch.distributed.DeviceMesh`` with a dimension ``"sample"``, ``"query"``, or both.
        timeout: seconds that this process waits for another.

    Raises:
        InputError: another kind of mesh.
    """

    def __init__(self, mesh: Any, timeout: float) -> None:
        names = getattr(mesh, "mesh_dim_names", None)
        if not names or not set(names) <= {SAMPLE, QUERY} or len(set(names)) != len(names):
            raise InputError(
                'expected mesh to be a torch.distributed.DeviceMesh with dimensions named "sample" and "query" (one of '
                'them or both): init_device_mesh("cpu", (2, 2), mesh_dim_names=("sample", "query")); got '
                f"{type(mesh).__name__} with {names}"
            )
        if mesh.get_coordinate() is None:
            raise InputError("this process has no place in the mesh; call with a mesh that it is part of")
        self._groups = {name: mesh.get_group(name) for name in names if mesh.size(names.index(name)) > 1}
        self._device = torch.device("cpu" if mesh.device_type == "cpu" else mesh.device_type)
        self._timeout = positive("timeout in seconds", timeout)
        self._at = ""
        self._exchanges = 0
        self._met: set[str] = set()  # dimensions along which nobody waits for this process any more
        self.words = self.exchanges = 0  # sent by this process: numbers, without what is compared; and how often

    def size(self, dimension: str) -> int:
        """How many processes there are along a dimension."""
        group = self._groups.get(dimension)
        return 1 if group is None else torch.distributed.get_world_size(group)

    def rank(self, dimension: str) -> int:
        """Which of them this one is."""
        group = self._groups.get(dimension)
        return 0 if group is None else torch.distributed.get_rank(group)

    def part(self, count: int) -> tuple[int, int]:
        """The queries of this process: [first, stop) of ``count``."""
        rank, size = self.rank(QUERY), self.size(QUERY)
        return rank * count // size, (rank + 1) * count // size

    # -- exchanges of the query dimension ---

    def sum_(self, tensor: Tensor, where: str) -> None:
        """Add up what the processes have of a tensor, in place; equal to the bit on all of them."""
        if QUERY in self._groups:
            self.meet(QUERY, where)
            self._wait(torch.distributed.all_reduce, tensor, group=self._groups[QUERY])

    def joined(self, parts: Sequence[Tensor], count: int, where: str) -> list[Tensor]:
        """Tensors of ``count`` rows from those that the processes have ([first, stop) of ``part``), in order."""
        size = self.size(QUERY)
        if size == 1:
            return list(parts)
        self.meet(QUERY, where)
        longest, found = -(-count // size), []
        cuts = [(k + 1) * count // size - k * count // size for k in range(size)]
        for part in parts:
            padded = part.new_zeros((longest, *part.shape[1:]))
            padded[: len(part)] = part
            pieces = [torch.empty_like(padded) for _ in range(size)]
            self._wait(torch.distributed.all_gather, pieces, padded, group=self._groups[QUERY])
            found.append(torch.cat([piece[:rows] for piece, rows in zip(pieces, cuts, strict=True)]))
        return found

    def least(self, number: int, where: str) -> int:
        """The least of the processes' numbers along the query dimension."""
        if QUERY not in self._groups:
            return number
        self.meet(QUERY, where)
        found = torch.tensor(number, device=self._device)
        least = torch.distributed.ReduceOp.MIN
        self._wait(torch.distributed.all_reduce, found, op=least, group=self._groups[QUERY])
        return int(found)

    def link(self, words: int) -> tuple[float, float] | None:
        """Seconds that an exchange takes, and words that are added up in a second, as the slowest process sees them.

        Every process must call this. Cost: some ten exchanges, three of them of ``words`` words (at most 2^22). None
        where there is one process.
        """
        if not self._groups:
            return None
        group = self._groups.get(QUERY) or self._groups[SAMPLE]
        few, many = torch.zeros(3, device=self._device), torch.zeros(min(max(words, 1), 2**22), device=self._device)

        def took(tensor: Tensor, times: int) -> float:
            self._wait(torch.distributed.all_reduce, tensor, group=group)  # the first one may set up connections
            began = perf_counter()
            for _ in range(times):
                self._wait(torch.distributed.all_reduce, tensor, group=group)
            float(tensor[0])  # a device may still be at it
            return (perf_counter() - began) / times

        latency = took(few, 5)
        rest = max(took(many, 2) - latency, 1e-9)
        latency, each = (max(seen) for seen in zip(*self.told_by_all((latency, rest / len(many))), strict=True))
        return latency, 1 / each

    # -- before and after ---

    def agree(self, said: dict[str, tuple[str | None, str]], samples: int) -> float:
        """Compare what processes are about to do; returns the weight of this one's samples.

        Args:
            said: by what it is, a digest that all processes must have in common, and one that those must who share
                samples (the query dimension); None where it may differ.

        Raises:
            DistributedError: on all processes, naming what differs and on which.
        """
        everybody = self._gathered((said, samples))
        mine = self.rank(SAMPLE)
        for what in said:
            alike = {row[q][0][what][0] for row in everybody for q in range(len(row))}
            if len(alike) > 1:
                raise DistributedError(self._differs(what, [[one[0][what][0] for one in row] for row in everybody]))
            for s, row in enumerate(everybody):
                if len({one[0][what][1] for one in row}) > 1:
                    raise DistributedError(self._differs(what, [[one[0][what][1] for one in row]], s))
        counts = [row[0][1] for row in everybody]
        return counts[mine] * len(counts) / sum(counts) if sum(counts) else 1.0

    def _differs(self, what: str, digests: Sequence[Sequence[Any]], row: int | None = None) -> str:
        first, places = digests[0][0], []
        for s, of_row in enumerate(digests):
            places += [f"({s if row is None else row}, {q})" for q, d in enumerate(of_row) if d != first]
        where = "the query dimension" if row is not None else "the mesh"
        return (
            f"processes disagree about {what}: along {where} those at (sample, query) = {', '.join(places)} differ "
            f"from ({0 if row is None else row}, 0), and nothing was computed. Give all the same {what}"
            + (" (torch.manual_seed)" if "random" in what else "")
        )

    def meet(self, dimension: str, where: str, failure: BaseException | None = None) -> None:
        """All processes along a dimension are here, and none has failed.

        Raises:
            DistributedError: one has, elsewhere; one is somewhere else in the computation, or does not answer.
        """
        group = self._groups.get(dimension)
        if group is None:
            return
        self._at, self._exchanges = where, self._exchanges + 1
        place = int.from_bytes(sha256(f"{where} {self._exchanges}".encode()).digest()[:7], "big")
        failed = failure is not None
        about = torch.tensor([int(failed), -(2**62) if failed else place, -(2**62) if failed else -place])
        about = about.to(self._device)
        self._wait(torch.distributed.all_reduce, about, op=torch.distributed.ReduceOp.MAX, group=group)
        any_failed, highest, lowest = about.tolist()
        if any_failed:
            self._met.add(dimension)
            messages = self._objects(None if failure is None else _said(failure), group)
            if failure is None:
                told = [f"{k} ({m})" for k, m in enumerate(messages) if m is not None]
                raise DistributedError(
                    f"another process failed, number {', '.join(told)} along the {dimension} dimension; nothing was "
                    "changed here"
                )
        elif highest != -lowest:
            raise DistributedError(
                f"processes along the {dimension} dimension are at different places of the computation (this one at: "
                f"{where}); they must call with the same model, plan and options, in the same order"
            )

    def fail(self, error: BaseException) -> None:
        """Tell all others that this process goes no further. Called once, where a gradient ends by an error."""
        if isinstance(error, LostError):
            return
        for dimension in (QUERY, SAMPLE):
            if dimension not in self._met:
                self.meet(dimension, self._at, error)

    def finish(
        self,
        model: nn.Module | None,
        gradients: LeafGradients,
        loss: Tensor,
        weight: float,
        beside: Iterable[Tensor] = (),
    ) -> tuple[LeafGradients, Tensor]:
        """Gradients and loss of all samples, equal to the bit on all processes.

        Args:
            weight: of this process's samples; of a mean of 1. beside: parameters that all processes have beside the
                model's, as those of a loss.
        """
        for dimension in (QUERY, SAMPLE):
            self.meet(dimension, "the end of the queries")
            self._met.add(dimension)
        gradients = self._alike(gradients)
        group = self._groups.get(SAMPLE)
        if group is None:
            return gradients, loss
        parameters = [*(() if model is None else model.parameters()), *beside]
        loss = loss * weight
        self._wait(torch.distributed.all_reduce, loss, group=group)

        def add_up(tensor: Tensor) -> None:
            self._wait(torch.distributed.all_reduce, tensor, group=group)

        return mean_over(group, parameters, gradients, weight, add_up), loss / torch.distributed.get_world_size(group)

    def _alike(self, gradients: LeafGradients) -> LeafGradients:
        """Those of the first along the query dimension where they differ, as by a part that is noisy."""
        group = self._groups.get(QUERY)
        if group is None:
            return gradients
        sums = self._objects(digest([g for _, g in gradients]), group)
        if len(set(sums)) == 1:
            return gradients
        result = []
        for leaf, g in gradients:
            first = g.contiguous().clone()
            self._wait(torch.distributed.broadcast, first, group=group, group_src=0)
            result.append((leaf, first))
        return result

    # -- how they talk ---

    def told_by_all(self, value: Any) -> list[Any]:
        """What every process of the mesh says, those of one query dimension behind each other."""
        return [one for row in self._gathered(value) for one in row]

    def _gathered(self, value: Any) -> list[list[Any]]:
        """What every process of the mesh says: a list along the sample dimension of lists along the query dimension."""
        row = self._objects(value, self._groups[QUERY]) if QUERY in self._groups else [value]
        return self._objects(row, self._groups[SAMPLE]) if SAMPLE in self._groups else [row]

    def _objects(self, value: Any, group: Any) -> list[Any]:
        """What every process of a group says."""
        written = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._device)
        ranks = torch.distributed.get_world_size(group)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(ranks)]
        self._wait(torch.distributed.all_gather, sizes, torch.tensor([len(written)], device=self._device), group=group)
        padded = written.new_zeros(max(map(int, sizes)))
        padded[: len(written)] = written
        found = [torch.empty_like(padded) for _ in range(ranks)]
        self._wait(torch.distributed.all_gather, found, padded, group=group)
        return [pickle.loads(bytes(t[: int(n)].tolist())) for t, n in zip(found, sizes, strict=True)]

    def _wait(self, exchange: Callable[..., Any], *tensors: Any, group: Any, **options: Any) -> None:
        """Run an exchange, and wait for the others no longer than the limit."""
        self.exchanges += 1
        self.words += sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
        try:
            exchange(*tensors, group=group, async_op=True, **options).wait(timedelta(seconds=self._timeout))
        except HzoError:
            raise
        except RuntimeError as error:  # torch.distributed's own errors are of this kind
            what = str(error).splitlines()[0].rsplit("] ", 1)[-1][:120]
            raise LostError(
                f"another process was lost, hangs or cannot be reached (at {self._at}: {what}); nothing was changed "
                f"here. This one waits {self._timeout:g} seconds for others: timeout= sets how long"
            ) from error


class LostError(DistributedError):
    """Another process does not answer any more: there is nobody to be told of it."""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


_current: ContextVar[Shares | None] = ContextVar("shares", default=None)


def shares() -> Shares | None:
    """Which share of the queries is this process's; None where it asks them all."""
    found = _current.get()
    return found if found is not None and found.size(QUERY) > 1 else None


@contextmanager
def shared(mesh: Any, module: Any, x: Any, y: Any, plan: str, timeout: float) -> Iterator[tuple[Shares, float]]:
    """Inside, queries are divided over the mesh; yields the shares and the weight of this process's samples.

    Where the block raises, all processes raise; so they do, before anything is computed, where they disagree about
    parameters, plan, batch or random state.

    Raises:
        DistributedError: they disagree, another process failed, or was lost. InputError: not such a mesh.
    """
    here = Shares(mesh, timeout)
    failure: Exception | None = None
    said: dict[str, tuple[str | None, str]] = {}
    samples = 0
    try:
        refuse_wrappers(module)
        if isinstance(module, nn.Module) and kind_of_wrapper(module):
            raise DistributedError(
                f"the model is wrapped in {kind_of_wrapper(module)}, and mesh= averages, too; give one of them: the "
                "model itself with mesh=, or the wrapped one without"
            )
        said, samples = _about(module, x, y, plan)
    except Exception as error:  # of whatever kind: the others must hear of it
        failure = error
    here._at = "the beginning"
    failed = [one for row in here._gathered(None if failure is None else _said(failure)) for one in row if one]
    if failure is not None:
        raise failure
    if failed:
        raise DistributedError(f"another process failed before anything was computed: {failed[0]}")
    weight = here.agree(said, samples)
    token = _current.set(here)
    try:
        yield here, weight
    except BaseException as error:
        if isinstance(error, Exception):
            here.fail(error)
        raise
    finally:
        _current.reset(token)


def _about(module: Any, x: Any, y: Any, plan: str) -> tuple[dict[str, tuple[str | None, str]], int]:
    """What processes must agree about, and the number of samples here."""
    tensors = [t for t in pytree.tree_leaves((x, y)) if isinstance(t, Tensor)]
    if not tensors or tensors[0].dim() == 0 or tensors[0].shape[0] == 0:
        raise InputError("this process has no samples; give every process some, or a mesh with fewer processes")
    named = [] if module is None else [*module.named_parameters()]
    modes = "" if module is None else "".join(str(int(m.training)) for m in module.modules())
    forms = [(tuple(t.shape[1:]), str(t.dtype), t.requires_grad) for t in tensors]
    buffers = [] if module is None else [*module.buffers()]
    random = digest([torch.get_rng_state()])
    return {
        "parameters": (digest([p for _, p in named]), ""),
        "names of parameters, or which are trained": (_hash(repr([(n, p.requires_grad) for n, p in named])), ""),
        "plan and options": (_hash(plan, modes), ""),
        "what the model is made of": (_hash("" if module is None else code_of(module)), ""),
        "shape of a sample": (_hash(repr(forms)), ""),
        "batch": (None, digest(tensors)),
        "buffers": (None, digest(buffers)),
        "random state": (None, random),
    }, int(tensors[0].shape[0])


def code_of(f: Any) -> str:
    """What can be told of a callable in all processes alike: classes of modules, or the code of a function."""
    if isinstance(f, nn.Module):
        return " ".join(f"{type(m).__module__}.{type(m).__qualname__}" for m in f.modules())
    name, code = getattr(f, "__qualname__", type(f).__qualname__), getattr(f, "__code__", None)
    if code is None:
        return str(name)
    constants = [c for c in code.co_consts if isinstance(c, (int, float, str))]
    return f"{name} {code.co_code.hex()} {code.co_names} {constants}"


def _hash(*texts: str) -> str:
    return sha256("\n".join(texts).encode()).hexdigest()


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> str:
    """A checksum of tensors, bits and order; of large ones where they are, by weighted sums of their words."""
    found = []
    for t in tensors:
        dense = t.detach().contiguous() if t.layout == torch.strided else t.detach().to_dense().contiguous()
        words = torch.view_as_real(dense) if dense.is_complex() else dense
        flat = words.reshape(-1).view(torch.uint8) if words.numel() else words.reshape(-1).to(torch.uint8)
        rest = len(flat) % 8
        head = flat[: len(flat) - rest].view(torch.int64)
        weights = torch.arange(1, len(head) + 1, device=head.device) * 0x9E3779B1 | 1
        total = int((head * weights).sum()) if len(head) else 0
        found.append((tuple(t.shape), str(t.dtype), total, flat[len(flat) - rest :].tolist()))
    return _hash(repr(found))
