"""``InferenceService`` without sessions, over a real channel, with a fake engine behind it."""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest
from fake_engine import EOS, MAX_MODEL_LEN, POISON
from front import SECONDS, Front, read_error, refusal_of, until
from google.protobuf.duration_pb2 import Duration

from tidegate.engine.messages import Finish, Limit, Submit
from tidegate.service.admission import AdmissionLimits
from tidegate.service.call import UNREAD_TOKENS
from tidegate.service.errors import CODES
from tidegate.service.intake import MAX_PROMPT_CHARS
from tidegate.service.listener import MAX_MESSAGE_BYTES
from tidegate.service.session_limits import SessionLimits
from tidegate.v1 import events_pb2, inference_pb2, inference_pb2_grpc

Start = Callable[..., Any]


def request(text: str = "the tide", **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt={"text": text}, **fields)


def unary(text: str = "the tide", **fields: Any) -> inference_pb2.GenerateUnaryRequest:
    return inference_pb2.GenerateUnaryRequest(prompt={"text": text}, **fields)


def tokens(upto: int) -> dict[str, int]:
    return {"max_tokens": upto}


async def kinds(call: Any) -> list[str]:
    return [response.WhichOneof("event") async for response in call]


async def test_generate_streams_admitted_then_every_token_once_then_finished(front: Front) -> None:
    text, offset, last = "", 0, None
    events = [
        response
        async for response in front.inference.Generate(
            request(request_id="a", sampling=tokens(20), return_prompt_token_ids=True)
        )
    ]
    assert events[0].WhichOneof("event") == "admitted"
    assert front.text.decode(events[0].admitted.prompt_token_ids) == "the tide"
    assert events[0].admitted.prompt_tokens == 8
    for response in events[1:-1]:
        (delta,) = response.batch.deltas
        assert (delta.request_id, delta.choice, delta.offset) == ("a", 0, offset)
        assert front.text.decode(delta.token_ids) == delta.text
        text, offset, last = text + delta.text, offset + len(delta.token_ids), delta
    assert text == front.engine.expected("the tide", 20)
    assert last is not None
    assert last.finish_reason == events_pb2.FINISH_REASON_MAX_TOKENS
    finished = events[-1].finished
    assert [(end.choice, end.reason, end.output_tokens) for end in finished.choices] == [
        (0, events_pb2.FINISH_REASON_MAX_TOKENS, 20)
    ]
    assert (finished.usage.prompt_tokens, finished.usage.output_tokens) == (8, 20)
    assert finished.usage.preemptions == 1
    assert 0 <= finished.timings.queued <= finished.timings.to_first_token <= finished.timings.total


async def test_unary_gives_each_choice_whole(front: Front) -> None:
    response = await front.inference.GenerateUnary(unary(sampling={"n": 3, "max_tokens": 9, "logprobs": 2}))
    assert [completion.choice for completion in response.completions] == [0, 1, 2]
    for completion in response.completions:
        assert completion.text == front.engine.expected("the tide", 9, completion.choice)
        assert [position.chosen.token_id for position in completion.logprobs] == completion.token_ids
        assert all(len(position.top) == 2 for position in completion.logprobs)
        assert completion.finish_reason == events_pb2.FINISH_REASON_MAX_TOKENS
    assert response.finished.usage.output_tokens == 27


async def test_a_seed_is_drawn_where_none_is_given_and_told(front: Front) -> None:
    given = await front.inference.GenerateUnary(unary(sampling={"seed": 2**64 - 1, "max_tokens": 1}))
    assert given.admitted.seed == 2**64 - 1
    drawn = {(await front.inference.GenerateUnary(unary(sampling=tokens(1)))).admitted.seed for _ in range(3)}
    assert len(drawn) == 3
    assert {s.request.seed for s in front.engine.sent(Submit)} == {2**64 - 1, *drawn}


async def test_a_chat_is_rendered_with_the_template(front: Front) -> None:
    chat = {"messages": [{"role": "user", "content": [{"text": "high "}, {"text": "tide"}]}]}
    response = await front.inference.GenerateUnary(
        inference_pb2.GenerateUnaryRequest(
            prompt={"chat": chat}, sampling=tokens(1), return_prompt_token_ids=True
        )
    )
    prompt = front.text.decode(response.admitted.prompt_token_ids, skip_special_tokens=False)
    assert prompt == f"user: high tide{EOS}assistant: "
    closed = await front.inference.CountTokens(
        inference_pb2.CountTokensRequest(prompt={"chat": {**chat, "add_generation_prompt": False}})
    )
    assert closed.tokens == response.admitted.prompt_tokens - len("assistant: ")


