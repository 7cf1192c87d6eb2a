"""What the kernels need to know of their device. On the CPU the interpreter plays a small Hopper GPU."""

from functools import lru_cache

import torch


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def compute_capability(device: torch.device) -> int:
    """90 for sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (``overlap.py``)."""
    return device.type == "cuda" and compute_capability(device) >= 90
