"""An engine client without an engine, for tests of the front: steps on the loop, faults on demand."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tidegate.engine.client import EndingQueue, EngineGone
from tidegate.engine.messages import (
    Admitted,
    Command,
    Delta,
    EngineInfo,
    Finish,
    Finished,
    Flush,
    Flushed,
    Inspect,
    Inspection,
    Limit,
    Logprob,
    Pause,
    Place,
    PositionLogprobs,
    Profile,
    Profiled,
    Progress,
    ProgressKind,
    PromptLogprobs,
    Refused,
    Release,
    SequenceView,
    Stats,
    StepOutput,
    Submit,
    TierStats,
    Timings,
    Update,
    Usage,
)
from tidegate.engine.request import FinishReason, Request, Violation
from tidegate.engine.text import Text

MAX_MODEL_LEN = 2048
EOS = "<eos>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
POISON = "?"
"""A prompt that ends with it makes the engine fail the request, as those with the next two do."""
LOST_COPY = "#"
TOO_LARGE = "%"
FAULTS = {POISON: "NONFINITE_LOGITS", LOST_COPY: "SWAP_FAILED", TOO_LARGE: "DEVICE_OUT_OF_MEMORY"}
"""Its reasons."""
DEADLY = "!"
"""A prompt that ends with it kills the engine in the first step that computes it."""


def byte_text() -> Text:
    """One token for each byte, an end token, and a chat template with one line a message."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])

    def render(
        conversation: Sequence[dict[str, str]], add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        lines = [f"{message['role']}: {message['content']}{EOS}" for message in conversation]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    return Text(tokenizer, render)


@dataclass
class Running:
    """One choice in the engine."""

    request: Request
    index: int
    tokens: list[int]
    stalled: bool = False

    @property
    def has_credit(self) -> bool:
        return self.request.emit_upto is None or len(self.tokens) < self.request.emit_upto


class FakeEngine:
    """Makes one letter a step for each choice that may run; the letter is a hash of the context."""

    def __init__(
        self,
        text: Text,
        *,
        step_seconds: float = 0.0,
        script: Callable[[list[int], int, int], str] | None = None,
    ) -> None:
        """``script(prompt_token_ids, offset, choice)`` gives the letter instead, or ``EOS``."""
        self.info = EngineInfo(
            model="fake",
            architecture="FakeForCausalLM",
            vocab_size=text.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=text.encode(EOS),
            block_size=16,
            device_blocks=64,
            host_blocks=128,
            kv_bytes_per_token=1,
            device="cpu",
            dtype="float32",
            load_seconds={},
        )
        self.admits = True
        """While False, requests wait."""
        self.is_paused = False
        self.report: Stats | None = None
        """Told instead of what is."""
        self.preempted: set[int] = set()
        """Choices, by index, that get nothing."""
        self.prompt_step: int | None = None
        """Prompt tokens that a step scores, where their logprobs are wanted. None: all at once."""
        self._scored: dict[str, int] = {}
        """By request, those whose logprobs were told."""
        self.lag = 0
        """Steps by which commands come late, as they do where steps overlap."""
        self.commands: list[Command] = []
        """All that ever came."""
        self.deaths: list[set[str]] = []
        """The prompts of the step of each."""
        self.running: list[Running] = []
        self.waiting: list[Request] = []
        self._text = text
        self._tokens: dict[str, int] = {}
        self._script = script
        self.step_seconds = step_seconds
        self._outputs: EndingQueue[StepOutput] = EndingQueue()
        self._work = asyncio.Event()
        self._pending: list[tuple[int, Command]] = []
        """With the step in which each takes effect."""
        self._step = 0
        self._stepping = asyncio.create_task(self._loop())

    # As a client.

    def send(self, commands: Iterable[Command]) -> None:
        self._outputs.check()
        commands = list(commands)
        self.commands += commands
        self._pending += [(self._step + self.lag, command) for command in commands]
        self._work.set()

    async def receive(self) -> StepOutput:
        return await self._outputs.get()

    async def close(self) -> None:
        self._stepping.cancel()
        await asyncio.wait({self._stepping})

    # For tests.

    def letter(self, prompt_token_ids: list[int], output: Sequence[int], choice: int) -> str:
        if self._script is not None:
            return self._script(prompt_token_ids, len(output), choice)
        return LETTERS[crc32(repr((choice, *prompt_token_ids, *output)).encode()) % len(LETTERS)]

    def expected(self, prompt: str, tokens: int, choice: int = 0) -> str:
        """The text that follows a prompt."""
        prompt_token_ids, output = self._text.encode(prompt), list[int]()
        text = ""
        while len(text) < tokens:
            letter = self.letter(prompt_token_ids, output, choice)
            output.append(self._token_of(letter))
            text += letter
        return text

    def _token_of(self, letter: str) -> int:
        """Encoded once: a tokenizer's threads would share the one core that a busy machine has left."""
        if letter not in self._tokens:
            (self._tokens[letter],) = self._text.encode(letter)
        return self._tokens[letter]

    def kill(self, *executing: Place) -> None:
        self._stepping.cancel()
        self._outputs.end(EngineGone("the engine process ended with signal SIGKILL", -9, executing))

    def revive(self) -> None:
        """Be another engine, which knows nothing."""
        self.running, self.waiting, self._pending = [], [], []
        self._scored.clear()
        self._outputs, self._work = EndingQueue(), asyncio.Event()
        self._stepping = asyncio.create_task(self._loop())

    def go_on(self) -> None:
        """Look again whether there is something to do."""
        self._work.set()

    def sent(self, kind: type[Command]) -> list[Command]:
        return [command for command in self.commands if isinstance(command, kind)]

    # The engine.

    async def _loop(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            await asyncio.sleep(self.step_seconds)
            output = StepOutput()
            self._step += 1
            due = [command for step, command in self._pending if step < self._step]
            self._pending = [(step, command) for step, command in self._pending if step >= self._step]
            for command in due:
                self._apply(command, output)
            if not self.is_paused:
                self._admit(output)
                if self._dies():
                    return
                for choice in list(self.running):
                    self._run(choice, output)
            if output:
                output.stats = self._stats()
                self._outputs.put(output)
            able = (choice for choice in self.running if choice.index not in self.preempted)
            if self._pending or (
                not self.is_paused and any(choice.has_credit or not choice.stalled for choice in able)
            ):
                self._work.set()

    def _dies(self) -> bool:
        step = [choice for choice in self.running if choice.has_credit]
        prompts = {self._text.decode(choice.request.prompt_token_ids) for choice in step}
        if not any(prompt.endswith(DEADLY) for prompt in prompts):
            return False
        self.deaths.append(prompts)
        self.kill(*(Place(choice.request.id, choice.index, 0, len(choice.tokens) + 1) for choice in step))
        return True

    def _apply(self, command: Command, output: StepOutput) -> None:
        match command:
            case Submit(request=request):
                if len(request.prompt_token_ids) >= self.info.max_model_len:
                    output.refused.append(Refused(request.id, [Violation("prompt", "is too long")]))
                else:
                    self.waiting.append(request)
            case Limit(request_id=request_id, emit_upto=upto):
                for request in self._requests(request_id):
                    request.emit_upto = max(request.emit_upto or 0, upto)
            case Finish():
                self._finish_command(command, output)
            case Pause():
                self.is_paused = command.is_on
            case Flush():
                output.flushed = Flushed(3 if command.device else 0, 5 if command.host else 0)
            case Profile():
                output.profiled = Profiled(f"/traces/{command.steps}")
            case Inspect():
                output.inspection = self._inspection(command.max_sequences)
            case Update():
                for request in self._requests(command.request_id):
                    changes: dict[str, Any] = {}
                    if command.max_tokens is not None:
                        changes["max_tokens"] = command.max_tokens
                    if command.stop_token_ids is not None:
                        changes["stop_token_ids"] = command.stop_token_ids
                    request.params = msgspec.structs.replace(request.params, **changes)
            case Release():
                pass  # it keeps nothing

    def _requests(self, request_id: str) -> list[Request]:
        known = [*self.waiting, *(choice.request for choice in self.running)]
        return [request for request in known if request.id == request_id]

    def _finish_command(self, finish: Finish, output: StepOutput) -> None:
        for request in [request for request in self.waiting if request.id == finish.request_id]:
            self.waiting.remove(request)
            for index in range(request.params.n):
                output.finished.append(_finished(Running(request, index, []), finish.reason))
        for choice in list(self.running):
            if choice.request.id == finish.request_id and finish.choice in (None, choice.index):
                del choice.tokens[finish.at_offset :]
                self._end(choice, finish.reason, output)

    def _admit(self, output: StepOutput) -> None:
        # A request without any credit takes no place.
        able = [
            request
            for request in self.waiting
            if request.emit_upto is None
            or request.emit_upto > min(map(len, request.running_choices().values()))
        ]
        for request in able if self.admits else []:
            self.waiting.remove(request)
            cached = len(request.prompt_token_ids) // self.info.block_size * self.info.block_size
            output.admitted.append(Admitted(request.id, cached, 0))
            self.running += [
                Running(request, index, list(given)) for index, given in request.running_choices().items()
            ]

    def _run(self, choice: Running, output: StepOutput) -> None:
        request = choice.request
        if choice.index in self.preempted:
            return
        if request.deadline is not None and time.monotonic() >= request.deadline:
            self._end(choice, FinishReason.DEADLINE, output)
        elif not choice.has_credit:
            if not choice.stalled:
                choice.stalled = True
                for kind in (ProgressKind.STALLED, ProgressKind.PARKED):
                    output.progress.append(Progress(request.id, choice.index, kind))
        elif fault := FAULTS.get(self._text.decode(request.prompt_token_ids[-1:])):
            self._end(choice, FinishReason.ERROR, output, fault)
        else:
            if choice.stalled:
                choice.stalled = False
                output.progress.append(Progress(request.id, choice.index, ProgressKind.RESUMED))
            if self._score(request, output):
                self._generate(choice, output)

    def _score(self, request: Request, output: StepOutput) -> bool:
        """Tell the next logprobs of the prompt that are wanted; True where all of them have been told."""
        known = self._scored.setdefault(request.id, request.num_scored)
        left = request.prompt_token_ids[1 + known :]
        if request.params.prompt_logprobs is None or not left:
            return True
        told = left if self.prompt_step is None else left[: self.prompt_step]
        positions = [_position(token, request.params.prompt_logprobs) for token in told]
        output.prompt_logprobs.append(PromptLogprobs(request.id, 1 + known, positions))
        self._scored[request.id] += len(told)
        return len(told) == len(left)

    def _generate(self, choice: Running, output: StepOutput) -> None:
        request, params = choice.request, choice.request.params
        letter = self.letter(request.prompt_token_ids, choice.tokens, request.sample_index + choice.index)
        token = self._token_of(letter)
        logprobs = None
        if params.logprobs is not None:
            logprobs = [_position(token, params.logprobs)]
        output.deltas.append(Delta(request.id, choice.index, len(choice.tokens), [token], logprobs))
        choice.tokens.append(token)
        if token in params.stop_token_ids or (token in self.info.eos_token_ids and not params.ignore_eos):
            self._end(choice, FinishReason.STOP_TOKEN, output)
        elif len(choice.tokens) == params.max_tokens:
            self._end(choice, FinishReason.MAX_TOKENS, output)
        elif len(request.prompt_token_ids) + len(choice.tokens) == self.info.max_model_len:
            self._end(choice, FinishReason.CONTEXT_LENGTH, output)

    def _end(
        self, choice: Running, reason: FinishReason, output: StepOutput, error: str | None = None
    ) -> None:
        self.running.remove(choice)
        output.finished.append(_finished(choice, reason, error))

    def _inspection(self, most: int) -> Inspection:
        """Each running choice holds one block, and is to keep another in the host tier."""
        views = [
            SequenceView(
                choice.request.id,
                choice.index,
                choice.request.tenant,
                "stalled" if choice.stalled else "running",
                choice.request.priority,
                len(choice.request.prompt_token_ids),
                len(choice.tokens),
                len(choice.request.prompt_token_ids) + len(choice.tokens),
                1,
                1,
                2.5,
            )
            for choice in self.running[:most]
        ]
        number = len(self.running)
        device, host = b"d" * number, b"h" * number
        return Inspection(device.ljust(64, b"."), host.ljust(128, b"."), views)

    def _stats(self) -> Stats:
        if self.report is not None:
            return self.report
        stalled = sum(choice.stalled for choice in self.running)
        return Stats(
            waiting=len(self.waiting),
            running=len(self.running) - stalled,
            stalled=stalled,
            device=TierStats(64, 64 - len(self.running), 0, {"dirty": len(self.running)}),
            host=TierStats(total=128, free=128),
            steps=self._step,
        )


def _position(token: int, count: int) -> PositionLogprobs:
    top = [Logprob((token + rank) % 256, -float(rank), rank) for rank in range(1, count + 1)]
    return PositionLogprobs(Logprob(token, -0.5, 1), top)


def _finished(choice: Running, reason: FinishReason, error: str | None = None) -> Finished:
    usage = Usage(len(choice.request.prompt_token_ids), len(choice.tokens), 0, 0, preemptions=1)
    timings = Timings(0.0, None, 0.0)
    return Finished(choice.request.id, choice.index, reason, usage, timings, error)
