"""Constrained output through the native API, with a real engine behind it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from drive import config_for
from llguidance import LLParserLimits

from tidegate.engine import grammar
from tidegate.engine.build import build_engine
from tidegate.engine.client import InProcessClient
from tidegate.engine.text import Text
from tidegate.service.client import AsyncClient, FailedPrecondition, InvalidRequest, Overloaded
from tidegate.service.listener import open_listener
from tidegate.service.server import start_server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [7, 40]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AsyncClient]:
    address = f"unix:{tmp_path / 'tidegate.sock'}"
    text, listener = Text.load("demo"), await open_listener(addresses=[address])
    core = build_engine(config_for("demo", device="cpu", device_kv_tokens=4096, host_kv_tokens=4096))
    engine = InProcessClient(core)
    server = await start_server(listener, engine, text)
    async with AsyncClient(listener.addresses[0]) as connected:
        yield connected
    await server.stop()
    await engine.close()
    text.close()


async def test_a_schema_gives_json_that_obeys_it(client: AsyncClient) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        stream = client.generate(
            "Once upon a time", max_tokens=200, structured_output={"json_schema": schema}
        )
        value = json.loads(await stream.text())
        assert value["age"] in (7, 40)
        assert stream.finished is not None
        assert stream.finished.choices[0].reason == "grammar_complete"


async def test_each_form_and_both_lists_are_kept(client: AsyncClient) -> None:
    async def said(**options: object) -> str:
        response = await client.generate_unary("Once", max_tokens=24, **options)  # type: ignore[arg-type]
        return response.completions[0].text

    assert await said(structured_output={"choices": ["kite", "sea"]}) in ("kite", "sea")
    assert (await said(structured_output={"regex": "x[0-9]{3}"})).startswith("x")
    assert await said(structured_output={"grammar": 'start: "sea" " "? "tide"'}) in ("sea tide", "seatide")
    assert "e" not in await said(bad_words=["e"])
    response = await client.generate_unary("Once", max_tokens=6, allowed_token_ids=[300, 301])
    assert set(response.completions[0].token_ids) <= {300, 301}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (
            {"structured_output": {"json_schema": '{"type": "nope"}'}},
            "sampling.structured_output.json_schema",
        ),
        ({"structured_output": {"regex": "("}}, "sampling.structured_output.regex"),
        ({"structured_output": {"choices": [""]}}, "sampling.structured_output.choices"),
        ({"allowed_token_ids": [1, 10**6]}, "sampling.allowed_token_ids[1]"),
        (
            {"structured_output": {"regex": "abc"}, "generated_token_ids": [300, 301]},
            "generated_token_ids",
        ),
    ],
)
async def test_a_refusal_names_the_path(client: AsyncClient, options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        await client.generate_unary("Once", max_tokens=6, **options)  # type: ignore[arg-type]
    assert [violation.field for violation in error.value.violations] == [field]


async def test_a_dead_end_says_so(client: AsyncClient) -> None:
    text = Text.load("demo")
    allowed = text.encode("ab", add_special_tokens=False)
    allowed += [token for letter in "ab" for token in text.encode(letter, add_special_tokens=False)]
    text.close()
    with pytest.raises(FailedPrecondition) as error:
        await client.generate_unary(
            "Once",
            structured_output={"regex": "[ab]+[0-9]{4}x"},
            allowed_token_ids=allowed,
            bad_words=["a", "bb"],
        )
    assert error.value.reason == "NO_TOKEN_ALLOWED"


async def test_a_grammar_that_meets_its_limits_ends_its_request(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few states are enough to begin with, not to go on."""
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(verbose_errors=False, max_lexer_states=60))
    with pytest.raises(Overloaded) as error:
        await client.generate_unary("Once", structured_output={"regex": "[a-z ]{150}"})
    assert error.value.reason == "GRAMMAR_TOO_COMPLEX"
