"""How large the two tiers are where nobody says: from the memory that this process may still take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.memory.groups import FULL_ATTENTION, KVGroup, longest_sequence, most_blocks

DEVICE_SHARE = 0.25
"""Of the memory that is free once the weights are loaded, on the CPU device."""
HOST_SHARE = 0.40
HOST_TO_DEVICE = 2

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class TierSizes:
    """In blocks, of whichever group."""

    device: int
    host: int
    max_model_len: int
    """The longest sequence: what the model allows and the device tier holds."""


def headroom(cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: of the machine, or of its container where that is less."""
    available = int(psutil.virtual_memory().available)
    limit, current = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and current.is_file():
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(current.read_text()))
    return max(0, available)


def size_tiers(
    config: EngineConfig,
    *,
    block_size: int,
    block_bytes: int,
    model_len: int,
    step_tokens: int,
    free: int,
    device_free: int | None = None,
    groups: Sequence[KVGroup] = FULL_ATTENTION,
) -> TierSizes:
    """``model_len`` is what the model allows, or what was asked for; ``step_tokens`` the most of one step;
    ``free`` is ``headroom()``; ``device_free``: bytes for the device tier where it has memory of its own.
    Where the configuration gives a tier in tokens, it is what sequences of so many tokens would take that
    all groups keep.

    Raises ``ConfigError`` where the device tier cannot hold one sequence of ``max_model_len``.
    """
    uncommitted = config.pipeline_depth * step_tokens
    if config.device_kv_tokens is None:
        longest_one = most_blocks(groups, model_len, uncommitted, block_size)
        most = config.max_num_seqs * longest_one + len(groups)
        room = int(free * DEVICE_SHARE) if device_free is None else device_free
        device = min(room // block_bytes, most)
    else:
        device = config.device_kv_tokens // block_size * len(groups)
    if config.host_kv_tokens is None:
        host = min(HOST_TO_DEVICE * device, int(free * HOST_SHARE) // block_bytes)
    else:
        host = config.host_kv_tokens // block_size * len(groups)
    # A block a group more than one sequence needs, so that the longest one never waits for its own tail.
    longest = longest_sequence(groups, device - len(groups), max(model_len, 2), uncommitted, block_size)
    if longest < min(config.max_model_len or 0, model_len) or longest < 2:
        raise ConfigError(
            f"device_kv_tokens: the device tier holds {longest} tokens of one sequence, and a block "
            f"of {block_size} a KV group to spare, less than max_model_len {config.max_model_len or 2}; "
            "raise the one or lower the other"
        )
    return TierSizes(device=device, host=host, max_model_len=min(model_len, longest))
