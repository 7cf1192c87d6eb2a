"""Reading a checkpoint folder: what is loaded, and in which one line what is wrong with it is said."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from tidegate.engine.checkpoint import resolve
from tidegate.engine.config import ConfigError
from tidegate.engine.demo import checkpoint_path
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.model.config import read_config
from tidegate.engine.model.decoder import Decoder
from tidegate.engine.model.weights import load_model
from tidegate.kernels.attention import AttentionBatch

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("shards"), max_shard_size="100KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def shards(pristine_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine_shards, tmp_path / "sharded")


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    path.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def logits(decoder: Decoder) -> torch.Tensor:
    """Of a short prompt, every row."""
    pool = decoder.layout(8).allocate(1, decoder.device)
    batch = AttentionBatch.build(
        0, [0, 5], [5], torch.zeros(1, 1, dtype=torch.int32), BlockLayout.layer(pool, 0)
    )
    rows = torch.arange(5)
    return decoder.logits(decoder.forward(torch.tensor([7, 3, 250, 9, 9]), rows, pool, [batch], rows))


def refusal(folder: Path) -> str:
    """The one line in which loading is refused."""
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_shards_give_the_same_model_as_one_file(pristine: Path, pristine_shards: Path) -> None:
    assert len(list(pristine_shards.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_model(pristine)), logits(load_model(pristine_shards)))


def test_auto_dtype_is_what_the_config_says(folder: Path) -> None:
    edit_config(folder, dtype="bfloat16")
    assert load_model(folder).dtype == torch.bfloat16
    edit_config(folder, dtype=..., torch_dtype="float16")
    assert load_model(folder).dtype == torch.float16


def test_auto_dtype_is_what_is_stored_where_the_config_is_silent(folder: Path) -> None:
    edit_config(folder, dtype=...)
    assert load_model(folder).dtype == torch.float32
    edit_tensors(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert load_model(folder).dtype == torch.bfloat16


def test_weights_are_converted_to_the_dtype_asked_for(folder: Path) -> None:
    """Stored in bf16 and run in fp32 they give what the rounded fp32 weights give."""
    edit_tensors(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    converted = logits(load_model(folder, "float32"))
    edit_tensors(folder, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items()}))
    assert converted.dtype == torch.float32
    assert torch.equal(converted, logits(load_model(folder, torch.float32)))


def test_layout_follows_the_config(pristine: Path) -> None:
    layout = load_model(pristine).layout(16)
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size) == (3, 2, 8, 16)


@pytest.mark.parametrize("stored", [["model.embed_tokens.weight"], ["lm_head.weight"], None])
def test_tied_embeddings_need_either_of_the_two(stored: list[str] | None, folder: Path) -> None:
    """One is enough, whichever; both are fine where they are equal."""
    both = ["model.embed_tokens.weight", "lm_head.weight"]

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(folder, tie)
    expected = logits(load_model(folder))
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in both if name not in (stored or both)])
    assert torch.equal(logits(load_model(folder)), expected)


def test_a_head_that_differs_from_the_embedding_is_not_tied_to_it(folder: Path) -> None:
    """The config is wrong then; transformers keeps both, and so do we."""
    expected = logits(load_model(folder))
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(load_model(folder)), expected)


def test_frequencies_stored_by_old_checkpoints_are_passed_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert logits(load_model(folder)).isfinite().all()


def test_progress_is_shown_on_stderr_when_asked_for(
    pristine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(pristine)
    assert capfd.readouterr() == ("", "")
    load_model(pristine, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "loading weights" in shown.err
    assert "100%" in shown.err


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6, 5]}, 2, (5, 6)),
        ({"eos_token_id": 5}, [2, 3], (5,)),
        ({"temperature": 0.7}, [2, 3], (2, 3)),
        (None, 2, (2,)),
        (None, None, ()),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(
    generation: dict[str, Any] | None, config: Any, expected: tuple[int, ...], folder: Path
) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(folder).eos_token_ids == expected


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'config.json'}: no such file")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "Expected `object`"),
        ("\xff{", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(content: str, says: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures 'MixtralForCausalLM' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures 'LlamaForSequence"),
        ({"architectures": ..., "model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"architectures": ..., "model_type": ...}, "architectures and model_type are missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": ...}, "missing required field `hidden_size`"),
        ({"num_hidden_layers": "3"}, r"Expected `int`, got `str` - at `\$.num_hidden_layers`"),
        ({"num_attention_heads": 0}, r"`\$.num_attention_heads`"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 6"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 1}, r"`\$.sliding_window`"),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 3},
            "layer_types is not supported for MistralForCausalLM",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "chunked_attention"]},
            "layer_types 'chunked_attention' is not supported",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"] * 2},
            "layer_types names 2 layers and num_hidden_layers is 3",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "use_sliding_window": False,
                "sliding_window": 64,
            },
            "layer_types has 'sliding_attention' without a window",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_its_key(
    keys: dict[str, Any], says: str, folder: Path
) -> None:
    edit_config(folder, **keys)
    with pytest.raises(ConfigError, match=says) as error:
        read_config(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 64}, (None,) * 3),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, (64,) * 3),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 3),
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 3),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, (None, 64, 64)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 3),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (64, None, 64),
        ),
    ],
)
def test_each_layer_has_the_window_that_transformers_gives_it(
    keys: dict[str, Any], windows: tuple[int | None, ...], folder: Path
) -> None:
    """Mistral has it everywhere, and by default; Qwen2 where it is switched on, in the layers named."""
    edit_config(folder, **{"architectures": ["Qwen2ForCausalLM"], **keys})
    assert read_config(folder).windows == windows


def test_a_folder_without_weights_says_what_it_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder}: no weights: neither model.safetensors nor model.safetensors.index.json is there"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: pickled weights are not loaded")
    assert "save_pretrained" in message


def test_a_missing_shard_is_named_with_a_tensor_that_it_holds(shards: Path) -> None:
    shard = shard_of(shards, UP_PROJ)
    shard.unlink()
    message = refusal(shards)
    assert message.startswith(f"{shard}: no such file")
    named = message.rsplit(" ", 1)[1]
    assert shard_of(shards, named) == shard


def test_a_tensor_that_is_not_in_the_shard_of_the_index_is_named(shards: Path) -> None:
    shard = shard_of(shards, UP_PROJ)
    tensors = load_file(shard)
    del tensors[UP_PROJ]
    save_file(tensors, shard)
    assert refusal(shards).startswith(f"{shard}: tensor {UP_PROJ} is missing")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(content: str, shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(shards).startswith(f"{index}: not an index of shards")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(UP_PROJ))
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor {UP_PROJ} is missing; config.json asks for it"
    )


def test_a_missing_head_is_named_where_the_config_does_not_tie_it(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor lm_head.weight is missing" in refusal(folder)


def test_a_missing_embedding_is_named_where_the_config_does_not_say_the_dtype(folder: Path) -> None:
    """The dtype would be that of the embedding."""
    edit_config(folder, dtype=..., tie_word_embeddings=True)
    edit_tensors(
        folder, lambda tensors: [tensors.pop(n) for n in ("model.embed_tokens.weight", "lm_head.weight")]
    )
    assert "tensor model.embed_tokens.weight is missing" in refusal(folder)


@pytest.mark.parametrize("name", [UP_PROJ, "model.norm.weight", "lm_head.weight"])
def test_a_misshapen_tensor_is_named_with_both_shapes(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.cat((tensors[name], tensors[name]))}))
    shape = {UP_PROJ: "[160, 48]", "model.norm.weight": "[96]", "lm_head.weight": "[576, 48]"}[name]
    wanted = {UP_PROJ: "[80, 48]", "model.norm.weight": "[48]", "lm_head.weight": "[288, 48]"}[name]
    assert refusal(folder) == (
        f"{folder / 'model.safetensors'}: tensor {name} has shape {shape}; config.json asks for {wanted}"
    )


def test_a_tensor_of_whole_numbers_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].to(torch.int8)}))
    assert f"tensor {UP_PROJ} is stored as I8, which is not supported" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"]
)
def test_a_tensor_that_the_config_has_no_place_for_is_named(name: str, folder: Path) -> None:
    """Without it the model would run and say something else than it was trained to."""
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(48)}))
    assert f"tensor {name} has no place in the model that config.json describes" in refusal(folder)


@pytest.mark.parametrize("share", [0.999, 0.5])
def test_a_truncated_file_is_named_with_the_tensor_that_is_cut(share: float, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    kept = int(len(content) * share)
    header_size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_size])
    header.pop("__metadata__", None)
    cut = [
        name
        for name, tensor in header.items()
        if tensor["data_offsets"][0] < kept - 8 - header_size < tensor["data_offsets"][1]
    ]
    file.write_bytes(content[:kept])
    assert refusal(folder) == (
        f"{file}: cut off at {kept} of {len(content)} bytes, in tensor {cut[0]}; copy or download it again"
    )


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_file_that_ends_in_its_header_is_named(kept: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(folder).startswith(f"{file}: no safetensors file, or cut off at {kept} bytes")


def test_a_file_with_a_broken_header_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"x" * 12
    file.write_bytes(content)
    assert refusal(folder).startswith(f"{file}: no safetensors file, or damaged: its header is not readable")


def test_a_file_with_bytes_behind_its_tensors_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert refusal(folder).startswith(f"{file}: not a valid safetensors file")


def test_names_resolve_to_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("model").resolve() == folder.resolve()
    assert resolve("demo") == checkpoint_path()


def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path / "nowhere"), "./a/b", "../a", "a/b/c"):
        with pytest.raises(ConfigError, match="no such folder; name a checkpoint folder") as error:
            resolve(name)
        assert str(error.value).startswith(f"{name}: ")


def test_a_hub_name_that_cannot_be_had_is_refused_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its environment once."""
    code = "from tidegate.engine.checkpoint import resolve; resolve('someone/model')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    last_line = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert "ConfigError: someone/model: no such folder, and the hub does not give it: " in last_line


def test_reading_a_checkpoint_imports_no_transformers() -> None:
    """It would be most of the start of a small model."""
    code = (
        "import sys; import tidegate.engine.model.weights, tidegate.engine.checkpoint; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
