"""``tidegate batch``: OpenAI's batch format in and out, by the command that a user types."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import Served, served

TIDEGATE = Path(sys.executable).with_name("tidegate")
CHAT = "/v1/chat/completions"
STORY = [{"role": "user", "content": "Tell me a story about a kite."}]
SHAPE = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}, "wind": {"enum": ["weak", "strong"]}},
    "required": ["sunny", "wind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served(tmp_path_factory.mktemp("server"), "demo") as running:
        yield running


def request(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"model": "demo", "max_tokens": 12, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def form(schema: Any, **more: Any) -> dict[str, Any]:
    """As OpenAI's packages wrap a schema."""
    return {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": schema, **more}}


def batch(folder: Path, server: Served, requests: list[Any]) -> tuple[int, dict[str, Any], str]:
    """Exit status, answers by id, and what was said."""
    source, answers = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in requests))
    command = [TIDEGATE, "batch", source, answers, "--server", server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    lines = answers.read_text().splitlines() if answers.exists() else []
    read = [json.loads(line) for line in lines]
    assert len({answer["custom_id"] for answer in read}) == len(read)
    return done.returncode, {answer["custom_id"]: answer for answer in read}, done.stderr


def test_chats_and_completions_are_answered_as_openai_would(tmp_path: Path, server: Served) -> None:
    status, answers, _ = batch(
        tmp_path,
        server,
        [
            request("chat", CHAT, messages=STORY, max_completion_tokens=12),
            request("text", prompt="Once upon a time", n=2, temperature=1, seed=3),
            request("stopped", prompt="Once upon a time", max_tokens=200, stop="."),
            request("text_logprobs", prompt="Once upon a time", max_tokens=4, logprobs=2),
            request("chat_logprobs", CHAT, messages=STORY, max_tokens=4, logprobs=True, top_logprobs=3),
            request("biased", prompt="Once upon a time", logit_bias={"70": 100}),
        ],
    )
    assert status == 0
    chat, text, stopped = (answers[name]["response"]["body"] for name in ("chat", "text", "stopped"))
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["choices"][0]["message"]["content"]
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["usage"]["completion_tokens"] == 12
    assert [choice["index"] for choice in text["choices"]] == [0, 1]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert "." not in stopped["choices"][0]["text"]
    (text,) = answers["text_logprobs"]["response"]["body"]["choices"]
    assert "".join(text["logprobs"]["tokens"]) == text["text"]
    assert [len(best) for best in text["logprobs"]["top_logprobs"]] == [2] * 4
    for offset, token in zip(text["logprobs"]["text_offset"], text["logprobs"]["tokens"], strict=True):
        assert text["text"].startswith(token, offset)
    (chat,) = answers["chat_logprobs"]["response"]["body"]["choices"]
    content = chat["logprobs"]["content"]
    assert "".join(position["token"] for position in content) == chat["message"]["content"]
    for position in content:
        assert bytes(position["bytes"]).decode() == position["token"]
        assert len(position["top_logprobs"]) == 3
        assert position["top_logprobs"][0]["logprob"] == position["logprob"] <= 0  # greedy
    (biased,) = answers["biased"]["response"]["body"]["choices"]
    assert len(set(biased["text"])) == 1


def test_an_answer_has_the_form_that_a_line_asks_for(tmp_path: Path, server: Served) -> None:
    status, answers, _ = batch(
        tmp_path,
        server,
        [
            request("plain", CHAT, messages=STORY),
            request("text", CHAT, messages=STORY, user="u", response_format={"type": "text"}),
            request("object", CHAT, messages=STORY, response_format={"type": "json_object"}),
            request("schema", CHAT, messages=STORY, max_tokens=200, response_format=form(SHAPE)),
        ],
    )
    assert status == 0
    plain, text, any_object, schema = (
        answers[name]["response"]["body"]["choices"][0] for name in ("plain", "text", "object", "schema")
    )
    assert text == plain
    assert any_object["message"]["content"].startswith("{")
    value = json.loads(schema["message"]["content"])
    assert isinstance(value.pop("sunny"), bool)
    assert value in ({"wind": "weak"}, {"wind": "strong"})
    assert schema["finish_reason"] == "stop"


def test_a_line_that_cannot_be_run_is_answered_with_its_fault_and_the_others_go_on(
    tmp_path: Path, server: Served
) -> None:
    status, answers, said = batch(
        tmp_path,
        server,
        [
            request("good", prompt="Once"),
            request("long", prompt="Once", max_tokens=10**6),
            request("unknown", prompt="Once", echo=True),
            request("bias", prompt="Once", logit_bias={"ten": 2}),
            request("type", prompt="Once", max_tokens="many"),
            request("form", prompt="Once", response_format={"type": "xml"}),
            request("form_more", prompt="Once", response_format={"type": "text", "schema": {}}),
            request("no_schema", prompt="Once", response_format={"type": "json_schema"}),
            request("wrapper", prompt="Once", response_format=form(SHAPE, order="any")),
            request("schema", prompt="Once", response_format=form({"type": "no type"})),
            request("url", "/v1/embeddings"),
            request("empty"),
        ],
    )
    assert status == 1
    assert answers["good"]["error"] is None
    for name, word in (
        ("long", "max_tokens"),
        ("unknown", "body.echo"),
        ("bias", "body.logit_bias"),
        ("type", "type"),
        ("form", "body.response_format.type"),
        ("form_more", "body.response_format.schema"),
        ("no_schema", "body.response_format.json_schema.schema"),
        ("wrapper", "body.response_format.json_schema.order"),
        ("schema", "body.response_format.json_schema.schema"),
        ("url", "/v1/chat/completions"),
        ("empty", "body.prompt"),
    ):
        assert answers[name]["response"]["status_code"] == 400
        assert word in answers[name]["error"]["message"]
    assert "1 answered, 11 failed" in said


def test_a_batch_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path, server: Served) -> None:
    requests = [request(str(number), prompt=f"There is {number}") for number in range(6)]
    _, whole, _ = batch(tmp_path, server, requests)
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    status, answers, said = batch(tmp_path, server, requests)
    assert (status, answers.keys()) == (0, whole.keys())
    assert "3 answered" in said
    texts = [
        {name: answer["response"]["body"]["choices"] for name, answer in each.items()}
        for each in (whole, answers)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "in.jsonl, line 1: must be a JSON object with a custom_id"),
        ([json.dumps(request("a", prompt="x"))] * 2, "line 2: custom_id must be a text, and no other line's"),
    ],
)
def test_a_file_that_is_no_batch_is_one_line_that_names_the_line(
    tmp_path: Path, server: Served, lines: list[str], said: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    command = [TIDEGATE, "batch", source, tmp_path / "out.jsonl", "--server", server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
