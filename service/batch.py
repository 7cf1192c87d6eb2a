"""``tidegate batch``: a file of requests in OpenAI's batch format in, a file of answers out.

Each line of the input is ``{"custom_id", "method": "POST", "url", "body"}``, with ``/v1/chat/completions`` or
``/v1/completions`` for the url. Each line of the output is one answer, in the order in which they end. A
line that is answered already is not run again: a batch that was cut off goes on where it stopped.
"""

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

from tidegate.engine.config import ConfigError
from tidegate.service import connection
from tidegate.service.client import (
    AsyncClient,
    Logprob,
    Options,
    PositionLogprobs,
    Response,
    StructuredOutput,
    TidegateError,
)
from tidegate.service.connection import Credentials

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAME = ("max_tokens", "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty")
"""Fields of a body that have our names."""
OURS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids")
"""Fields that OpenAI does not have and others' servers take."""
IGNORED = ("model", "stream", "user")
"""A server has one model; a batch is no stream; a user is a label of the caller's."""
HTTP_STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503}
FINISH_REASONS = {
    "stop_token": "stop",
    "stop_string": "stop",
    "grammar_complete": "stop",
    "max_tokens": "length",
    "context_length": "length",
}
WRAPPER = {"name", "description", "strict", "schema"}
"""Fields around a schema. ``strict`` or not, a schema is kept to."""
ANY_OBJECT = {"type": "object"}
SCHEMA = "body.response_format.json_schema.schema"
BODY_FIELDS = {"sampling.structured_output.json_schema": SCHEMA}
"""What the server's violations name, by where a body has it."""

Json = dict[str, Any]
_Words = dict[int, str]
"""The texts of single tokens, as far as they are known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="IN", help="a file of requests, one JSON object a line")
    parser.add_argument("output", type=Path, metavar="OUT", help="gets the answers; those in it are kept")
    connection.add_source_arguments(parser, "batch")
    parser.add_argument(
        "--concurrency", type=int, default=256, metavar="C", help="requests under way at once (default: 256)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 where every line was answered with success, else 1."""
    if args.concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1; got {args.concurrency}")
    jobs = _read(args.input, _answered(args.output))
    credentials = connection.credentials(args)
    failures = 0
    with args.output.open("a", encoding="utf-8") as output:
        if jobs:
            with connection.server_of(args) as address:
                failures = asyncio.run(_run_all(jobs, address, credentials, args.concurrency, output))
    sys.stderr.write(f"{len(jobs) - failures} answered, {failures} failed: {args.output}\n")
    return 1 if failures else 0


class BadLine(ValueError):
    """A line that cannot be run: it is answered with its fault, and the others go on."""


@dataclass(frozen=True, slots=True)
class Job:
    """A line of the input. ``fault``: why it cannot be run; then the rest is empty."""

    custom_id: str
    url: str = ""
    prompt: Any = None
    options: Options = field(default_factory=Options)
    fault: str | None = None


async def _run_all(
    jobs: list[Job], address: str, credentials: Credentials, concurrency: int, output: TextIO
) -> int:
    """Run what can be run, write each answer when it is there; how many failed."""
    failures = 0
    waiting = iter(jobs)
    words: _Words = {}
    with tqdm(total=len(jobs), unit="request", disable=not sys.stderr.isatty()) as progress:
        async with AsyncClient(address, **credentials) as client:

            async def work() -> None:
                nonlocal failures
                for job in waiting:  # one iterator for all workers: each job is taken once
                    answer = await _answer(client, job, words)
                    failures += answer["error"] is not None
                    output.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    output.flush()
                    progress.update()

            await asyncio.gather(*(work() for _ in range(min(concurrency, len(jobs)))))
    return failures


async def _answer(client: AsyncClient, job: Job, words: _Words) -> Json:
    """The line of the output. An unreachable server is raised: nothing more can be answered."""
    request_id = uuid.uuid4().hex
    if job.fault is not None:
        return _line(job, request_id, 400, {"message": job.fault, "code": "invalid_request"})
    try:
        options: Options = {**job.options, "request_id": request_id}
        response = await client.generate_unary(job.prompt, **options)
        await _learn(client, response, words)
    except (TypeError, ValueError, KeyError) as error:
        message = f"a field of the body has another type than it should: {error}"
        return _line(job, request_id, 400, {"message": message, "code": "invalid_request"})
    except TidegateError as error:
        if not error.reason:
            raise  # no word of a server's
        status = HTTP_STATUS.get(error.code.name, 500)
        details = "; ".join(
            f"{BODY_FIELDS.get(violation.field, violation.field)}: {violation.description}"
            for violation in error.violations
        )
        return _line(
            job, request_id, status, {"message": details or str(error), "code": error.reason.lower()}
        )
    return _line(job, request_id, 200, None, _body(job, request_id, response, words))


def _line(job: Job, request_id: str, status: int, error: Json | None, body: Json | None = None) -> Json:
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": job.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body or {"error": error}},
        "error": error,
    }


async def _learn(client: AsyncClient, response: Response, words: _Words) -> None:
    """The texts of all tokens whose logprobs were told."""
    for completion in response.completions:
        for position in completion.logprobs:
            for one in (position.chosen, *position.top):
                if one.token_id not in words:
                    words[one.token_id] = await client.detokenize([one.token_id], skip_special_tokens=False)


