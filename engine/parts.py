"""What each device brings to an engine, and ``build.py`` puts together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tidegate.engine.memory.copies import Transfer
from tidegate.engine.memory.groups import KVGroup
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.memory.sizing import TierSizes
from tidegate.engine.model.config import ModelConfig
from tidegate.engine.step import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceParts:
    model: ModelConfig
    dtype: torch.dtype
    device: str
    layout: BlockLayout
    groups: tuple[KVGroup, ...]
    sizes: TierSizes
    transfer: Transfer
    runner: Runner
    max_step_tokens: int
    """See ``Limits``."""
    host_ready: Callable[[], int]
    """Blocks of the host tier that can be used by now."""
    write_ahead: float
    """See ``Limits``."""
    load_seconds: float
    """Until the weights were where they are computed with."""
    pool_seconds: float
