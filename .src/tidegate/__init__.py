"""Tidegate: LLM inference over streaming gRPC, with a KV cache in two tiers.

The public names are imported on first use, so that ``from tidegate import Client`` needs
neither torch nor the engine, and the installation of the client alone stays small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.engine.llm import LLM
    from tidegate.engine.request import SamplingParams, StructuredOutput
    from tidegate.service.client import AsyncClient, Client

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "StructuredOutput"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "tidegate.engine.llm",
    "SamplingParams": "tidegate.engine.request",
    "StructuredOutput": "tidegate.engine.request",
    "AsyncClient": "tidegate.service.client",
    "Client": "tidegate.service.client",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
    try:
        module = import_module(home)
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library == __name__:
            raise
        message = f"tidegate.{name} needs {library}: pip install 'tidegate[server]'"
        raise ModuleNotFoundError(message, name=missing.name) from missing
    return getattr(module, name)