def _body(job: Job, request_id: str, response: Response, words: _Words) -> Json:
    """As the API of the job's url would answer."""
    is_chat = job.url == CHAT
    choices: list[Json] = []
    for completion in response.completions:
        choice: Json = {
            "index": completion.choice,
            "finish_reason": FINISH_REASONS.get(completion.finish_reason, completion.finish_reason),
        }
        if is_chat:
            choice["message"] = {"role": "assistant", "content": completion.text}
        else:
            choice["text"] = completion.text
        if completion.logprobs:
            write = _chat_logprobs if is_chat else _text_logprobs
            choice["logprobs"] = write(completion.logprobs, words)
        choices.append(choice)
    usage = response.finished.usage
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "choices": choices,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    }


def _chat_logprobs(positions: Sequence[PositionLogprobs], words: _Words) -> Json:
    def told(one: Logprob) -> Json:
        text = words[one.token_id]
        # Half a character has no text of its own, and so no bytes that we know of.
        return {
            "token": text,
            "logprob": one.logprob,
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }

    content = [{**told(each.chosen), "top_logprobs": list(map(told, each.top))} for each in positions]
    return {"content": content, "refusal": None}


def _text_logprobs(positions: Sequence[PositionLogprobs], words: _Words) -> Json:
    tokens = [words[each.chosen.token_id] for each in positions]
    return {
        "tokens": tokens,
        "token_logprobs": [each.chosen.logprob for each in positions],
        "top_logprobs": [{words[one.token_id]: one.logprob for one in each.top} for each in positions],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0)),
    }


def _read(path: Path, answered: set[str]) -> list[Job]:
    """The lines that are still to be answered. Raises ``ConfigError`` where an id is missing or doubled."""
    jobs: dict[str, Job] = {}
    for number, line in _lines(path):
        try:
            request = json.loads(line)
            custom_id = request["custom_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: must be a JSON object with a custom_id") from error
        if not isinstance(custom_id, str) or custom_id in jobs:
            raise ConfigError(f"{path}, line {number}: custom_id must be a text, and no other line's")
        try:
            jobs[custom_id] = _job(custom_id, request)
        except BadLine as fault:
            jobs[custom_id] = Job(custom_id, fault=str(fault))
    return [job for job in jobs.values() if job.custom_id not in answered]


def _answered(path: Path) -> set[str]:
    """Ids that the output has an answer for. A last line that was cut off is taken away."""
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    try:
        return {json.loads(line)["custom_id"] for _, line in _lines(path)}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} exists and holds something other than a batch's answers") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line


def _job(custom_id: str, request: Mapping[str, Any]) -> Job:
    """Raises ``BadLine``."""
    url, body = request.get("url"), request.get("body")
    if request.get("method", "POST") != "POST" or url not in (CHAT, TEXT):
        raise BadLine(f"method and url must be POST and one of {CHAT}, {TEXT}")
    if not isinstance(body, dict):
        raise BadLine("body must be a JSON object")
    rest = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    prompt = rest.pop("messages" if url == CHAT else "prompt", None)
    if prompt is None:
        raise BadLine(f"body.{'messages' if url == CHAT else 'prompt'} is missing")
    options: Json = {name: rest.pop(name) for name in (*SAME, *OURS) if name in rest}
    if "max_completion_tokens" in rest:
        options["max_tokens"] = rest.pop("max_completion_tokens")
    if url == TEXT and "logprobs" in rest:
        options["logprobs"] = rest.pop("logprobs")
    elif rest.get("logprobs") is True:
        del rest["logprobs"]
        options["logprobs"] = rest.pop("top_logprobs", 0)
    elif rest.get("logprobs") is False:
        del rest["logprobs"]
    if "logit_bias" in rest:
        options["logit_bias"] = _logit_bias(rest.pop("logit_bias"))
    if "response_format" in rest and (form := _response_format(rest.pop("response_format"))):
        options["structured_output"] = form
    if "stop" in rest:
        stop = rest.pop("stop")
        options["stop"] = [stop] if isinstance(stop, str) else stop
    if rest:
        raise BadLine(f"not supported: {', '.join(f'body.{name}' for name in sorted(rest))}")
    return Job(custom_id, str(url), prompt, cast("Options", options))


def _logit_bias(given: Any) -> dict[int, float]:
    """A JSON object's keys are texts. Raises ``BadLine``."""
    try:
        return {int(token_id): float(bias) for token_id, bias in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadLine("body.logit_bias must be an object of numbers by token id") from error


def _response_format(given: Any) -> StructuredOutput | None:
    """None for text, which has no form. Raises ``BadLine``."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise BadLine("body.response_format.type must be one of text, json_object, json_schema")
    unknown = given.keys() - {"type", *(("json_schema",) if kind == "json_schema" else ())}
    if unknown:
        raise BadLine(f"not supported: body.response_format.{min(unknown)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_schema": ANY_OBJECT}
    wrapper = given.get("json_schema")
    if not isinstance(wrapper, dict) or not isinstance(wrapper.get("schema"), dict):
        raise BadLine(f"{SCHEMA} must be an object")
    if unknown := wrapper.keys() - WRAPPER:
        raise BadLine(f"not supported: body.response_format.json_schema.{min(unknown)}")
    return {"json_schema": wrapper["schema"]}
