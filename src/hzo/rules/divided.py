"""Large probes of weights divided among the processes that share queries (``mesh=``): each runs some of the rows.

Rows of an identity, or impulses of single channels, show entries of the weight as they are, so that the result is the
same to the bit whoever asks which rows. What is sent is the weight as measured; what is saved is as many products for
each of its entries as the probe has rows. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hzo.distributed import shares
from hzo.rules.base import Call
from hzo.rules.measured import keeps_some

_WORTH = 2**28  # multiplications: 10 ms of a processor or more, where an exchange of the results takes some


def in_shares(
    call: Call, rows: int, products: int, measure: Callable[[int, int], Tensor], *, of_result: int = 0
) -> Tensor:
    """What a probe shows, some rows by each process that shares the queries of this one; whole if there is none.

    Args:
        rows: how many the probe has. products: multiplications that it takes; few are not worth an exchange.
        measure: from the first row and the one behind the last to what these show.
        of_result: dimension of the result along which the rows lie.
    """
    among = shares() if call.engine.divides else None
    if among is None or rows < among.size("query") or products < _WORTH or call.grad.is_complex():
        return measure(0, rows)
    if keeps_some(call.tape):  # what one process finds to hold still, another may not, and would wait for it
        return measure(0, rows)
    first, stop = among.part(rows)
    own = measure(first, stop).movedim(of_result, 0)
    (found,) = among.joined([own], rows, f"the weights of {call.op.name}, operation {call.op.index}")
    return found.movedim(0, of_result).contiguous()
