"""Other people's protocols: what their clients send, in their own words, and what becomes of it."""

import asyncio
import hashlib
import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fake_engine import EOS, POISON
from front import SECONDS, Front, refusal_of, until
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.compat.kserve import grpc_service_pb2 as kserve_pb2
from tidegate.compat.kserve import grpc_service_pb2_grpc as kserve_grpc
from tidegate.compat.openengine import openengine_pb2, openengine_pb2_grpc
from tidegate.compat.vllm import common_pb2, engine_pb2, engine_pb2_grpc
from tidegate.engine.demo import checkpoint_path
from tidegate.engine.messages import Finish, Submit
from tidegate.engine.request import SamplingParams, StructuredOutput
from tidegate.service.compat import vllm as vllm_door
from tidegate.service.compat.protocols import PROTOCOLS, SERVICES, Compat
from tidegate.v1 import inference_pb2

DEMO = checkpoint_path()
TOKENIZER = (DEMO / "tokenizer.json").read_bytes()


@pytest.fixture
async def front(start_front: Callable[..., Any]) -> Front:
    started: Front = await start_front(compat=Compat(PROTOCOLS, DEMO, max_num_seqs=7))
    return started


def vllm(front: Front) -> Any:
    return engine_pb2_grpc.VllmEngineStub(front.channel)


def kserve(front: Front) -> Any:
    return kserve_grpc.GRPCInferenceServiceStub(front.channel)


def vllm_request(
    front: Front, text: str, *, stream: bool = True, **sampling: Any
) -> engine_pb2.GenerateRequest:
    ids = engine_pb2.TokenizedInput(input_ids=front.text.encode(text))
    params = engine_pb2.SamplingParams(**{"temperature": 0, **sampling})
    return engine_pb2.GenerateRequest(request_id="r", tokenized=ids, sampling_params=params, stream=stream)


async def native(front: Front, text: str, **sampling: Any) -> Any:
    request = inference_pb2.GenerateUnaryRequest(prompt={"text": text}, sampling=sampling)
    return await front.inference.GenerateUnary(request)


# --- vllm.grpc.engine --------------------------------------------------------------------------------------


async def test_chunks_add_up_to_what_the_native_api_gives(front: Front) -> None:
    whole = await native(front, "the tide", max_tokens=9, n=2)
    responses = [r async for r in vllm(front).Generate(vllm_request(front, "the tide", max_tokens=9, n=2))]
    chunks = [r.chunk for r in responses if r.HasField("chunk")]
    ends = {r.complete.index: r.complete for r in responses if r.HasField("complete")}
    for completion in whole.completions:
        own = [chunk for chunk in chunks if chunk.index == completion.choice]
        ids = [token_id for chunk in own for token_id in chunk.token_ids]
        assert ids == list(completion.token_ids) == list(ends[completion.choice].output_ids)
        assert sum(chunk.completion_tokens for chunk in own) == 9
        assert ends[completion.choice].finish_reason == "length"
        assert ends[completion.choice].prompt_tokens == len(front.text.encode("the tide"))
    assert [r.HasField("complete") for r in responses[-2:]] == [True, True]


async def test_without_stream_the_end_alone_holds_everything(front: Front) -> None:
    whole = await native(front, "the tide", max_tokens=20)
    stop = whole.completions[0].text[4:7]
    wanted = await native(front, "the tide", max_tokens=20, stop=[stop])
    request = vllm_request(front, "the tide", stream=False, max_tokens=20, stop=[stop], logprobs=2)
    (response,) = [r async for r in vllm(front).Generate(request)]
    assert list(response.complete.output_ids) == list(wanted.completions[0].token_ids)
    assert (response.complete.finish_reason, response.complete.matched_stop_str) == ("stop", stop)
    assert len(response.complete.output_logprobs.token_logprobs) == len(response.complete.output_ids)


