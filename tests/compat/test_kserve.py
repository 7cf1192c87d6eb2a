"""KServe's protocol, driven by Triton's own client."""

import pytest
from compat_clients import LONG_ANSWER, nothing_left, port_of, try_feature
from served import Served

FEATURES = ("metadata", "infer", "multiplexed", "errors")


@pytest.mark.parametrize("feature", FEATURES)
async def test_kserve(feature: str, demo: Served) -> None:
    try_feature("kserve", feature, port_of(demo))
    await nothing_left(demo)


@pytest.mark.feature("cancel")
async def test_a_cancelled_stream_ends_what_runs_on_it(demo: Served) -> None:
    before = await nothing_left(demo)
    try_feature("kserve", "cancel", port_of(demo))
    assert await nothing_left(demo) - before < LONG_ANSWER
