"""Real servers for the tests with real processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from served import Served, served


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``serve(*arguments)``: a ``tidegate serve`` that is ready, stopped at the end of the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(served(tmp_path, *arguments, **options))
