"""``LLM``: offline generation over many prompts at once, in this process and without asyncio."""

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, Self, TypedDict

import msgspec
from tqdm.auto import tqdm

from tidegate.engine.build import build_engine
from tidegate.engine.config import EngineConfig, Preemption
from tidegate.engine.core import EngineCore
from tidegate.engine.logging import quiet_by_default
from tidegate.engine.messages import (
    Delta,
    EngineInfo,
    Finish,
    Finished,
    PositionLogprobs,
    Stats,
    StepOutput,
    Submit,
    Usage,
)
from tidegate.engine.request import (
    FinishReason,
    InvalidRequest,
    Request,
    SamplingParams,
    Violation,
    unknown_biases,
)
from tidegate.engine.text import Text
from tidegate.engine.text_stream import StopMatch, TextStream


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: list[int]


OFFLINE_STEP_TOKENS = 2048
"""Nobody waits for the next token of a stream here, and longer steps compute prompts faster."""

Prompt = str | list[int] | TokensPrompt
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. Its tokens end with the stop token, or with the one that completed ``stop``."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop: str | None
    """The stop string that ended it."""
    logprobs: list[PositionLogprobs] | None
    """One entry for each of ``token_ids``; None where they were not asked for."""
    usage: Usage
    error: str | None
    """An UPPER_SNAKE reason where ``finish_reason`` is ``ERROR``."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and what came of it: one output for each of ``n`` choices, in order."""

    prompt: str | None
    """As given, or as the chat template rendered it; None where token ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    seed: int
    """Given again, it gives the same tokens; in bfloat16 but for near ties."""
    prompt_logprobs: list[PositionLogprobs | None] | None
    """One entry for each prompt token, None for the first; None where they were not asked for."""


class LLM:
    """A model in this process, for notebooks and batch jobs.

    ``options`` are further fields of ``EngineConfig``. Raises ``ConfigError``, in one line, where the
    model cannot be loaded or an argument is out of range. To be used by one thread at a time.
    """

    def __init__(
        self,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        device_kv_tokens: int | None = None,
        host_kv_tokens: int | None = None,
        block_size: int | None = None,
        preemption: Preemption = "auto",
        **options: Any,
    ) -> None:
        config = EngineConfig(
            model=model,
            device=device,
            dtype=dtype,
            device_kv_tokens=device_kv_tokens,
            host_kv_tokens=host_kv_tokens,
            block_size=block_size,
            preemption=preemption,
            **{"max_step_tokens": OFFLINE_STEP_TOKENS, **options},
        )
        quiet_by_default()
        self._text = Text.load(model)
        self._core = build_engine(config, progress=True)
        # Enough to fill each step and the one after it. The rest waits here, where waiting is free.
        self._window = min(config.max_waiting, 2 * config.max_num_seqs)
        self._ids = count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory and threads; nothing can be generated afterwards."""
        self._core.close()
        self._text.close()

    @property
    def info(self) -> EngineInfo:
        """What was loaded, and the size of its tiers."""
        return self._core.info

    def stats(self) -> Stats:
        """The engine's totals since the start, and the present state of its tiers, as of now."""
        return self._core.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Run every prompt to its end; the results stand in the order of the prompts.

        A prompt is text, a list of token ids, or ``{"prompt_token_ids": [...]}``; a single one needs no
        list around it. ``params`` holds for all prompts, or is a list with one for each.

        Raises ``TypeError`` or ``InvalidRequest`` that names the first prompt which cannot be served;
        nothing of the call goes on running then.
        """
        single = isinstance(prompts, str | Mapping) or (prompts and _is_list_of(int, prompts))
        listed: Sequence[Any] = [prompts] if single else _listed("prompts", prompts)
        return self._run(
            [self._tokenize(prompt, f"prompts[{i}]") for i, prompt in enumerate(listed)], params, use_tqdm
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """``generate`` for one conversation, or a list of them, rendered by the chat template.

        A conversation is a list of messages such as ``{"role": "user", "content": "..."}``.
        """
        single = messages and _is_list_of(Mapping, messages)
        listed: Sequence[Any] = [messages] if single else _listed("messages", messages)
        return self._run(
            [self._render(chat, f"conversations[{i}]") for i, chat in enumerate(listed)], params, use_tqdm
        )

    def _tokenize(self, prompt: Any, place: str) -> "_Prompt":
        if isinstance(prompt, str):
            with _naming(place):
                return _Prompt(place, prompt, self._text.encode(prompt))
        token_ids: Any = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
        if not _is_list_of(int, token_ids):
            raise TypeError(
                f"{place} must be a string, a list of token ids or {{'prompt_token_ids': [...]}}, "
                f"not {type(prompt).__name__} {prompt!r:.60}"
            )
        vocab_size = self._core.info.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest([Violation(place, f"token id {token_id} is not in [0, {vocab_size})")])
        return _Prompt(place, None, list(token_ids))

    def _render(self, conversation: Any, place: str) -> "_Prompt":
        if not _is_list_of(Mapping, conversation):
            raise TypeError(f"{place} must be a list of messages, not {type(conversation).__name__}")
        with _naming(place):
            token_ids = self._text.render_chat(conversation)
        return _Prompt(place, self._text.decode(token_ids, skip_special_tokens=False), token_ids)

    def _run(
        self,
        prompts: "list[_Prompt]",
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"params: {len(params)} of them for {len(prompts)} prompts; give one or one each"
            )
        for i, own in enumerate(params):
            if unknown := unknown_biases(own.logit_bias, self._core.info.vocab_size):
                with _naming(f"params[{i}]"):
                    raise InvalidRequest(unknown)
        jobs = [
            _Job(str(next(self._ids)), prompt, own, self._text)
            for prompt, own in zip(prompts, params, strict=True)
        ]
        with tqdm(total=len(jobs), unit="prompt", disable=not use_tqdm) as bar:
            _drive(self._core, jobs, self._window, bar)
        return [job.output() for job in jobs]


def _drive(core: EngineCore, jobs: "list[_Job]", window: int, bar: "tqdm[Any]") -> None:
    """Step the engine until every job is done, with the choices of up to ``window`` of them inside."""
    waiting = deque(jobs)
    running: dict[str, _Job] = {}
    num_tokens = 0
    try:
        while waiting or running:
            while waiting and len(running) < window:
                job = waiting.popleft()
                running[job.request.id] = job
                core.handle(Submit(job.request))
            output = core.step()
            if not output and not core.has_work():
                raise RuntimeError(f"the engine is idle while {len(running)} requests are unfinished")
            _take(core, running, output)
            for request_id in {end.request_id for end in output.finished if running[end.request_id].is_done}:
                num_tokens += running.pop(request_id).num_output_tokens
                bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                bar.update()
    except BaseException as error:
        try:
            _cancel(core, running)
        except Exception as second:  # noqa: BLE001  an engine that failed may fail again: the first error counts
            error.add_note(f"What was running could not be cancelled: {second!r}. Load the model anew.")
        raise


def _cancel(core: EngineCore, request_ids: Iterable[str]) -> None:
    """The engine lives on, for the next call."""
    for request_id in request_ids:
        core.handle(Finish(request_id, FinishReason.CANCELLED))
    # Once in any case: what was said to this call must not be heard by the next one.
    core.step()
    while core.has_work():
        core.step()


def _take(core: EngineCore, running: "dict[str, _Job]", output: StepOutput) -> None:
    """Hand a step's output to the jobs, and end the choices in which a stop string appeared."""
    for scored in output.prompt_logprobs:
        running[scored.request_id].prompt_logprobs += scored.positions
    for refused in output.refused:
        with _naming(running.pop(refused.request_id).prompt.place):
            raise InvalidRequest(refused.violations)
    deltas: dict[tuple[str, int], list[Delta]] = {}
    for delta in output.deltas:
        deltas.setdefault((delta.request_id, delta.choice), []).append(delta)
    finished = {(end.request_id, end.choice): end for end in output.finished}
    for request_id, index in {**deltas, **finished}:
        key = request_id, index
        stop = running[request_id].choices[index].take(deltas.get(key, []), finished.get(key))
        if stop is not None and key not in finished:
            core.handle(Finish(request_id, FinishReason.STOP_STRING, index, stop.at_offset))


