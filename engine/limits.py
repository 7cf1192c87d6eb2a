"""What bounds a step, the queue and the copies of one engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """See ``EngineConfig`` for each."""

    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    park_grace: float
    preemption: str
    block_bytes: int
    write_ahead: float
    """Share of the link's time that may go to writing likely victims to the host before any is preempted."""
