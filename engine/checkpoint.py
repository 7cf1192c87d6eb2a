"""From the name of a model to a folder with its files: ``demo``, a folder, or a name on the hub."""

import re
from pathlib import Path

import huggingface_hub

from tidegate.engine.config import ConfigError
from tidegate.engine.demo import checkpoint_path

DEMO = "demo"

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Config, weights, chat template and tokenizer: not the pickled copies that lie beside them."""


def resolve(model: str) -> Path:
    """The checkpoint folder of ``model``; a hub name is downloaded, or found in the hub's local cache.

    Raises ``ConfigError``, in one line, where there is no such folder and the hub does not give it.
    """
    if model == DEMO:
        return checkpoint_path()
    folder = Path(model).expanduser()
    if folder.exists() or not _HUB_NAME.fullmatch(model):
        if not folder.is_dir():
            raise ConfigError(f"{model}: no such folder; name a checkpoint folder, a hub name, or {DEMO!r}")
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{model}: no such folder, and the hub does not give it: {reason}") from error