@dataclass(frozen=True, slots=True)
class _Prompt:
    place: str
    """What errors call it: ``prompts[3]``."""
    text: str | None
    token_ids: list[int]


class _Job:
    """One request on its way through the engine."""

    def __init__(self, request_id: str, prompt: _Prompt, params: SamplingParams, text: Text) -> None:
        self.prompt = prompt
        self.request = Request(
            id=request_id,
            prompt_token_ids=prompt.token_ids,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
        )
        self.prompt_logprobs: list[PositionLogprobs | None] = [None]
        self.choices = [_Choice(TextStream(text, params)) for _ in range(params.n)]

    @property
    def is_done(self) -> bool:
        return all(choice.end is not None for choice in self.choices)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def output(self) -> RequestOutput:
        params = self.request.params
        outputs = [choice.output(i, params.logprobs is not None) for i, choice in enumerate(self.choices)]
        return RequestOutput(
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=outputs,
            seed=self.request.seed,
            prompt_logprobs=None if params.prompt_logprobs is None else self.prompt_logprobs,
        )


@dataclass(slots=True)
class _Choice:
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    end: Finished | None = None

    def take(self, deltas: list[Delta], end: Finished | None) -> StopMatch | None:
        """Take what a step said about this choice; a stop string, where it has just appeared."""
        self.end = end or self.end
        if self.stream.stop is not None:  # the engine learns of it later; what it still sends is void
            return None
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        text, num_tokens, stop = self.stream.push(token_ids, end.reason if end else None)
        self.token_ids += token_ids[:num_tokens]
        self.logprobs += [entry for delta in deltas for entry in delta.logprobs or ()][:num_tokens]
        self.texts.append(text)
        return stop

    def output(self, index: int, with_logprobs: bool) -> CompletionOutput:
        if self.end is None:
            raise RuntimeError(f"choice {index} has not ended")
        stop = self.stream.stop
        return CompletionOutput(
            index=index,
            token_ids=self.token_ids,
            text="".join(self.texts),
            finish_reason=self.end.reason if stop is None else FinishReason.STOP_STRING,
            stop=None if stop is None else stop.stop,
            logprobs=self.logprobs if with_logprobs else None,
            usage=msgspec.structs.replace(self.end.usage, output_tokens=len(self.token_ids)),
            error=self.end.error,
        )


def _is_list_of(kind: Any, value: object) -> bool:
    """Whether it is a sequence with nothing else in it; ``True`` is no number here."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )


def _listed(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, not {type(value).__name__}")
    return value


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says of which of several inputs a violation is."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(
            [Violation(f"{place}.{v.field}", v.description) for v in error.violations]
        ) from None
