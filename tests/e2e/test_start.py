"""How long a user waits for the first token of ``tidegate serve demo``, and where the time goes."""

import time
from collections.abc import Callable

from served import Served
from wire import Seen, connect, generate


async def test_the_time_to_the_first_token_is_split_in_the_log(serve: Callable[..., Served]) -> None:
    began = time.perf_counter()
    server = serve("demo")
    async with connect(server.address) as channel:
        request = Seen("first", "", {"prompt": {"text": "The tide"}, "sampling": {"max_tokens": 1}})
        await generate(channel, request)
    first_token = time.perf_counter() - began
    loaded, ready = server.wait_for_log("loaded"), server.wait_for_log("ready")
    split = {name: value for name, value in loaded.items() if name.endswith("_s")}
    print(f"first token after {first_token:.2f} s: {split}, ready after {ready['after_s']} s")

    assert request.ends == ["MAX_TOKENS"]
    assert split.keys() == {"own_imports_s", "imports_s", "load_s", "pool_s", "total_s"}
    in_a_row = split["own_imports_s"] + split["imports_s"] + split["load_s"] + split["pool_s"]
    assert in_a_row <= split["total_s"] + 0.1
    assert split["total_s"] <= ready["after_s"] <= first_token + 0.1