@pytest.mark.parametrize("lag", [0, 3])
async def test_stop_string_across_deltas_ends_the_text_before_it_and_the_engine_at_it(
    start_front: Start, lag: int
) -> None:
    """Also where the engine hears of it some tokens later."""
    front = await start_front(script=lambda prompt, offset, choice: "the sea STOP and more"[offset % 21])
    front.engine.lag = lag
    stream = front.inference.Generate(request(sampling={"stop": ["STOP", "sea S!"]}))
    events = [response async for response in stream]
    deltas = [delta for response in events for delta in response.batch.deltas]
    assert "".join(delta.text for delta in deltas) == "the sea "
    assert sum(len(delta.token_ids) for delta in deltas) == 12
    (end,) = events[-1].finished.choices
    assert (end.reason, end.stop_string, end.output_tokens) == (
        events_pb2.FINISH_REASON_STOP_STRING,
        "STOP",
        12,
    )
    assert events[-1].finished.usage.output_tokens == 12
    assert [(f.reason, f.at_offset) for f in front.engine.sent(Finish)] == [("stop_string", 12)]
    assert not front.engine.running


async def test_stop_string_is_kept_where_asked_for(start_front: Start) -> None:
    front = await start_front(script=lambda prompt, offset, choice: "one STOP two"[offset % 12])
    response = await front.inference.GenerateUnary(unary(sampling={"stop": ["STOP"], "include_stop": True}))
    assert response.completions[0].text == "one STOP"


async def test_text_held_back_comes_with_the_last_delta(start_front: Start) -> None:
    """The output ends inside what might have become a stop string."""
    front = await start_front(script=lambda prompt, offset, choice: "go ST"[offset])
    response = await front.inference.GenerateUnary(unary(sampling={"stop": ["STOP"], "max_tokens": 5}))
    assert response.completions[0].text == "go ST"


async def test_end_of_sequence_has_no_text_and_is_named(start_front: Start) -> None:
    front = await start_front(script=lambda prompt, offset, choice: "hi"[offset] if offset < 2 else EOS)
    response = await front.inference.GenerateUnary(unary())
    assert response.completions[0].text == "hi"
    assert len(response.completions[0].token_ids) == 3
    (end,) = response.finished.choices
    assert (end.reason, end.stop_token_id) == (
        events_pb2.FINISH_REASON_STOP_TOKEN,
        front.engine.info.eos_token_ids[0],
    )


async def test_generation_goes_on_behind_tokens_that_exist_already(front: Front) -> None:
    whole = front.engine.expected("the tide", 12)
    response = await front.inference.GenerateUnary(
        unary(generated_token_ids=front.text.encode(whole[:7]), sampling=tokens(12))
    )
    assert response.completions[0].text == whole[7:]
    (end,) = response.finished.choices
    assert (end.output_tokens, response.finished.usage.output_tokens) == (12, 5)


@pytest.mark.parametrize(
    ("given", "sampling", "reason"),
    [
        ("abc", {"max_tokens": 3}, events_pb2.FINISH_REASON_MAX_TOKENS),
        ("abc", {"stop": ["bc"]}, events_pb2.FINISH_REASON_STOP_STRING),
        (f"abc{EOS}", {}, events_pb2.FINISH_REASON_STOP_TOKEN),
    ],
)
async def test_output_that_has_reached_an_end_already_ends_at_once(
    front: Front, given: str, sampling: dict[str, Any], reason: int
) -> None:
    response = await front.inference.GenerateUnary(
        unary(generated_token_ids=front.text.encode(given), sampling=sampling)
    )
    assert [end.reason for end in response.finished.choices] == [reason]
    assert not front.engine.commands


