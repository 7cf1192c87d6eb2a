"""The demo checkpoint in the package: a toy that tells stories and answers questions about them."""

from __future__ import annotations

from pathlib import Path


def checkpoint_path() -> Path:
    """The checkpoint's folder, in Hugging Face format."""
    return Path(__file__).parent / "checkpoint"
