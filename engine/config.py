"""What an engine is started with: every default in one place, validated once."""

from typing import Literal

import msgspec

Preemption = Literal["auto", "swap", "recompute"]

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "float16", "bfloat16")
PREEMPTIONS = ("auto", "swap", "recompute")
BLOCK_SIZES = (8, 16, 32, 64, 128)


class ConfigError(ValueError):
    """A start that cannot work: the message names the flag or the file and says what to do."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raises ``ConfigError`` that names the field."""

    model: str
    """A folder in Hugging Face format, a hub name, or ``demo`` for the checkpoint in the package."""
    device: str = "auto"
    dtype: str = "auto"
    """``auto``: what the checkpoint says."""
    max_model_len: int | None = None
    """Prompt and output of one sequence. None: what the checkpoint and the device tier allow."""
    block_size: int | None = None
    """Tokens a KV block. None: the device's own choice."""
    device_kv_tokens: int | None = None
    """Size of the device tier. None: from the memory that is free."""
    device_memory_fraction: float = 0.9
    """Of a GPU's memory, what weights, steps and device tier may take together. Nothing on the CPU."""
    host_kv_tokens: int | None = None
    """Size of the host tier. None: twice the device tier, within the memory that is free; 0: no tier."""
    preemption: Preemption = "auto"
    prefix_caching: bool = True
    max_num_seqs: int = 256
    """Sequences in one step."""
    max_step_tokens: int | None = None
    """Tokens computed in one step: decodes first, the rest is prefill. None: the device's own choice."""
    max_waiting: int = 20_000
    """Requests that may wait; one more is refused."""
    park_grace: float = 0.5
    """Seconds without credit after which a sequence's KV leaves the device."""
    tenant_host_share: float = 0.5
    """Share of the host tier that a tenant's parked and leased sequences may hold before they are the first
    to go where it is full."""
    pipeline_depth: int = 2
    """Steps under way at once: 1, or 2 to plan a step while the one before it computes."""

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, str], ...] = (
            ("model", bool(self.model), "name a checkpoint folder, a hub name, or 'demo'"),
            ("device", self.device in DEVICES, f"must be one of {', '.join(DEVICES)}"),
            ("dtype", self.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}"),
            ("max_model_len", self.max_model_len is None or self.max_model_len >= 2, "must be at least 2"),
            (
                "block_size",
                self.block_size is None or self.block_size in BLOCK_SIZES,
                f"must be one of {', '.join(map(str, BLOCK_SIZES))}",
            ),
            (
                "device_kv_tokens",
                self.device_kv_tokens is None or self.device_kv_tokens > 0,
                "must be positive",
            ),
            (
                "device_memory_fraction",
                0 < self.device_memory_fraction <= 1,
                "must be above 0 and at most 1",
            ),
            (
                "host_kv_tokens",
                self.host_kv_tokens is None or self.host_kv_tokens >= 0,
                "must not be negative",
            ),
            ("preemption", self.preemption in PREEMPTIONS, f"must be one of {', '.join(PREEMPTIONS)}"),
            ("max_num_seqs", 1 <= self.max_num_seqs <= 4096, "must be between 1 and 4096"),
            (
                "max_step_tokens",
                self.max_step_tokens is None or self.max_step_tokens >= 1,
                "must be at least 1",
            ),
            ("max_waiting", self.max_waiting >= 1, "must be at least 1"),
            ("park_grace", self.park_grace >= 0, "must not be negative"),
            ("tenant_host_share", 0 <= self.tenant_host_share <= 1, "must be between 0 and 1"),
            ("pipeline_depth", self.pipeline_depth in (1, 2), "must be 1 or 2"),
        )
        for name, holds, text in checks:
            if not holds:
                raise ConfigError(f"{name} {text}; got {getattr(self, name)!r}")
