"""How much memory tensors take while something runs, as PyTorch's allocator tells it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch.profiler import ProfilerActivity, profile


def peak_of(run: Callable[[], object], ignored: Collection[int] = ()) -> int:
    """The bytes that tensors on the CPU take at most while ``run()`` runs, above what was held before.

    Args:
        ignored: sizes in bytes whose allocations do not count, such as those of gradients that are handed out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes() if abs(event.nbytes()) not in ignored else 0
        peak = max(peak, held)
    return peak
