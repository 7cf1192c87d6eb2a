"""What a checkpoint's ``config.json`` says, as the one description that the decoder is built from.

Read without transformers: importing its configuration classes would cost most of the start of a small
model. Keys mean what they mean there; what the decoder does not do is refused by the name of its key.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec
import torch

from tidegate.engine.config import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_Positive = Annotated[int, msgspec.Meta(gt=0)]
_PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
_Scale = Annotated[float, msgspec.Meta(ge=1)]
_Struct = TypeVar("_Struct")


class DefaultRope(msgspec.Struct, frozen=True, kw_only=True, tag_field="rope_type", tag="default"):
    """Rotary position embedding as first published."""

    rope_theta: _PositiveFloat = 10_000.0


class LinearRope(DefaultRope, frozen=True, kw_only=True, tag="linear"):
    """Positions divided by ``factor``."""

    factor: _Scale


class DynamicRope(DefaultRope, frozen=True, kw_only=True, tag="dynamic"):
    """A base that grows with the sequence, from ``max_position_embeddings`` on."""

    factor: _Scale


class Llama3Rope(DefaultRope, frozen=True, kw_only=True, tag="llama3"):
    """Long waves stretched by ``factor``, short ones kept, those between blended."""

    factor: _Scale
    low_freq_factor: _PositiveFloat
    high_freq_factor: _PositiveFloat
    original_max_position_embeddings: _Positive


class YarnRope(DefaultRope, frozen=True, kw_only=True, tag="yarn"):
    """Waves that seldom turn within the original length interpolated, and attention made sharper."""

    factor: _Scale
    original_max_position_embeddings: _Positive
    attention_factor: _PositiveFloat | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


RopeConfig = DefaultRope | LinearRope | DynamicRope | Llama3Rope | YarnRope


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One Llama-shaped decoder. Sizes are in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rms_eps: float
    tie_embeddings: bool
    rope: RopeConfig
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    """Of each layer: the positions that a query sees, its own included; None: all before it."""
    dtype: torch.dtype | None
    """What the weights are meant to be computed in; None: the file does not say."""
    eos_token_ids: tuple[int, ...]
    """Any of these ends a generation."""

    @property
    def max_position(self) -> int:
        """Tokens of the longest sequence that the checkpoint is made for.

        Linear scaling stretches ``max_position_embeddings``, and yarn the original length. With llama3 the
        file gives the stretched length already. ``dynamic`` stops at the original length: beyond it the
        frequencies would depend on the length of the sequence, and cached keys on the moment of caching.
        """
        match self.rope:
            case LinearRope(factor=factor):
                return int(self.max_position_embeddings * factor)
            case YarnRope(factor=factor, original_max_position_embeddings=original):
                return max(int(original * factor), self.max_position_embeddings)
            case _:
                return self.max_position_embeddings

    def sequence_limit(self, requested: int | None) -> int:
        """``max_model_len`` as asked for, or the checkpoint's own. Raises ``ConfigError`` if too long."""
        if requested is None or requested <= self.max_position:
            return requested or self.max_position
        why = f"max_model_len {requested} is more than the {self.max_position} tokens of this checkpoint"
        if isinstance(self.rope, DynamicRope):
            why += " (rope_type dynamic is served up to max_position_embeddings, where it scales nothing)"
        raise ConfigError(f"{why}; ask for {self.max_position} or less")