async def test_all_violations_are_told_at_once_with_their_paths(front: Front) -> None:
    vocabulary = front.engine.info.vocab_size
    refusal = await refusal_of(
        front.inference.Generate(
            inference_pb2.GenerateRequest(
                prompt={"token_ids": {"ids": [1, vocabulary]}},
                generated_token_ids=[vocabulary],
                sampling={
                    "n": 2,
                    "top_p": 1.5,
                    "temperature": float("nan"),
                    "stop": [""],
                    "stop_token_ids": [0, vocabulary],
                    "logit_bias": {5: 100.5, vocabulary: 1.0},
                    "prompt_logprobs": 21,
                    "allowed_token_ids": [1] * (2**14 + 1),
                    "bad_words": [""],
                    "structured_output": {"choices": {"values": ["a", ""]}},
                },
                lease={"time_to_live": Duration(seconds=-5)},
                time_limit=Duration(seconds=-1),
            )
        )
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert set(refusal.violations) == {
        "prompt.token_ids.ids[1]",
        "generated_token_ids",
        "generated_token_ids[0]",
        "sampling.top_p",
        "sampling.temperature",
        "sampling.stop",
        "sampling.stop_token_ids[1]",
        "sampling.logit_bias",
        f"sampling.logit_bias[{vocabulary}]",
        "sampling.prompt_logprobs",
        "sampling.allowed_token_ids",
        "sampling.bad_words",
        "sampling.structured_output.choices",
        "lease.time_to_live",
        "time_limit",
    }
    assert refusal.trailers["grpc-retry-pushback-ms"] == "-1"
    assert not front.engine.commands


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({}, "prompt"),
        ({"text": ""}, "prompt"),
        ({"token_ids": {}}, "prompt"),
        ({"chat": {}}, "prompt.chat.messages"),
        ({"chat": {"messages": [{"role": "user", "content": [{}]}]}}, "prompt.chat.messages[0].content[0]"),
    ],
)
async def test_a_prompt_without_content_is_refused(front: Front, prompt: Any, field: str) -> None:
    refusal = await refusal_of(front.inference.Generate(inference_pb2.GenerateRequest(prompt=prompt)))
    assert list(refusal.violations) == [field]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({"text": "x" * (MAX_PROMPT_CHARS + 1)}, "prompt.text"),
        (
            {"chat": {"messages": [{"role": "user", "content": [{"text": "x" * 2**21}] * 3}]}},
            "prompt.chat.messages",
        ),
    ],
    ids=["text", "chat"],
)
async def test_a_text_beyond_any_context_is_refused_without_tokenizing_it(
    front: Front, prompt: Any, field: str
) -> None:
    front.text.close()
    refusal = await refusal_of(front.inference.Generate(inference_pb2.GenerateRequest(prompt=prompt)))
    assert list(refusal.violations) == [field]


async def test_what_can_never_fit_is_refused_before_it_queues(front: Front) -> None:
    fits = MAX_MODEL_LEN - len("the tide")
    refusal = await refusal_of(front.inference.Generate(request(sampling=tokens(fits + 1))))
    assert list(refusal.violations) == ["sampling.max_tokens"]
    refusal = await refusal_of(front.inference.Generate(request("x" * MAX_MODEL_LEN)))
    assert list(refusal.violations) == ["prompt"]
    assert not front.engine.commands
    response = await front.inference.GenerateUnary(unary(sampling=tokens(fits)))
    assert response.finished.usage.output_tokens == fits


async def test_without_max_tokens_the_context_is_the_limit(front: Front) -> None:
    response = await front.inference.GenerateUnary(unary("x" * (MAX_MODEL_LEN - 3)))
    assert [end.reason for end in response.finished.choices] == [events_pb2.FINISH_REASON_CONTEXT_LENGTH]
    assert len(response.completions[0].token_ids) == 3


