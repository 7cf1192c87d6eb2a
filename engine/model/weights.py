"""A checkpoint's tensors: checked by name and shape against its config, and fused as they are copied."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from tidegate.engine.config import ConfigError
from tidegate.engine.model.config import DTYPES, ModelConfig, read_config
from tidegate.engine.model.decoder import Decoder, DecoderWeights, LayerWeights, P_co
from tidegate.engine.model.files import TensorFiles
from tidegate.engine.model.linear import Projection, projection
from tidegate.engine.model.operations import find_kernels
from tidegate.kernels.cpu.native import NativeKernels

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
LAYER = "model.layers.{}."

_RECOMPUTED = ".rotary_emb.inv_freq"
"""Old checkpoints store it; it follows from the config."""


LinearFor = Callable[[ModelConfig, torch.dtype], Callable[[torch.Tensor, torch.Tensor | None], P_co]]
"""For a model and a dtype, what makes a product of a weight OI and a bias O."""


def load_model(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> Decoder:
    """The checkpoint in ``folder``, ready to run on the CPU. See ``load_weights``."""
    return Decoder(*load_weights(folder, _cpu_linear, dtype, device, progress))


def load_weights(
    folder: Path,
    linear: LinearFor[P_co],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> tuple[ModelConfig, DecoderWeights[P_co]]:
    """What the checkpoint in ``folder`` holds, its products made by ``linear``.

    ``dtype`` ``auto`` is what ``config.json`` says, or else what the weights are stored in. ``progress``
    shows a bar on stderr; None shows it on a terminal only. Raises ``ConfigError``, in one line that names
    the file and the tensor, where something is missing, cut off, misshapen or pickled.
    """
    if isinstance(dtype, str):
        wanted = None if dtype == "auto" else DTYPES[dtype]
    else:
        wanted = dtype
    config = read_config(folder)
    with TensorFiles(folder) as files:
        return config, _load(config, files, linear, wanted, torch.device(device), progress)


def _cpu_linear(
    config: ModelConfig, dtype: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor | None], Projection]:
    found = find_kernels(config, dtype)
    return partial(projection, kernels=found if isinstance(found, NativeKernels) else None)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of ``config`` stores, embedding and LM head both."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key_value = config.num_heads * head_dim, config.num_kv_heads * head_dim
    projections = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key_value, hidden, config.qkv_bias),
        "self_attn.v_proj": (key_value, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        LM_HEAD: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    for layer in range(config.num_layers):
        prefix = LAYER.format(layer)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, (outputs, inputs, bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    return shapes


def _checked_shapes(config: ModelConfig, files: TensorFiles) -> dict[str, tuple[int, ...]]:
    """The tensors to copy; of embedding and LM head only one, where they are tied.

    Raises ``ConfigError`` unless every one is stored in its shape, and nothing else.
    """
    shapes = _shapes(config)
    for name, file in files.file_of.items():
        # Run without it, the model would say something else than it was trained to.
        if name not in shapes and not name.endswith(_RECOMPUTED):
            raise ConfigError(f"{file}: tensor {name} has no place in the model that config.json describes")
    both_stored = EMBEDDING in files and LM_HEAD in files
    if config.tie_embeddings and not both_stored:
        # Either of the two may be the one that was stored.
        shapes.pop(EMBEDDING if LM_HEAD in files else LM_HEAD)
    for name, shape in shapes.items():
        files.check(name, shape)
    # Stored both and different, they show that the config is wrong to tie them: transformers unties them.
    if config.tie_embeddings and both_stored and torch.equal(files.tensor(EMBEDDING), files.tensor(LM_HEAD)):
        shapes.pop(LM_HEAD)
    return shapes


def _load(
    config: ModelConfig,
    files: TensorFiles,
    linear: LinearFor[P_co],
    dtype: torch.dtype | None,
    device: torch.device,
    progress: bool | None,
) -> DecoderWeights[P_co]:
    """Check every tensor before the first is copied, then copy each straight to its place."""
    shapes = _checked_shapes(config, files)
    embedding = EMBEDDING if EMBEDDING in shapes else LM_HEAD
    tied = not (EMBEDDING in shapes and LM_HEAD in shapes)
    dtype = dtype or config.dtype or files.tensor(embedding).dtype

    make = linear(config, dtype)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    with tqdm(
        desc="loading weights",
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress is None else not progress,
    ) as bar:

        def stack(*names: str) -> torch.Tensor:
            rows = [shapes[name][0] for name in names]
            stacked = torch.empty((sum(rows), *shapes[names[0]][1:]), dtype=dtype, device=device)
            for name, place in zip(names, torch.split(stacked, rows), strict=True):
                place.copy_(files.tensor(name))
                bar.update(place.nbytes)
            return stacked

        def product(prefix: str, *names: str) -> P_co:
            weight = stack(*(f"{prefix}{name}.weight" for name in names))
            biases = [f"{prefix}{name}.bias" for name in names]
            return make(weight, stack(*biases) if biases[0] in shapes else None)

        def layer_weights(prefix: str) -> LayerWeights[P_co]:
            return LayerWeights(
                attention_norm=stack(prefix + "input_layernorm.weight"),
                qkv=product(prefix + "self_attn.", "q_proj", "k_proj", "v_proj"),
                o=product(prefix + "self_attn.", "o_proj"),
                mlp_norm=stack(prefix + "post_attention_layernorm.weight"),
                gate_up=product(prefix + "mlp.", "gate_proj", "up_proj"),
                down=product(prefix + "mlp.", "down_proj"),
            )

        embedding_VM = stack(embedding)
        return DecoderWeights(
            embedding=embedding_VM,
            layers=[layer_weights(LAYER.format(layer)) for layer in range(config.num_layers)],
            norm=stack(FINAL_NORM),
            lm_head=make(embedding_VM, None) if tied else product("", "lm_head"),
        )
