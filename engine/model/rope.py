"""Rotary position embedding, in the order of operations of transformers, so that fp32 agrees with it.

Legend: T packed tokens, H heads (query and key heads together), D head size, F = D/2 frequencies,
L positions.
"""

import math

import torch

from tidegate.engine.model.config import LinearRope, Llama3Rope, RopeConfig, YarnRope

_FIRST_POSITIONS = 1024
"""A table of angles starts with so many, and doubles as sequences grow beyond it."""


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians a position for each pair of a head (F, fp32), and the factor on cosine and sine.

    ``dynamic`` gives the unscaled frequencies: those of every sequence up to the original length, and
    longer ones are refused where ``max_model_len`` is set.
    """
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths_F = rope.rope_theta**exponents_F
    unscaled_F = 1.0 / wavelengths_F
    match rope:
        case LinearRope():
            return unscaled_F / rope.factor, 1.0
        case Llama3Rope():
            return _llama3(unscaled_F, rope), 1.0
        case YarnRope():
            return _yarn(wavelengths_F, rope, head_dim), _yarn_attention_factor(rope)
        case _:
            return unscaled_F, 1.0


def _llama3(unscaled_F: torch.Tensor, rope: Llama3Rope) -> torch.Tensor:
    """Stretch long waves by ``factor``, keep short ones, and blend between the two."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    original_length = rope.original_max_position_embeddings
    wavelength_F = 2 * math.pi / unscaled_F
    blend_F = (original_length / wavelength_F - low) / (high - low)
    blended_F = (1 - blend_F) * unscaled_F / rope.factor + blend_F * unscaled_F
    long_F = wavelength_F > original_length / low
    short_F = wavelength_F < original_length / high
    return torch.where(long_F, unscaled_F / rope.factor, torch.where(short_F, unscaled_F, blended_F))


def _yarn(wavelengths_F: torch.Tensor, rope: YarnRope, head_dim: int) -> torch.Tensor:
    """Interpolate pairs that turn seldom within the original length, keep those that turn often."""

    def pair_that_turns(times: float) -> float:
        ratio = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast or 32), pair_that_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp between them divides by their distance

    ramp_F = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep_F = 1 - ramp_F
    return 1.0 / (rope.factor * wavelengths_F) * (1 - keep_F) + 1.0 / wavelengths_F * keep_F


def _yarn_attention_factor(rope: YarnRope) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


class Rotary:
    """Turns the pairs of query and key heads by their positions."""

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        inv_freq_F, self._scale = inverse_frequencies(rope, head_dim)
        self._inv_freq_F = inv_freq_F.to(device)
        self._dtype = dtype
        self._table_L2F = torch.empty((0, 2, len(inv_freq_F)), device=device)

    def angles(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for one step, both T1D in the model's dtype, to be used by every layer.

        The sine's first half is negated, so that ``rotate`` need not negate half of every head.
        """
        angles_TF = positions_T[:, None].float() * self._inv_freq_F
        cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
        if self._scale != 1.0:
            cos_TF, sin_TF = cos_TF * self._scale, sin_TF * self._scale
        cos_TD = torch.cat((cos_TF, cos_TF), dim=-1).to(self._dtype)
        sin_TD = torch.cat((-sin_TF, sin_TF), dim=-1).to(self._dtype)
        return cos_TD[:, None], sin_TD[:, None]

    def table(self, num_positions: int) -> torch.Tensor:
        """Cosine and sine of the positions from 0 on, in fp32; L2F with L at least ``num_positions``."""
        known = len(self._table_L2F)
        if known < num_positions:
            positions_L = torch.arange(max(num_positions, 2 * known, _FIRST_POSITIONS))
            angles_LF = positions_L[:, None].float() * self._inv_freq_F
            self._table_L2F = torch.stack((angles_LF.cos(), angles_LF.sin()), dim=1) * self._scale
        return self._table_L2F


def rotate(heads_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """A pair is an element of a head's first half and the same element of its second half."""
    first_THF, second_THF = heads_THD.chunk(2, dim=-1)
    swapped_THD = torch.cat((second_THF, first_THF), dim=-1)
    return torch.addcmul(heads_THD * cos_T1D, swapped_THD, sin_T1D)
