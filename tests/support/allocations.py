"""How much memory tensors take, as PyTorch's allocator tells it."""

from torch.profiler import ProfilerActivity, profile


def peak_of(run):
    """Bytes that ``run()`` holds at most, above what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
