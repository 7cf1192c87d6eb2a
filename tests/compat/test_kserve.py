"""KServe's protocol, driven by Triton's own client."""

import pytest
from compat_clients import nothing_left, port_of, try_feature
from served import Served

FEATURES = ("metadata", "infer", "multiplexed", "cancel", "errors")


@pytest.mark.parametrize("feature", FEATURES)
async def test_kserve(feature: str, demo: Served) -> None:
    try_feature("kserve", feature, port_of(demo))
    await nothing_left(demo)
