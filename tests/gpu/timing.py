"""Time on a CUDA device, and the device's own ceilings to compare with."""

from collections.abc import Callable
from functools import cache

import torch


def seconds(launches: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median time of one launch. They are captured into one graph and replayed, so that no gap between
    launches counts; let them touch different data, more than the L2 cache holds in all.
    """
    launches = launches * max(1, 16 // len(launches))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(launches))
    return sorted(times)[repeats // 2]


@cache
def copy_bandwidth() -> float:
    """Bytes a second read and written by a large copy: the better of the copy engine's and a kernel's."""
    source = torch.empty(2**29, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(seconds([way]) for way in ways)


def matmul_flops() -> float:
    """Floating-point operations a second of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / seconds([lambda: a @ b])
