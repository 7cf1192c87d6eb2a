"""Models of real shapes with random weights, made on the device: no file, and no time to load one."""

from pathlib import Path

import torch

from tidegate.engine import cuda
from tidegate.engine.build import compose
from tidegate.engine.config import EngineConfig
from tidegate.engine.core import EngineCore
from tidegate.engine.device.streams import Device
from tidegate.engine.model.config import DefaultRope, ModelConfig
from tidegate.engine.model.cuda_decoder import CudaDecoder
from tidegate.engine.model.decoder import DecoderWeights, LayerWeights
from tidegate.engine.model.linear import PlainLinear


def _shape(name: str, num_layers: int, **sizes: int | bool | float) -> ModelConfig:
    return ModelConfig(
        architecture=name,
        num_layers=num_layers,
        windows=(None,) * num_layers,
        o_bias=False,
        mlp_bias=False,
        rms_eps=1e-5,
        rope=DefaultRope(rope_theta=500_000.0),
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
        eos_token_ids=(2,),
        **sizes,  # type: ignore[arg-type]
    )


LLAMA_8B = _shape(
    "Llama-3.1-8B",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    qkv_bias=False,
    tie_embeddings=False,
)
QWEN_1_5B = _shape(
    "Qwen2.5-1.5B",
    vocab_size=151_936,
    hidden_size=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=8960,
    qkv_bias=True,
    tie_embeddings=True,
)
TINY = _shape(
    "tiny",
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    qkv_bias=True,
    tie_embeddings=True,
)
"""For a dry run without a GPU."""


def random_decoder(shape: ModelConfig, device: Device, max_model_len: int = 2048) -> CudaDecoder:
    dtype = shape.dtype if device.torch_device.type == "cuda" else torch.float32
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def random(*sizes: int, scale: float) -> torch.Tensor:
        tensor = torch.empty(sizes, dtype=dtype, device=device.torch_device)
        return tensor.normal_(std=scale, generator=generator)

    def projection(outputs: int, inputs: int, bias: bool) -> PlainLinear:
        weight_OI = random(outputs, inputs, scale=inputs**-0.5)
        bias_O = random(outputs, scale=0.1) if bias else None
        return PlainLinear(weight_OI, bias_O)

    hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    qkv = queries + 2 * shape.num_kv_heads * shape.head_dim
    ones = torch.ones(hidden, dtype=dtype, device=device.torch_device)
    embedding_VM = random(shape.vocab_size, hidden, scale=1.0)
    layers = [
        LayerWeights(
            attention_norm=ones,
            qkv=projection(qkv, hidden, shape.qkv_bias),
            o=projection(hidden, queries, False),
            mlp_norm=ones,
            gate_up=projection(2 * inner, hidden, False),
            down=projection(hidden, inner, False),
        )
        for _ in range(shape.num_layers)
    ]
    if shape.tie_embeddings:
        head = PlainLinear(embedding_VM, None)
    else:
        head = projection(shape.vocab_size, hidden, False)
    return CudaDecoder(shape, DecoderWeights(embedding_VM, layers, ones, head), max_model_len)


def weight_bytes(shape: ModelConfig) -> int:
    """Read in one decode step, in bf16; of the embedding only a few rows are."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.intermediate_size)
    return 2 * (shape.num_layers * layer + shape.hidden_size * shape.vocab_size)


def engine_of(decoder: CudaDecoder, device: Device, **options: object) -> EngineCore:
    config = EngineConfig(
        model=decoder.config.architecture, device="cuda", max_model_len=decoder.max_model_len, **options
    )  # type: ignore[arg-type]
    return compose(config, Path(config.model), cuda.parts_of(config, decoder, device))
