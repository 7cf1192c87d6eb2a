"""Triton's own client against us: ``kserve.py FEATURE ADDRESS`` in an environment that has tritonclient."""

import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

MODEL = "demo"
SECONDS = 60


def tensors(text: str, *, stream: bool) -> list[Any]:
    prompt = triton.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([text.encode()], object))
    flag = triton.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    return [prompt, flag]


def whole(client: Any, text: str, **parameters: Any) -> str:
    result = client.infer(MODEL, tensors(text, stream=False), parameters={"temperature": 0.0, **parameters})
    (output,) = result.as_numpy("text_output")
    return str(output.decode())


def open_stream(client: Any) -> "queue.Queue[tuple[Any, Any]]":
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    return answers


def metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert not client.is_model_ready("another")
    assert [tensor.name for tensor in client.get_model_metadata(MODEL).outputs] == ["text_output"]


def infer(client: Any) -> None:
    text = whole(client, "Once upon a time", max_tokens=20)
    assert text
    assert whole(client, "Once upon a time", max_tokens=20) == text
    assert whole(client, "Once upon a time", max_tokens=20, stop=text[5:9]) == text[:5]


def multiplexed(client: Any) -> None:
    """Two requests at once on one stream, and a wrong one between them that hurts neither."""
    prompts = {"first": "Once upon a time", "second": "There is a baker"}
    answers = open_stream(client)
    for name, prompt in prompts.items():
        parameters = {"max_tokens": 30, "temperature": 0.0}
        client.async_stream_infer(MODEL, tensors(prompt, stream=True), request_id=name, parameters=parameters)
        client.async_stream_infer(
            MODEL, tensors("x", stream=True), request_id="wrong", parameters={"no_such": 1}
        )
    texts = dict.fromkeys(prompts, "")
    ends, errors = 0, []
    while ends + len(errors) < 4:
        result, error = answers.get(timeout=SECONDS)
        if error is not None:
            errors.append(str(error))
            continue
        response = result.get_response()
        texts[response.id] += result.as_numpy("text_output")[0].decode()
        ends += response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert ends == 2
    assert all("parameters.no_such" in error for error in errors)
    assert texts == {name: whole(client, prompt, max_tokens=30) for name, prompt in prompts.items()}


def cancel(client: Any) -> None:
    """Leaves in the middle; the test looks whether anything is left of it."""
    answers = open_stream(client)
    client.async_stream_infer(
        MODEL,
        tensors("Once upon a time", stream=True),
        parameters={"max_tokens": 1900, "ignore_eos": True},
    )
    _, error = answers.get(timeout=SECONDS)
    assert error is None
    client.stop_stream(cancel_requests=True)


def errors(client: Any) -> None:
    for parameters, field in (({"max_tokens": 10**6}, "max_tokens"), ({"temperature": -1.0}, "temperature")):
        try:
            whole(client, "x", **parameters)
        except triton.InferenceServerException as error:
            assert error.status() == "StatusCode.INVALID_ARGUMENT", error.status()
            assert field in error.message(), error.message()
        else:
            raise AssertionError(f"{parameters} were taken")


FEATURES = {feature.__name__: feature for feature in (metadata, infer, multiplexed, cancel, errors)}

if __name__ == "__main__":
    FEATURES[sys.argv[1]](triton.InferenceServerClient(sys.argv[2]))
