"""Request messages that no sane client sends: valid ones with some fields replaced, and broken bytes."""

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tidegate.compat.kserve import grpc_service_pb2
from tidegate.compat.openengine import openengine_pb2
from tidegate.compat.vllm import engine_pb2
from tidegate.v1 import control_pb2, inference_pb2, session_pb2

TEXTS = ["", "a", "the tide", "é\x00\n", "\U0001f30a\U0001f30a", "<|im_end|>", "x" * 300]
SMALL = [0, 1, 2, 3, 7, 40, 255, 287, 288]
LARGE = {32: [2**31 - 1, 2**32 - 1], 64: [2**31, 2**63 - 1, 2**64 - 1]}
DOUBLES = [0.0, 1.0, -1.0, 0.5, 2.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")]
CONSTRAINTS: list[dict[str, Any]] = [
    {"prompt_logprobs": 2},
    {"logit_bias": {7: 5.0}},
    {"allowed_token_ids": [7, 40]},
    {"allowed_token_ids": [10**6]},
    {"bad_words": ["a", "the tide"]},
    {"bad_words": [""]},
    {"structured_output": {"json_schema": '{"type": "object", "properties": {"a": {"type": "boolean"}}}'}},
    {"structured_output": {"json_schema": '{"type": "no type"}'}},
    {"structured_output": {"json_schema": "{"}},
    {"structured_output": {"regex": "(ab|\\d){1,3}"}},
    {"structured_output": {"regex": "(a"}},
    {"structured_output": {"grammar": 'start: "a" start | "b"'}},
    {"structured_output": {"grammar": "start: other"}},
    {"structured_output": {"choices": {"values": ["a", "the tide", "\U0001f30a"]}}},
    {"structured_output": {"choices": {}}},
    {"structured_output": {"choices": {"values": ["a"]}}, "bad_words": ["a"]},
    {"structured_output": {"regex": "the.*"}, "allowed_token_ids": [7]},
    {"structured_output": {"choices": {"values": ["aa"]}}, "bad_words": ["aa"]},
]
"""Of the output; some of them are none, and the last three contradict themselves."""

_F = FieldDescriptor
UNSIGNED = {_F.CPPTYPE_UINT32: 32, _F.CPPTYPE_UINT64: 64}
SIGNED = {_F.CPPTYPE_INT32: 32, _F.CPPTYPE_INT64: 64, _F.CPPTYPE_ENUM: 32}

UNARY: dict[str, Callable[[], Message]] = {
    "/tidegate.v1.InferenceService/GenerateUnary": inference_pb2.GenerateUnaryRequest,
    "/tidegate.v1.InferenceService/Tokenize": inference_pb2.TokenizeRequest,
    "/tidegate.v1.InferenceService/Detokenize": inference_pb2.DetokenizeRequest,
    "/tidegate.v1.InferenceService/CountTokens": inference_pb2.CountTokensRequest,
    "/tidegate.v1.ControlService/GetServerInfo": control_pb2.GetServerInfoRequest,
    "/tidegate.v1.ControlService/GetModelInfo": control_pb2.GetModelInfoRequest,
    "/tidegate.v1.ControlService/Inspect": control_pb2.InspectRequest,
    "/tidegate.v1.ControlService/ListSessions": control_pb2.ListSessionsRequest,
    "/tidegate.v1.ControlService/Abort": control_pb2.AbortRequest,
}
"""Methods, and the type of their one message."""
FOREIGN = {
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for file in (grpc_service_pb2.DESCRIPTOR, engine_pb2.DESCRIPTOR, openengine_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
    if not method.client_streaming
}
"""The same, of other people's protocols."""
STREAMING = "/tidegate.v1.InferenceService/Generate"
SESSION = "/tidegate.v1.InferenceService/Session"


class Fuzzer:
    """An endless supply from one seed."""

    def __init__(self, seed: int, model: str) -> None:
        self.random = random.Random(seed)
        self._model = model
        self._seed = seed
        self._num_sessions = 0
        self._ids: list[str] = []

    def unary(self) -> tuple[str, bytes]:
        """A method that takes one message, and the message."""
        rng = self.random
        if rng.random() < 0.2:
            method, kind = rng.choice(list(FOREIGN.items()))
            return method, self._finish(self._foreign(kind()))
        if rng.random() < 0.5:
            return STREAMING, self._finish(inference_pb2.GenerateRequest(**self._content()))
        method, make = rng.choice(list(UNARY.items()))
        message: Any = make()
        if isinstance(message, inference_pb2.GenerateUnaryRequest):
            message = inference_pb2.GenerateUnaryRequest(**self._content())
        elif isinstance(message, inference_pb2.TokenizeRequest | inference_pb2.CountTokensRequest):
            message.prompt.text = rng.choice(TEXTS)
        return method, self._finish(message)

    def opening(self) -> bytes:
        """The first message of a session, whose requests have ids that no other session uses."""
        self._num_sessions += 1
        self._ids = [f"{self._seed}-{self._num_sessions}-{index}" for index in range(24)]
        message = session_pb2.SessionRequest(open={})
        return message.SerializeToString() if self.random.random() < 0.95 else self._finish(message)

    def command(self) -> bytes:
        """Any later one."""
        rng = self.random
        name, parent = rng.choice(self._ids), rng.choice(self._ids)
        content = self._content()
        turn = {"parent_request_id": parent, "input": content["prompt"], "sampling": content["sampling"]}
        branch = {"request_id": name, "input": content["prompt"], "sampling": content["sampling"]}
        commands: list[tuple[int, dict[str, Any]]] = [
            (40, {"start": {"request_id": name, **content}}),
            (10, {"append_turn": {"request_id": name, **turn}}),
            (10, {"fork": {"parent_request_id": parent, "branches": [branch]}}),
            (10, {"update": {"request_id": name, "max_tokens": rng.choice(SMALL)}}),
            (10, {"cancel": {"request_id": name}}),
            (10, {"credit": {"request_id": name, "upto": rng.choice(SMALL)}}),
            (10, {"ack": {"request_id": name, "upto": rng.choice(SMALL)}}),
        ]
        (chosen,) = rng.choices([c for _, c in commands], [weight for weight, _ in commands])
        # Rarely broken: the session would end there.
        return self._finish(session_pb2.SessionRequest(**chosen), broken=0.003)

    def closing(self) -> list[bytes]:
        """Ends every request of a session, and then the session."""
        commands = [{"cancel": {"request_id": name}} for name in (*self._ids, *TEXTS)]
        return [session_pb2.SessionRequest(**c).SerializeToString() for c in [*commands, {"close": {}}]]

    def _content(self) -> dict[str, Any]:
        rng = self.random
        sampling = {
            "max_tokens": rng.randrange(1, 5),
            "temperature": rng.choice([0, 0.7]),
            "ignore_eos": True,
            **(rng.choice(CONSTRAINTS) if rng.random() < 0.5 else {}),
        }
        return {"prompt": {"text": rng.choice(TEXTS[1:])}, "sampling": sampling}

    def _foreign(self, message: Any) -> Any:
        """A request of another protocol that makes sense, or an empty message."""
        rng, ids = self.random, [1 + self.random.randrange(100) for _ in range(4)]
        name = f"{self._seed}-foreign-{rng.randrange(10**9)}"
        match message:
            case engine_pb2.GenerateRequest():
                params = {"max_tokens": rng.randrange(1, 5), "temperature": 0.7}
                prompt = {"input_ids": ids}
                return type(message)(request_id=name, tokenized=prompt, sampling_params=params, stream=True)
            case openengine_pb2.GenerateRequest():
                stopping = {"max_tokens": rng.randrange(1, 5)}
                return type(message)(request_id=name, token_ids={"ids": ids}, stopping=stopping)
            case grpc_service_pb2.ModelInferRequest():
                message.model_name = self._model
                text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
                text.contents.bytes_contents.append(rng.choice(TEXTS).encode())
                message.parameters["max_tokens"].int64_param = rng.randrange(1, 5)
        return message

    def _finish(self, message: Message, broken: float = 0.05) -> bytes:
        """As it is, with fields replaced, or with this probability broken."""
        rng = self.random
        if rng.random() < 0.7:
            for _ in range(rng.randrange(1, 4)):
                self._replace_field(message)
        data = message.SerializeToString()
        if rng.random() < broken:
            worse = self._broken(data)
            # A lease that a broken bit made long would hold its blocks beyond the test, and rightly so.
            if not _has_lease(type(message), worse):
                return worse
        return data

    def _replace_field(self, message: Message) -> None:
        rng = self.random
        descriptors = message.DESCRIPTOR.fields
        # Mostly inside of what is there: a new member of a oneof would take everything else away.
        present = [field for field, _ in message.ListFields()]
        nested = [f for f in present if f.cpp_type == _F.CPPTYPE_MESSAGE and not f.is_repeated]
        if nested and rng.random() < 0.8:
            self._replace_field(getattr(message, rng.choice(nested).name))
        elif descriptors:
            field = rng.choice(descriptors)
            oneof = field.containing_oneof
            if oneof is None or len(oneof.fields) == 1 or rng.random() < 0.02:
                self._set(message, field)

    def _set(self, message: Message, field: FieldDescriptor) -> None:
        rng, name = self.random, field.name
        if rng.random() < 0.1:
            message.ClearField(name)
        elif field.is_repeated:
            values: Any = getattr(message, name)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                key, value = field.message_type.fields
                if value.cpp_type == _F.CPPTYPE_MESSAGE:
                    self._fill(values[self._value(key)])
                else:
                    values[self._value(key)] = self._value(value)
            elif field.cpp_type == _F.CPPTYPE_MESSAGE:
                self._fill(values.add())
            else:
                values.extend(self._value(field) for _ in range(rng.choice([1, 2, 40])))
        elif field.cpp_type == _F.CPPTYPE_MESSAGE:
            self._fill(getattr(message, name))
        else:
            setattr(message, name, self._value(field))

    def _fill(self, message: Message) -> None:
        message.SetInParent()
        for field in message.DESCRIPTOR.fields:
            if self.random.random() < 0.4:
                self._set(message, field)

    def _value(self, field: FieldDescriptor) -> Any:
        rng, kind = self.random, field.cpp_type
        if kind in UNSIGNED:
            return rng.choice(SMALL if rng.random() < 0.7 else LARGE[UNSIGNED[kind]])
        if kind in SIGNED:
            most = 2 ** (SIGNED[kind] - 1)
            return rng.choice([0, 1, -1, 3, most - 1, -most])
        if kind in (_F.CPPTYPE_DOUBLE, _F.CPPTYPE_FLOAT):
            return rng.choice(DOUBLES)
        if kind == _F.CPPTYPE_BOOL:
            return rng.random() < 0.5
        text = rng.choice(TEXTS)
        return text if field.type == _F.TYPE_STRING else text.encode()

    def _broken(self, data: bytes) -> bytes:
        rng = self.random
        broken = bytearray(data)
        match rng.randrange(4):
            case 0:
                del broken[rng.randrange(len(broken) + 1) :]
            case 1:
                for _ in range(rng.randrange(1, 5)):
                    if broken:
                        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            case 2:
                place = rng.randrange(len(broken) + 1)
                broken[place:place] = rng.randbytes(rng.randrange(1, 20))
            case _:
                broken = bytearray(rng.randbytes(rng.randrange(200)))
        return bytes(broken)


def _has_lease(kind: type[Message], data: bytes) -> bool:
    try:
        return "time_to_live" in str(kind.FromString(data))
    except DecodeError:
        return False
