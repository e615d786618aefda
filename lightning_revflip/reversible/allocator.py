"""Bytes that torch's allocator hands out while something runs."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class AllocatedBytes(NamedTuple):
    """What `allocated_bytes` found.

    Attributes:
        kept: bytes that are still allocated at the end, the result of the call included.
        peak: the largest number of bytes that were allocated at once.
    """

    kept: int
    peak: int


def allocated_bytes(run: Callable[[], object], device_type: str) -> AllocatedBytes:
    """Count the bytes that a call allocates, beyond those that were allocated before.

    What it frees of these is deducted: let a training step start without gradients.

    On a CPU by the profiler's memory events, on CUDA by the allocator's statistics, of which the
    peak is reset.

    Args:
        run: what to call, once.
        device_type: of the allocator, "cpu" or "cuda".

    Raises:
        ValueError: for another device.

    Examples:
        >>> allocated_bytes(lambda: torch.zeros(250), "cpu").peak >= 1000
        True
    """
    gc.collect()
    if device_type == "cuda":
        return _on_cuda(run)
    if device_type != "cpu":
        raise ValueError(f"device_type must be 'cpu' or 'cuda', got {device_type!r}.")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return AllocatedBytes(now, peak)


def _on_cuda(run: Callable[[], object]) -> AllocatedBytes:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del result
    return AllocatedBytes(after - before, peak - before)
