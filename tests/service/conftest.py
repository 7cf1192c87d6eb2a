"""A running front for the tests of the service."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from front import Front, running_front


@pytest.fixture
async def start_front(tmp_path: Path) -> AsyncGenerator[Callable[..., Any]]:
    """``await start_front(**options)``; as often as a test likes, one after the other on one path."""
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Front:
            return await stack.enter_async_context(running_front(tmp_path, **options))

        yield start


@pytest.fixture
async def front(start_front: Callable[..., Any]) -> Front:
    started: Front = await start_front()
    return started
