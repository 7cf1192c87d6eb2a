"""Small checkpoints with random weights, in Hugging Face format, as transformers itself writes them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 288
"""Every byte, the special tokens and a few merges."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ARCHITECTURES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 1_000.0, **parameters}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama-tied-multi-head": {"arch": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6},
    "llama-one-kv-head": {"arch": "llama", "num_key_value_heads": 1},
    "llama-head-40": {"arch": "llama", "head_dim": 40},
    "llama-biases": {"arch": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-linear": {"arch": "llama", "rope_parameters": _rope("linear", factor=4.0)},
    "llama-dynamic": {"arch": "llama", "rope_parameters": _rope("dynamic", factor=2.0)},
    "llama-llama3": {
        "arch": "llama",
        "head_dim": 16,
        "rope_parameters": _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    },
    "llama-yarn": {
        "arch": "llama",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=128),
    },
    "qwen2": {"arch": "qwen2"},
    "qwen2-tied-head-40": {"arch": "qwen2", "tie_word_embeddings": True, "head_dim": 40},
    "qwen2-yarn-one-kv-head": {
        "arch": "qwen2",
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=128,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    },
    "mistral-window": {"arch": "mistral", "sliding_window": 21},
    "qwen2-window-of-upper-layers": {
        "arch": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "num_hidden_layers": 4,
    },
    "qwen2-window-of-every-other-layer": {
        "arch": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
}
"""Arguments of ``make_checkpoint``: groups of 1, 3 and 6 query heads a KV head, each rope scaling, biases,
and windows in all layers or some, shorter than the prompts of most tests."""


def make_checkpoint(
    folder: Path,
    arch: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint with a tokenizer and a chat template to ``folder``, and return it.

    ``overrides`` go to the config. The same arguments give the same weights.
    """
    make_config, make_model = _ARCHITECTURES[arch]
    config = make_config(**{**_SHAPE, **overrides})
    model = make_model(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    _tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights of a scale at which attention looks about and logits are far apart.

    The initial ones of transformers are so small that most positions end in a near tie.
    """
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if "norm" in name:
            parameter.mul_(0.1).add_(1.0)
        elif name.endswith("bias"):
            parameter.mul_(0.3)
        elif "embed" in name:
            parameter.mul_(0.5)
        else:
            sharper = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.mul_(sharper / parameter.shape[1] ** 0.5)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CHAT_TEMPLATE, "the tide comes in and the tide goes out"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