async def test_what_we_cannot_do_is_refused_by_name_and_all_at_once(front: Front) -> None:
    request = vllm_request(
        front, "x", grammar="root ::= x", logit_bias={-1: 2.0}, prompt_logprobs=-1, logprobs=-1
    )
    request.mm_inputs.SetInParent()
    request.kv_transfer_params_json = "{}"
    refusal = await refusal_of(vllm(front).Generate(request))
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.violations) == {
        "mm_inputs",
        "kv_transfer_params_json",
        "sampling_params.grammar",
        "sampling_params.logit_bias",
        "sampling_params.prompt_logprobs",
        "sampling_params.logprobs",
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_of_the_prompt_come_once_and_whole(front: Front, stream: bool) -> None:
    text = "the tide comes in; " * 9
    request = vllm_request(front, text, stream=stream, prompt_logprobs=20, max_tokens=4, n=2)
    responses = [r async for r in vllm(front).Generate(request)]
    whole = await front.inference.GenerateUnary(
        inference_pb2.GenerateUnaryRequest(
            prompt={"text": text}, sampling={"prompt_logprobs": 20, "max_tokens": 4}
        )
    )
    chunks = [r.chunk for r in responses if r.HasField("chunk")]
    having = [index for index, chunk in enumerate(chunks) if chunk.HasField("input_logprobs")]
    assert having == ([0] if stream else [])
    told = [r.complete.input_logprobs for r in responses if r.HasField("complete")]
    for logprobs in (*told, *(chunk.input_logprobs for chunk in chunks[:1])):
        assert list(logprobs.token_ids) == front.text.encode(text)
        first, *others = logprobs.token_logprobs
        assert not first.HasField("value")
        assert [one.value for one in others] == [p.chosen.logprob for p in whole.prompt_logprobs]
        assert [list(top.token_ids) for top in logprobs.top_logprobs] == [
            [],
            *([one.token_id for one in position.top] for position in whole.prompt_logprobs),
        ]


async def test_more_logprobs_of_a_prompt_than_a_message_holds_are_refused(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_door, "MAX_UNARY_PROMPT_LOGPROBS", 41)
    refusal = await refusal_of(vllm(front).Generate(vllm_request(front, "xx", prompt_logprobs=20)))
    assert list(refusal.violations) == ["sampling_params.prompt_logprobs"]
    assert not front.engine.running


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"json_schema": '{"type": "null"}'}, {"json_schema": '{"type": "null"}'}),
        ({"json_object": True}, {"json_schema": '{"type": "object"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": {"choices": ["a", "b"]}}, {"choices": ("a", "b")}),
    ],
)
async def test_a_constraint_reaches_the_engine(
    front: Front, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    async for _ in vllm(front).Generate(vllm_request(front, "x", max_tokens=1, **theirs)):
        pass
    (submit,) = front.engine.sent(Submit)
    form = submit.request.params.structured_output
    assert {name: getattr(form, name) for name in ours} == ours


async def test_a_bias_reaches_the_engine(front: Front) -> None:
    async for _ in vllm(front).Generate(vllm_request(front, "x", max_tokens=1, logit_bias={5: -1.5})):
        pass
    (submit,) = front.engine.sent(Submit)
    assert submit.request.params.logit_bias == {5: -1.5}


async def test_an_abort_ends_the_stream_as_aborted_and_may_come_again(front: Front) -> None:
    front.engine.step_seconds = 0.01
    call = vllm(front).Generate(vllm_request(front, "the tide", max_tokens=900, ignore_eos=True))
    async for response in call:
        if response.HasField("chunk"):
            await vllm(front).Abort(engine_pb2.AbortRequest(request_ids=["r", "unknown"]))
    assert response.complete.finish_reason == "abort"
    await until(lambda: not front.engine.running)


async def test_a_gateway_finds_model_tokenizer_and_load(front: Front) -> None:
    model = await vllm(front).GetModelInfo(engine_pb2.GetModelInfoRequest())
    assert (model.served_model_name, model.model_type, model.is_generation) == ("fake", "llama", True)
    assert (await vllm(front).GetServerInfo(engine_pb2.GetServerInfoRequest())).max_num_seqs == 7
    assert (await vllm(front).HealthCheck(engine_pb2.HealthCheckRequest())).healthy
    (load,) = (await vllm(front).GetLoads(engine_pb2.GetLoadsRequest())).loads
    assert load.max_total_num_tokens == 64 * 16
    chunks = [c async for c in vllm(front).GetTokenizer(common_pb2.GetTokenizerRequest())]
    archive = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
    assert chunks[-1].sha256 == hashlib.sha256(archive).hexdigest()
    assert max(len(chunk.data) for chunk in chunks) <= 64 * 1024
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        assert files.read("tokenizer.json") == TOKENIZER


# --- openengine.v1 ------------------------------------------------------------------------------------------


def inference(front: Front) -> Any:
    return openengine_pb2_grpc.InferenceStub(front.channel)


def control(front: Front) -> Any:
    return openengine_pb2_grpc.ControlStub(front.channel)


def dynamo_request(front: Front, text: str, *, stop: list[Any] | None = None, **stopping: Any) -> Any:
    """As Dynamo's sidecar fills it in: token ids, the path where it has the tokenizer, and no text wanted."""
    request = openengine_pb2.GenerateRequest(
        request_id="r",
        model="/models/fake",
        token_ids=openengine_pb2.TokenIds(ids=front.text.encode(text)),
        sampling=openengine_pb2.SamplingParams(temperature=0, num_sequences=1),
        stopping=openengine_pb2.StoppingOptions(**stopping),
        response=openengine_pb2.ResponseOptions(return_output_logprobs=False),
    )
    for condition in stop or ():
        kind = "stop_text" if isinstance(condition, str) else "stop_token_id"
        request.stopping.conditions.add(**{kind: condition})
    request.extra["detokenize"] = False
    return request


SIDECARS_OWN = bytes.fromhex(
    "0a2462643064653333332d616538372d343937632d613462352d623063383234383037646464120464656d6f220a0a08f603f7"
    "038502af032a3c09000000000000e03f11000000000000e83f180521000000000000c03f29000000000000e03f310000000000"
    "00d03f39000000000000f83f40074801320d080810031a030a012e1a0210033a0618012202080262120a100a0a6465746f6b65"
    "6e697a6512022000"
)
"""A request as the sidecar of Dynamo 1.6.1 wrote it."""


async def test_all_that_dynamo_says_of_sampling_reaches_the_engine(front: Front) -> None:
    request = openengine_pb2.GenerateRequest.FromString(SIDECARS_OWN)
    assert list(request.token_ids.ids) == [502, 503, 261, 431]
    assert list(UnknownFieldSet(request)) == []
    request.token_ids.ids[:] = [1, 2, 3]
    request.model = "fake"
    async for _ in inference(front).Generate(request):
        pass
    (submit,) = front.engine.sent(Submit)
    assert submit.request.prompt_token_ids == [1, 2, 3]
    assert submit.request.params == SamplingParams(
        temperature=0.5,
        top_p=0.75,
        top_k=5,
        min_p=0.125,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        repetition_penalty=1.5,
        seed=7,
        max_tokens=8,
        min_tokens=3,
        stop=(".",),
        stop_token_ids=(3,),
        logprobs=2,
    )


@pytest.mark.parametrize(
    ("guided", "ours"),
    [
        ({"json_schema": '{"type": "null"}'}, {"json_schema": '{"type": "null"}'}),
        ({"json_object": {}}, {"json_schema": '{"type": "object"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": {"choices": ["a", "b"]}}, {"choices": ("a", "b")}),
    ],
)
async def test_a_guide_reaches_the_engine(front: Front, guided: dict[str, Any], ours: dict[str, Any]) -> None:
    request = dynamo_request(front, "x", max_tokens=1)
    request.guided.CopyFrom(openengine_pb2.GuidedDecoding(**guided))
    async for _ in inference(front).Generate(request):
        pass
    (submit,) = front.engine.sent(Submit)
    assert submit.request.params.structured_output == StructuredOutput(**ours)


@pytest.mark.parametrize("guided", [{}, {"choice": {}}])
async def test_a_guide_that_says_nothing_is_refused(front: Front, guided: dict[str, Any]) -> None:
    request = dynamo_request(front, "x")
    request.guided.CopyFrom(openengine_pb2.GuidedDecoding(**guided))
    refusal = await refusal_of(inference(front).Generate(request))
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert not front.engine.commands


async def test_what_is_not_served_of_the_protocol_is_unimplemented(front: Front) -> None:
    call = front.channel.unary_unary("/openengine.v1.Control/ListLoras")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def read_all(call: Any) -> tuple[dict[int, list[Any]], dict[int, Any]]:
    """The tokens of each output, and its end."""
    tokens: dict[int, list[Any]] = {}
    ends = {}
    async for response in call:
        assert response.request_id == "r"
        if response.WhichOneof("event") == "token":
            assert response.token.HasField("output_index")
            assert response.token.output_index not in ends
            tokens.setdefault(response.token.output_index, []).extend(response.token.tokens)
        else:
            assert response.finished.HasField("output_index")
            ends[response.finished.output_index] = response
    return tokens, ends


async def test_outputs_add_up_to_what_the_native_api_gives_and_usage_comes_last(front: Front) -> None:
    whole = await native(front, "the tide", max_tokens=9, n=2)
    request = dynamo_request(front, "the tide", max_tokens=9)
    request.sampling.num_sequences = 2
    tokens, ends = await read_all(inference(front).Generate(request))
    for completion in whole.completions:
        assert [info.token_id for info in tokens[completion.choice]] == list(completion.token_ids)
        assert ends[completion.choice].finished.reason == openengine_pb2.FINISH_REASON_LENGTH
    first, last = ends.values()
    assert not first.HasField("usage")
    prompt_tokens = len(front.text.encode("the tide"))
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt_tokens, 18)
    assert last.usage.total_tokens == prompt_tokens + 18


@pytest.mark.parametrize("wanted", [True, False])
async def test_text_comes_where_the_client_does_not_make_it_itself(front: Front, wanted: bool) -> None:
    request = dynamo_request(front, "", max_tokens=9)
    request.prompt = "the tide"
    if wanted:
        request.ClearField("extra")
    texts = [response.token.text async for response in inference(front).Generate(request)]
    assert "".join(texts) == (front.engine.expected("the tide", 9) if wanted else "")


async def test_logprobs_come_with_as_many_candidates_as_were_asked_for(front: Front) -> None:
    request = dynamo_request(front, "the tide", max_tokens=3)
    request.response.return_output_logprobs = True
    request.response.output_candidates.top_n = 2
    tokens, _ = await read_all(inference(front).Generate(request))
    for info in tokens[0]:
        assert (info.logprob, info.rank) == (-0.5, 1)
        assert [(candidate.logprob, candidate.rank) for candidate in info.candidates] == [(-1, 1), (-2, 2)]


async def test_an_end_names_the_condition_that_matched(start_front: Callable[..., Any]) -> None:
    front = await start_front(
        compat=Compat(PROTOCOLS, DEMO, max_num_seqs=7),
        script=lambda prompt, offset, choice: ["a", "b", "c", EOS][offset],
    )
    (b,), (eos,) = front.text.encode("b"), front.text.encode(EOS)
    for stop, kind, value in (
        (["bc"], "stop_text", "bc"),
        ([b], "stop_token_id", b),
        # Dynamo names the model's end token beside those that its caller asked for.
        ([eos], "eos_token_id", eos),
        ([], "eos_token_id", eos),
    ):
        _, ends = await read_all(inference(front).Generate(dynamo_request(front, "x", stop=stop)))
        finished = ends[0].finished
        assert finished.reason == openengine_pb2.FINISH_REASON_STOP
        assert finished.stop_match.WhichOneof("match") == kind
        assert getattr(finished.stop_match, kind) == value


async def test_what_an_engine_of_dynamo_may_be_asked_for_and_we_cannot_do_is_refused(front: Front) -> None:
    request = dynamo_request(front, "x")
    request.kv.session.SetInParent()
    request.kv.cache_salt = "salt"
    request.kv.bypass_prefix_cache = True
    request.guided.ebnf_grammar = 'root ::= "a"'
    request.guided.backend = "xgrammar"
    request.media.add()
    request.lora_name = "adapter"
    request.extra["request_type"] = "context_only"
    request.response.return_prompt_logprobs = True
    request.response.prompt_candidates.top_n = 1
    request.response.output_candidates.all.SetInParent()
    request.sampling.top_k = -2
    request.stopping.conditions.add()
    refusal = await refusal_of(inference(front).Generate(request))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert set(refusal.violations) == {
        "kv.session",
        "kv.cache_salt",
        "kv.bypass_prefix_cache",
        "guided.ebnf_grammar",
        "guided.backend",
        "media",
        "lora_name",
        "extra.request_type",
        "response.return_prompt_logprobs",
        "response.prompt_candidates",
        "response.output_candidates.all",
        "sampling.top_k",
        "stopping.conditions[0]",
    }
    assert not front.engine.commands


async def test_another_model_is_not_found_and_a_path_is_no_model(front: Front) -> None:
    for name in ("", "fake", "/anywhere/else", "./here"):
        model = await control(front).GetModelInfo(openengine_pb2.GetModelInfoRequest(model=name))
        assert (model.served_model_name, model.max_context_length) == ("fake", 2048)
    request = dynamo_request(front, "x", max_tokens=1)
    request.model = "other/model"
    for call in (
        control(front).GetModelInfo(openengine_pb2.GetModelInfoRequest(model="other/model")),
        inference(front).Generate(request),
    ):
        assert (await refusal_of(call)).reason == "MODEL_NOT_FOUND"


async def test_a_refusal_is_a_status_and_a_later_failure_an_event(front: Front) -> None:
    refusal = await refusal_of(inference(front).Generate(dynamo_request(front, "x", max_tokens=10**6)))
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    call = inference(front).Generate(dynamo_request(front, f"the tide{POISON}", max_tokens=9))
    (response,) = [response async for response in call]
    assert response.error.code == openengine_pb2.ERROR_CODE_INTERNAL
    assert response.error.details["reason"] == "NONFINITE_LOGITS"
    assert not response.error.retryable
    assert await call.code() == grpc.StatusCode.OK


async def test_a_client_that_leaves_cancels_and_aborts_in_either_order(front: Front) -> None:
    front.engine.step_seconds = 0.01
    abort = openengine_pb2.AbortRequest(request_id="r")
    call = inference(front).Generate(dynamo_request(front, "the tide", max_tokens=900, ignore_eos=True))
    async for response in call:
        if response.HasField("token"):
            assert (await control(front).Abort(abort)).status in (
                openengine_pb2.ABORT_STATUS_ABORTED,
                openengine_pb2.ABORT_STATUS_ALREADY_FINISHED,  # it ended while this came
            )
    assert response.finished.reason == openengine_pb2.FINISH_REASON_CANCELLED
    await until(lambda: not front.engine.running)

    call = inference(front).Generate(dynamo_request(front, "the tide", max_tokens=900, ignore_eos=True))
    await call.read()
    call.cancel()
    await until(lambda: not front.engine.running)
    for _ in range(2):
        answer = await control(front).Abort(abort)
        assert answer.status == openengine_pb2.ABORT_STATUS_ALREADY_FINISHED


async def test_a_stream_that_is_cancelled_behind_its_end_is_no_abort(front: Front) -> None:
    call = inference(front).Generate(dynamo_request(front, "the tide", max_tokens=9))
    while not (await call.read()).HasField("finished"):
        pass
    call.cancel()
    # The id is free again, so the first request is over for the server, too.
    await read_all(inference(front).Generate(dynamo_request(front, "the tide", max_tokens=9)))
    assert front.engine.sent(Finish) == []


@pytest.mark.parametrize(
    ("target", "field"),
    [({}, "request_id"), ({"all_requests": {}}, "all_requests"), ({"kv_session": {}}, "kv_session")],
)
async def test_an_abort_of_anything_but_a_request_is_refused(
    front: Front, target: dict[str, Any], field: str
) -> None:
    refusal = await refusal_of(control(front).Abort(openengine_pb2.AbortRequest(**target)))
    assert set(refusal.violations) == {field}


async def test_a_framework_finds_server_capabilities_load_and_health(front: Front) -> None:
    server = await control(front).GetServerInfo(openengine_pb2.GetServerInfoRequest())
    assert (server.engine_name, list(server.supported_models)) == ("tidegate", ["fake"])
    assert (server.schema_revision, server.minimum_client_revision) == (1, 1)
    assert (server.capacity.kv_block_size, server.capacity.total_kv_blocks) == (16, 64)
    assert server.capacity.max_running_requests == 7
    model = await control(front).GetModelInfo(openengine_pb2.GetModelInfoRequest(model="fake"))
    assert model.generation.output_logprobs.supported
    assert model.generation.guided_decoding.supported
    front.engine.step_seconds = 0.01
    call = inference(front).Generate(dynamo_request(front, "the tide", max_tokens=900, ignore_eos=True))
    await call.read()
    load = await control(front).GetLoad(openengine_pb2.GetLoadRequest())
    assert (load.running_requests, load.used_kv_blocks, load.total_kv_blocks) == (1, 1, 64)
    health = await control(front).Health(openengine_pb2.HealthRequest())
    assert health.state == openengine_pb2.HEALTH_STATE_READY
    refusal = await refusal_of(
        control(front).Health(openengine_pb2.HealthRequest(include_inference_probe=True))
    )
    assert set(refusal.violations) == {"include_inference_probe"}
    draining = asyncio.create_task(front.server.drain(SECONDS))
    await asyncio.sleep(0)  # it has begun; the request under way keeps it from ending
    health = await control(front).Health(openengine_pb2.HealthRequest())
    assert health.state == openengine_pb2.HEALTH_STATE_DRAINING
    call.cancel()
    await draining


# --- KServe ------------------------------------------------------------------------------------------------


def infer_request(text: str, request_id: str = "", *, raw: bool = False, **parameters: Any) -> Any:
    request = kserve_pb2.ModelInferRequest(model_name="fake", id=request_id)
    data = text.encode()
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    if raw:
        request.raw_input_contents.append(struct.pack("<I", len(data)) + data)
    else:
        tensor.contents.bytes_contents.append(data)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[
            type(value)
        ]
        setattr(request.parameters[name], kind, value)
    return request


def set_sampling_parameters(request: Any, text: str) -> None:
    tensor = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())


def streamed(request: Any) -> Any:
    tensor = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    tensor.contents.bool_contents.append(True)
    return request


def text_of(response: Any) -> str:
    (raw,) = response.raw_output_contents
    text: str = raw[4:].decode()
    assert struct.unpack("<I", raw[:4]) == (len(raw) - 4,)
    return text


@pytest.mark.parametrize("raw", [False, True])
async def test_an_inference_gives_the_native_text(front: Front, raw: bool) -> None:
    wanted = await native(front, "the tide", max_tokens=9)
    request = infer_request("the tide", "me", raw=raw, max_tokens=9, temperature=0.0)
    response = await kserve(front).ModelInfer(request)
    assert (response.id, text_of(response)) == ("me", wanted.completions[0].text)
    assert response.parameters["finish_reason"].string_param == "max_tokens"


async def test_constraints_of_an_inference_reach_the_engine(front: Front) -> None:
    request = infer_request("x", max_tokens=1, bad_words="tide")
    set_sampling_parameters(
        request,
        """{
            "logit_bias": {"5": -1.5}, "allowed_token_ids": [5, 6],
            "structured_output": {"choices": {"values": ["a", "b"]}}
        }""",
    )
    await kserve(front).ModelInfer(request)
    (submit,) = front.engine.sent(Submit)
    params = submit.request.params
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == ({5: -1.5}, (5, 6), ("tide",))
    assert params.structured_output == StructuredOutput(choices=("a", "b"))


async def test_requests_of_a_stream_run_side_by_side_and_a_wrong_one_hurts_none(front: Front) -> None:
    front.engine.step_seconds = 0.005
    call = kserve(front).ModelStreamInfer()
    for request in (
        streamed(infer_request("the tide", "a", max_tokens=9)),
        infer_request("the tide", "wrong", colour="red"),
        streamed(infer_request("the gate", "b", max_tokens=5)),
    ):
        await call.write(request)
    await call.done_writing()
    texts, errors, ended = {"a": "", "b": ""}, [], []
    async for response in call:
        infer = response.infer_response
        if response.error_message:
            errors.append((infer.id, response.error_message))
            continue
        texts[infer.id] += text_of(infer)
        if infer.parameters["triton_final_response"].bool_param:
            ended.append(infer.id)
    assert sorted(ended) == ["a", "b"]
    assert texts["a"] == (await native(front, "the tide", max_tokens=9)).completions[0].text
    assert texts["b"] == (await native(front, "the gate", max_tokens=5)).completions[0].text
    ((wrong, message),) = errors
    assert wrong == "wrong"
    assert "parameters.colour" in message


async def test_a_stream_that_is_left_leaves_nothing_behind(front: Front) -> None:
    front.engine.step_seconds = 0.005
    call = kserve(front).ModelStreamInfer()
    for name in "abc":
        await call.write(streamed(infer_request("the tide", name, max_tokens=900, ignore_eos=True)))
    await call.read()
    call.cancel()
    await until(lambda: not front.engine.running)


async def test_a_message_that_cannot_be_read_ends_the_stream_with_its_status(front: Front) -> None:
    call = front.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer", lambda data: data, lambda data: data
    )()
    await call.write(b"\xff\xff")
    refusal = await refusal_of(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE_MESSAGE")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.ClearField("inputs"), "inputs.text_input"),
        (lambda r: r.inputs.add(name="image", datatype="BYTES"), "inputs.image"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "inputs.text_input"),
        (lambda r: r.raw_input_contents.append(b"\x09\x00\x00\x00ab"), "inputs.text_input"),
        (lambda r: setattr(r.parameters["n"], "int64_param", 2), "parameters.n"),
        (lambda r: set_sampling_parameters(r, '{"temprature": 1}'), "inputs.sampling_parameters"),
        (
            lambda r: set_sampling_parameters(r, '{"structured_output": {"json": 1}}'),
            "inputs.sampling_parameters",
        ),
        (lambda r: set_sampling_parameters(r, "[" * 100_000), "inputs.sampling_parameters"),
    ],
)
async def test_what_is_wrong_with_an_inference_is_named(front: Front, change: Any, field: str) -> None:
    request = infer_request("x")
    change(request)
    refusal = await refusal_of(kserve(front).ModelInfer(request))
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in refusal.violations


async def test_health_knows_the_protocols_by_their_services(front: Front) -> None:
    health = health_pb2_grpc.HealthStub(front.channel)
    for service in (service for services in SERVICES.values() for service in services):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_protocol_that_is_not_wanted_is_not_there(start_front: Callable[..., Any]) -> None:
    front = await start_front(compat=Compat(("kserve",), DEMO, max_num_seqs=7))
    assert (await kserve(front).ServerReady(kserve_pb2.ServerReadyRequest())).ready
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await vllm(front).HealthCheck(engine_pb2.HealthCheckRequest())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
