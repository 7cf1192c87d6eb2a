"""Rotary position embedding against transformers: frequencies to the bit, both spellings of the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tidegate.engine.config import ConfigError
from tidegate.engine.model.config import ModelConfig, read_config
from tidegate.engine.model.rope import Rotary, inverse_frequencies, rotate

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3-near": {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 1.5},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 20.0, "beta_slow": 0.5},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-mscales": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8},
    "yarn-one-mscale": {**YARN, "mscale": 1.2},
    "yarn-unscaled": {**YARN, "factor": 1.0},
    "yarn-short": {**YARN, "original_max_position_embeddings": 16},
}


def config_of(folder: Path, **keys: Any) -> ModelConfig:
    content = {"architectures": ["LlamaForCausalLM"], **SHAPE, **keys}
    (folder / "config.json").write_text(json.dumps(content))
    return read_config(folder)


def reference_of(**keys: Any) -> LlamaConfig:
    return LlamaConfig(**{**SHAPE, **keys})


def expected_frequencies(reference: LlamaConfig) -> tuple[torch.Tensor, float]:
    kind = reference.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(reference)
    return ROPE_INIT_FUNCTIONS[kind](reference)


@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(
    name: str, theta: float, head_dim: int, tmp_path: Path
) -> None:
    parameters = {**SCALINGS[name], "rope_theta": theta}
    config = config_of(tmp_path, head_dim=head_dim, rope_parameters=parameters)
    expected, expected_factor = expected_frequencies(
        reference_of(head_dim=head_dim, rope_parameters=dict(parameters))
    )
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_old_spelling_means_the_same(name: str, tmp_path: Path) -> None:
    """``rope_scaling`` with ``type``, and ``rope_theta`` beside it."""
    new = config_of(tmp_path, rope_parameters={**SCALINGS[name], "rope_theta": 12_345.0})
    scaling = dict(SCALINGS[name])
    scaling["type"] = scaling.pop("rope_type")
    old = config_of(tmp_path, rope_scaling=scaling, rope_theta=12_345.0)
    assert old == new
    assert old.rope.rope_theta == 12_345.0


def test_a_config_without_rope_keys_has_the_default(tmp_path: Path) -> None:
    frequencies, factor = inverse_frequencies(config_of(tmp_path).rope, 64)
    expected, _ = expected_frequencies(reference_of())
    assert torch.equal(frequencies, expected)
    assert factor == 1.0


def test_yarn_takes_its_factor_from_the_lengths(tmp_path: Path) -> None:
    """A factor of null is the ratio of both lengths, as transformers reads it."""
    given = config_of(tmp_path, rope_parameters={**YARN, "factor": 4.0})
    derived = config_of(tmp_path, rope_parameters={**YARN, "factor": None})
    assert derived == given


@pytest.mark.parametrize("name", SCALINGS)
def test_heads_are_turned_as_by_transformers(name: str, tmp_path: Path) -> None:
    """To the last bits: ours adds the two products in one operation."""
    config = config_of(tmp_path, rope_parameters=SCALINGS[name])
    heads_THD = torch.randn(50, 3, config.head_dim, generator=torch.Generator().manual_seed(0))
    positions_T = torch.arange(0, 4000, 80)
    cos, sin = LlamaRotaryEmbedding(reference_of(rope_parameters=dict(SCALINGS[name])))(
        heads_THD, positions_T[None]
    )
    expected_THD, _ = apply_rotary_pos_emb(heads_THD[None], heads_THD[None], cos, sin, unsqueeze_dim=2)
    rotary = Rotary(config.rope, config.head_dim, torch.float32, torch.device("cpu"))
    turned_THD = rotate(heads_THD, *rotary.angles(positions_T))
    torch.testing.assert_close(turned_THD, expected_THD[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "longest"),
    [
        (SCALINGS["default"], 4096),
        (SCALINGS["linear"], 10_240),
        (SCALINGS["dynamic"], 4096),
        (LLAMA3, 4096),
        (YARN, 4096),
        ({**YARN, "original_max_position_embeddings": 4096}, 16_384),
    ],
)
def test_the_longest_sequence_follows_from_the_scaling(
    parameters: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    config = config_of(tmp_path, rope_parameters=parameters)
    assert config.max_position == longest
    assert config.sequence_limit(None) == longest
    assert config.sequence_limit(100) == 100
    with pytest.raises(ConfigError, match=f"max_model_len {longest + 1} is more than the {longest} tokens"):
        config.sequence_limit(longest + 1)


def test_dynamic_scaling_past_the_original_length_is_refused_by_its_name(tmp_path: Path) -> None:
    config = config_of(tmp_path, rope_parameters=SCALINGS["dynamic"])
    with pytest.raises(ConfigError, match="rope_type dynamic is served up to max_position_embeddings"):
        config.sequence_limit(8192)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters.rope_type 'mrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: .* required field `factor`"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, "required field `low_freq_factor`"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, r"Expected `float`.*`\$.factor`"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for each layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
    ],
)
def test_rope_that_is_not_supported_is_refused_by_its_key(
    keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        config_of(tmp_path, **keys)
    assert str(refusal.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(refusal.value)