async def test_another_model_is_not_found(front: Front) -> None:
    refusal = await refusal_of(front.inference.Generate(request(model="other")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    served = await front.inference.GenerateUnary(unary(model="fake", sampling=tokens(1)))
    assert served.finished.choices


async def test_a_request_id_is_in_use_until_its_request_ends(front: Front) -> None:
    front.engine.admits = False
    first = front.inference.GenerateUnary(unary(request_id="same", sampling=tokens(1)))
    await until(lambda: front.engine.waiting)
    refusal = await refusal_of(front.inference.Generate(request(request_id="same")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    front.engine.admits = True
    front.engine.go_on()
    await first
    await front.inference.GenerateUnary(unary(request_id="same", sampling=tokens(1)))


async def test_a_full_queue_refuses_without_headers_and_says_when_to_come_back(start_front: Start) -> None:
    front = await start_front(admission=AdmissionLimits(max_waiting=3))
    front.engine.admits = False
    waiting = [front.inference.GenerateUnary(unary(sampling=tokens(1))) for _ in range(3)]
    await until(lambda: len(front.engine.waiting) == 3)
    call = front.inference.Generate(request())
    refusal = await refusal_of(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refusal.retry_seconds is not None
    assert refusal.retry_seconds > 0
    assert int(refusal.trailers["grpc-retry-pushback-ms"]) == round(refusal.retry_seconds * 1000)
    assert not await call.initial_metadata()
    front.engine.admits = True
    front.engine.go_on()
    await asyncio.gather(*waiting)


async def test_what_runs_takes_no_place_in_the_queue(start_front: Start) -> None:
    front = await start_front(
        admission=AdmissionLimits(max_waiting=1), script=lambda prompt, offset, choice: "x"
    )
    front.engine.preempted = {0}
    calls = []
    for number in range(1, 4):
        calls.append(front.inference.GenerateUnary(unary(sampling=tokens(1))))
        await until(lambda: len(front.engine.running) == number)  # noqa: B023  awaited here
        await asyncio.sleep(0.05)
    front.engine.preempted = set()
    front.engine.go_on()
    await asyncio.gather(*calls)


async def test_a_cancelled_rpc_ends_the_request_in_the_engine(start_front: Start) -> None:
    front = await start_front(step_seconds=0.005)
    call = front.inference.Generate(request())
    async for response in call:
        if response.batch.deltas:
            break
    call.cancel()
    await until(lambda: not front.engine.running)
    assert [finish.reason for finish in front.engine.sent(Finish)] == ["cancelled"]


LEAVING_CLIENT = """
import sys, grpc
from tidegate.v1 import inference_pb2, inference_pb2_grpc
stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
for _ in stub.Generate(inference_pb2.GenerateRequest(prompt={"text": "x"})):
    print(flush=True)
"""


async def test_a_client_that_is_killed_frees_its_requests(start_front: Start) -> None:
    front = await start_front(step_seconds=0.005)
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LEAVING_CLIENT, front.server.addresses[0], stdout=asyncio.subprocess.PIPE
    )
    assert client.stdout is not None
    await client.stdout.readline()
    client.kill()
    await client.communicate()
    await until(lambda: not front.engine.running and front.engine.sent(Finish))


@pytest.fixture
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 30 s until a deadline 28 are left to deliver what there is, however slow the machine."""
    monkeypatch.setattr("tidegate.service.call.DEADLINE_MARGIN", 28.0)


@pytest.mark.usefixtures("busy_machine")
async def test_a_little_before_the_deadline_what_there_is_ends_with_ok(start_front: Start) -> None:
    front = await start_front(step_seconds=0.02)  # 40 s to the end of the context
    await front.channel.channel_ready()
    calls = [front.inference.GenerateUnary(unary(), timeout=30) for _ in range(3)]
    for response in await asyncio.gather(*calls):
        (end,) = response.finished.choices
        assert end.reason == events_pb2.FINISH_REASON_DEADLINE
        assert 0 < end.output_tokens == len(response.completions[0].token_ids)
    await until(lambda: not front.engine.running)


@pytest.mark.usefixtures("busy_machine")
async def test_a_step_longer_than_the_time_left_does_not_hold_up_the_end(start_front: Start) -> None:
    front = await start_front(step_seconds=0.02, script=lambda prompt, offset, choice: "x")
    await front.channel.channel_ready()
    events = []
    async for response in front.inference.Generate(request(sampling=tokens(2000)), timeout=30):
        events.append(response)
        front.engine.step_seconds = 60.0
    assert events[-1].finished.choices[0].reason == events_pb2.FINISH_REASON_DEADLINE


async def test_a_deadline_in_the_queue_is_deadline_exceeded(front: Front) -> None:
    front.engine.admits = False
    refusal = await refusal_of(
        front.inference.Generate(request(time_limit=Duration(nanos=50_000_000)), timeout=10)
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_LIMIT")
    await until(lambda: not front.engine.waiting)


async def test_the_earlier_of_deadline_and_time_limit_counts(start_front: Start) -> None:
    front = await start_front(step_seconds=0.01)  # at the deadline, the context would have been full for long
    response = await front.inference.GenerateUnary(unary(time_limit=Duration(seconds=2)), timeout=60)
    assert response.finished.choices[0].reason == events_pb2.FINISH_REASON_DEADLINE


async def test_a_reader_that_does_not_read_holds_the_engine_back(start_front: Start) -> None:
    """Buffers of the transport take some; behind them the engine stops at a fixed distance."""
    front = await start_front(script=lambda prompt, offset, choice: "x")
    small = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
    async with grpc.aio.insecure_channel(front.server.addresses[0], options=small) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            request(sampling={"n": 8, "max_tokens": 2000, "logprobs": 20})
        )
        engine = front.engine
        await until(lambda: engine.running and all(choice.stalled for choice in engine.running))
        granted = [UNREAD_TOKENS, *(limit.emit_upto for limit in engine.sent(Limit))]
        assert {len(choice.tokens) for choice in engine.running} == {granted[-1]}
        assert granted[-1] < 2000
        assert (await kinds(call))[-1] == "finished"


async def test_a_reader_that_takes_nothing_for_too_long_loses_its_request(start_front: Start) -> None:
    """gRPC's keepalive does not see a peer that is frozen: it waits behind what cannot be written."""
    front = await start_front(limits=SessionLimits(MAX_MESSAGE_BYTES, stall_limit=0.5))
    small = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
    async with grpc.aio.insecure_channel(front.server.addresses[0], options=small) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            request(sampling={"max_tokens": 2000, "logprobs": 20})
        )
        await until(lambda: front.engine.sent(Finish))
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_TOO_SLOW")


async def test_a_choice_that_lags_holds_the_others_back_no_longer_than_it_runs(start_front: Start) -> None:
    front = await start_front(script=lambda prompt, offset, choice: EOS if choice == 1 else "x")
    front.engine.preempted = {1}
    call = front.inference.Generate(request(sampling={"n": 2, "max_tokens": 2000}))
    reading = asyncio.create_task(kinds(call))
    await until(lambda: front.engine.running and front.engine.running[0].stalled)
    front.engine.preempted = set()
    front.engine.go_on()
    assert (await asyncio.wait_for(reading, SECONDS))[-1] == "finished"


async def test_a_fault_of_the_engine_is_internal_with_its_reason(front: Front) -> None:
    refusal = await refusal_of(front.inference.Generate(request(f"secret{POISON}")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "NONFINITE_LOGITS")
    assert "secret" not in refusal.message


async def test_tokenize_and_detokenize_are_inverse(front: Front) -> None:
    answer = await front.inference.Tokenize(inference_pb2.TokenizeRequest(prompt={"text": "Flut 潮"}))
    assert list(answer.token_ids) == front.text.encode("Flut 潮")
    back = await front.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == "Flut 潮"
    ids = front.text.encode(f"a{EOS}")
    kept = await front.inference.Detokenize(
        inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)
    )
    left_out = await front.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids))
    assert (kept.text, left_out.text) == (f"a{EOS}", "a")
    refusal = await refusal_of(
        front.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[5, 10**6]))
    )
    assert list(refusal.violations) == ["token_ids[1]"]