class _Header(msgspec.Struct, frozen=True):
    """Read first: a file of another architecture need not have the other keys."""

    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class _ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of ``config.json``, with the defaults that transformers gives to all architectures."""

    vocab_size: _Positive
    hidden_size: _Positive
    intermediate_size: _Positive
    num_hidden_layers: _Positive
    num_attention_heads: _Positive
    max_position_embeddings: _Positive
    num_key_value_heads: _Positive | None = None
    head_dim: _Positive | None = None
    hidden_act: str = "silu"
    rms_norm_eps: _PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Annotated[int, msgspec.Meta(ge=2)] | None = 4096
    """Of Mistral and Qwen2. A window of one position would leave nothing to attend to but itself."""
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    eos_token_id: int | list[int] | None = None


class _GenerationFile(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(folder: Path) -> ModelConfig:
    """The description of the checkpoint in ``folder``.

    Raises ``ConfigError``, in one line that names the file and the key, where the file is missing or
    broken or asks for what the decoder does not do.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a checkpoint holds config.json and safetensors files")
    content = path.read_bytes()
    architecture = _architecture(path, _decode(path, content, _Header))
    file = _decode(path, content, _ConfigFile)
    if file.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"{path}: hidden_act {file.hidden_act!r} is not supported; supported is 'silu'")
    llama, qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"

    head_dim = file.head_dim
    if head_dim is None:
        if file.hidden_size % file.num_attention_heads:
            raise ConfigError(
                f"{path}: hidden_size {file.hidden_size} is not a multiple of num_attention_heads "
                f"{file.num_attention_heads}, and head_dim is not given"
            )
        head_dim = file.hidden_size // file.num_attention_heads
    if head_dim % 2:
        raise ConfigError(f"{path}: head_dim {head_dim} is odd; rotary embedding turns pairs")
    num_kv_heads = file.num_key_value_heads or file.num_attention_heads
    if file.num_attention_heads % num_kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads {file.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    return ModelConfig(
        architecture=architecture,
        vocab_size=file.vocab_size,
        hidden_size=file.hidden_size,
        num_layers=file.num_hidden_layers,
        num_heads=file.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=file.intermediate_size,
        qkv_bias=qwen2 or (llama and file.attention_bias),
        o_bias=llama and file.attention_bias,
        mlp_bias=llama and file.mlp_bias,
        rms_eps=file.rms_norm_eps,
        tie_embeddings=file.tie_word_embeddings,
        rope=_rope(path, file),
        max_position_embeddings=file.max_position_embeddings,
        windows=_windows(path, file, architecture),
        dtype=_dtype(path, file),
        eos_token_ids=_eos_token_ids(folder, file),
    )


def _decode(path: Path, content: bytes, into: type[_Struct]) -> _Struct:
    try:
        return msgspec.json.decode(content, type=into)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def _architecture(path: Path, header: _Header) -> str:
    if header.architectures:
        key, given, architecture = "architectures", header.architectures[0], header.architectures[0]
    elif header.model_type is not None:
        key, given, architecture = "model_type", header.model_type, _ARCHITECTURES.get(header.model_type, "")
    else:
        raise ConfigError(f"{path}: architectures and model_type are missing; one must say what model it is")
    supported = _ARCHITECTURES.values()
    if architecture not in supported:
        raise ConfigError(f"{path}: {key} {given!r} is not supported; supported are {', '.join(supported)}")
    if header.quantization_config is not None:
        method = header.quantization_config.get("quant_method", "unknown")
        raise ConfigError(
            f"{path}: quantization_config ({method}) is not supported; use a checkpoint in bf16, fp16 or fp32"
        )
    return architecture


def _windows(path: Path, file: _ConfigFile, architecture: str) -> tuple[int | None, ...]:
    """As transformers reads the keys: Mistral has a window in all layers or none, Qwen2 in some of them."""
    count, window = file.num_hidden_layers, file.sliding_window
    if architecture == "LlamaForCausalLM":
        return (None,) * count
    if architecture == "MistralForCausalLM":
        if file.layer_types is not None:
            raise ConfigError(f"{path}: layer_types is not supported for MistralForCausalLM; leave it out")
        return (window,) * count
    if file.layer_types is None:
        if not file.use_sliding_window:
            window = None
        return tuple(window if layer >= file.max_window_layers else None for layer in range(count))
    for layer_type in file.layer_types:
        if layer_type not in _LAYER_TYPES:
            raise ConfigError(
                f"{path}: layer_types {layer_type!r} is not supported; "
                f"supported are {', '.join(_LAYER_TYPES)}"
            )
    if len(file.layer_types) != count:
        raise ConfigError(
            f"{path}: layer_types names {len(file.layer_types)} layers and num_hidden_layers is {count}"
        )
    if "sliding_attention" in file.layer_types and not (file.use_sliding_window and window):
        raise ConfigError(
            f"{path}: layer_types has 'sliding_attention' without a window: set use_sliding_window and "
            "sliding_window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in file.layer_types)


def _rope(path: Path, file: _ConfigFile) -> RopeConfig:
    """Both spellings: ``rope_parameters``, and ``rope_scaling`` beside ``rope_theta``, which goes first."""
    spelling = "rope_scaling" if file.rope_scaling else "rope_parameters"
    given = dict(file.rope_scaling or file.rope_parameters or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise ConfigError(f"{path}: {spelling} for each layer type is not supported; give one for all layers")
    rope_type = given.setdefault("rope_type", given.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"{path}: {spelling}.rope_type {rope_type!r} is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    if given.get("partial_rotary_factor", file.partial_rotary_factor) not in (None, 1, 1.0):
        raise ConfigError(f"{path}: partial_rotary_factor is not supported; whole heads are rotated")
    if file.rope_theta is not None:
        given.setdefault("rope_theta", file.rope_theta)
    if rope_type in ("llama3", "yarn"):
        if file.original_max_position_embeddings is not None:
            given["original_max_position_embeddings"] = file.original_max_position_embeddings
        given.setdefault("original_max_position_embeddings", file.max_position_embeddings)
        if rope_type == "yarn" and given.get("factor") is None:
            given["factor"] = file.max_position_embeddings / given["original_max_position_embeddings"]
    stated = {key: value for key, value in given.items() if value is not None}
    try:
        return cast("RopeConfig", msgspec.convert(stated, RopeConfig))  # a union is no type to mypy
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {spelling}: {error}") from None


def _dtype(path: Path, file: _ConfigFile) -> torch.dtype | None:
    key, name = ("dtype", file.dtype) if file.dtype is not None else ("torch_dtype", file.torch_dtype)
    if name is None:
        return None
    dtype = DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise ConfigError(f"{path}: {key} {name!r} is not supported; supported are {', '.join(DTYPES)}")
    return dtype


def _eos_token_ids(folder: Path, file: _ConfigFile) -> tuple[int, ...]:
    """``generation_config.json`` goes first, as in transformers; without it ``config.json``."""
    path = folder / "generation_config.json"
    eos = _decode(path, path.read_bytes(), _GenerationFile).eos_token_id if path.is_file() else None
    if eos is None:
        eos = file.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(dict.fromkeys(eos))
