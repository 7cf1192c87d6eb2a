"""The ``openai`` and ``anthropic`` packages against a gateway before us: ``openai_tools.py FEATURE URL``."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import openai

MODEL = "demo"
MESSAGES: Any = [{"role": "user", "content": "Tell me a story about a kite."}]
TOKENS = 40
GREEDY: Any = {"model": MODEL, "max_tokens": 30, "messages": MESSAGES, "extra_body": {"temperature": 0}}
"""For Anthropic's package, which has no argument for the temperature."""
ANSWER: Any = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
ANSWER["additionalProperties"] = False


def form(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


BAD_SCHEMA = form({"type": "no type"})


class Clients:
    def __init__(self, url: str) -> None:
        self.openai: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.anthropic: Any = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)

    def chat(self, **options: Any) -> Any:
        wanted = {"max_tokens": TOKENS, "temperature": 0, "messages": MESSAGES, **options}
        return self.openai.chat.completions.create(model=MODEL, **wanted)


def models(clients: Clients) -> None:
    assert [model.id for model in clients.openai.models.list()] == [MODEL]


def chat(clients: Clients) -> None:
    answer = clients.chat()
    (choice,) = answer.choices
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS
    assert answer.usage.prompt_tokens > 5
    assert clients.chat().choices[0].message.content == choice.message.content


def chat_stream(clients: Clients) -> None:
    text, reasons, usage = "", [], None
    for chunk in clients.chat(stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert text == clients.chat().choices[0].message.content
    assert reasons == ["length"]
    assert usage is not None
    assert usage.completion_tokens == TOKENS


def chat_stream_with_patience(clients: Clients) -> None:
    """What was killed is away for a moment; the client's own retries bridge it."""
    clients.openai = clients.openai.with_options(max_retries=30)
    chat_stream(clients)


def unavailable(clients: Clients) -> None:
    """Nobody is behind the gateway: it says so."""
    try:
        clients.chat()
    except openai.InternalServerError as error:
        assert error.status_code in (502, 503), error.status_code
    else:
        raise AssertionError("somebody answered")


def conversation(clients: Clients) -> None:
    """A second turn that hangs on the first."""
    story = clients.chat(max_tokens=200).choices[0].message.content
    question = {"role": "user", "content": "What color is it?"}
    messages = [*MESSAGES, {"role": "assistant", "content": story}, question]
    assert clients.chat(messages=messages).choices[0].message.content


def completions(clients: Clients) -> None:
    options = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}
    whole = clients.openai.completions.create(**options).choices[0].text
    chunks = clients.openai.completions.create(**options, stream=True)
    assert whole
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole


def responses(clients: Clients) -> None:
    options = {"model": MODEL, "input": MESSAGES[0]["content"], "max_output_tokens": 30, "temperature": 0}
    whole = clients.openai.responses.create(**options).output_text
    assert whole
    deltas = [
        event.delta
        for event in clients.openai.responses.create(**options, stream=True)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == whole


def sampling(clients: Clients) -> None:
    drawn, again, other = (
        clients.chat(temperature=1, seed=seed).choices[0].message.content for seed in (3, 3, 4)
    )
    assert drawn == again != other
    stopped = clients.chat(stop=["."]).choices[0]
    assert stopped.finish_reason == "stop"
    assert "." not in stopped.message.content
    ended = clients.chat(max_tokens=500)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens < 500


def json_schema(clients: Clients) -> None:
    text = clients.chat(response_format=form(ANSWER), max_tokens=200).choices[0].message.content
    assert isinstance(json.loads(text)["sunny"], bool)


def choices(clients: Clients) -> None:
    first, second = (choice.message.content for choice in clients.chat(n=2, temperature=1, seed=3).choices)
    assert first != second
    again = clients.chat(n=2, temperature=1, seed=3)
    assert [choice.message.content for choice in again.choices] == [first, second]


def twice(clients: Clients) -> None:
    """The same answer, whatever happens to the server meanwhile."""
    first, second = (
        clients.chat(max_tokens=300, extra_body={"ignore_eos": True}).choices[0].message.content
        for _ in range(2)
    )
    assert first == second


def two_at_once(clients: Clients) -> None:
    """Each says what it says alone."""
    options = {"max_tokens": 400, "temperature": 1, "extra_body": {"ignore_eos": True}}

    def answer(seed: int) -> str:
        text: str = clients.chat(**options, seed=seed).choices[0].message.content
        return text

    with ThreadPoolExecutor() as pool:
        together = list(pool.map(answer, (3, 4)))
    assert together == [answer(3), answer(4)]


def logprobs(clients: Clients) -> None:
    content = clients.chat(max_tokens=4, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(content) == 4
    for position in content:
        assert position.logprob <= 0
        assert len(position.top_logprobs) == 2
        assert position.token == position.top_logprobs[0].token  # greedy


def refusal(clients: Clients, **options: Any) -> str:
    """What is said of a bad request."""
    try:
        clients.chat(**options)
    except openai.BadRequestError as error:
        return json.dumps(error.body)
    raise AssertionError(f"{options} were taken")


def errors(clients: Clients) -> None:
    refusal(clients, max_tokens=10**6)
    refusal(clients, response_format=BAD_SCHEMA)
    refusal(clients, messages=[{"role": "user", "content": "Tell me a story. " * 1000}])
    try:
        clients.openai.chat.completions.create(model="another", messages=MESSAGES)
    except openai.NotFoundError:
        return
    raise AssertionError("another model was found")


def reasons(clients: Clients) -> None:
    """A refusal names what is wrong."""
    assert "max_tokens" in refusal(clients, max_tokens=10**6)
    assert "json_schema" in refusal(clients, response_format=BAD_SCHEMA)


def client_drop(clients: Clients) -> None:
    """Leaves in the middle of a long answer; the test looks whether anything is left of it."""
    stream = clients.chat(stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()


def anthropic_messages(clients: Clients) -> None:
    answer = clients.anthropic.messages.create(**GREEDY)
    assert answer.content[0].text
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 30


def anthropic_stream(clients: Clients) -> None:
    with clients.anthropic.messages.stream(**GREEDY) as stream:
        assert "".join(stream.text_stream) == clients.anthropic.messages.create(**GREEDY).content[0].text
        assert stream.get_final_message().usage.output_tokens == 30


FEATURES = {
    feature.__name__: feature
    for feature in (
        models,
        chat,
        chat_stream,
        chat_stream_with_patience,
        unavailable,
        conversation,
        completions,
        responses,
        sampling,
        json_schema,
        choices,
        twice,
        two_at_once,
        logprobs,
        errors,
        reasons,
        client_drop,
        anthropic_messages,
        anthropic_stream,
    )
}

if __name__ == "__main__":
    FEATURES[sys.argv[1]](Clients(sys.argv[2]))