async def test_a_time_limit_longer_than_any_clock_is_none(front: Front) -> None:
    response = await front.inference.GenerateUnary(
        unary(sampling=tokens(2), time_limit=Duration(seconds=2**62, nanos=-5))
    )
    assert response.finished.usage.output_tokens == 2


async def test_whatever_bytes_come_in_the_status_is_one_of_the_table(start_front: Start) -> None:
    """Valid requests with some of their bytes changed, and bytes of no meaning."""
    front = await start_front(script=lambda prompt, offset, choice: "x")
    call = front.channel.unary_unary(
        "/tidegate.v1.InferenceService/GenerateUnary", request_serializer=bytes, response_deserializer=bytes
    )
    seed = 7
    rng = random.Random(seed)
    whole = unary(
        request_id="fuzz",
        model="fake",
        priority=3,
        generated_token_ids=[5],
        time_limit=Duration(nanos=30_000_000),
        sampling={"max_tokens": 3, "temperature": 0.5, "stop": ["a", "bc"], "logprobs": 1, "seed": 9},
    ).SerializeToString()
    codes: Counter[str] = Counter()
    for _ in range(300):
        message = bytearray(whole if rng.random() < 0.9 else rng.randbytes(rng.randrange(40)))
        for _ in range(rng.randrange(4)):
            if message:
                message[rng.randrange(len(message))] = rng.randrange(256)
        try:
            await call(message, timeout=10)
            codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            refusal = read_error(error)
            assert CODES[refusal.reason] == refusal.code, (seed, bytes(message))
            assert refusal.reason != "INTERNAL", (seed, bytes(message))
            codes[refusal.code.name] += 1
    assert codes["OK"] > 10
    assert codes["INVALID_ARGUMENT"] > 10


async def test_a_model_without_a_chat_template_takes_no_chat(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front.text, "_render", None)
    chat = {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}
    refusal = await refusal_of(
        front.inference.GenerateUnary(inference_pb2.GenerateUnaryRequest(prompt={"chat": chat}))
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE")
