"""An engine core without a model, for tests of what stands around it."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.flight import FlightRecorder
from tidegate.engine.messages import (
    Admitted,
    Command,
    Delta,
    EngineInfo,
    Finish,
    Finished,
    Limit,
    Logprob,
    Place,
    PositionLogprobs,
    Refused,
    Stats,
    StepOutput,
    Submit,
    Timings,
    Usage,
)
from tidegate.engine.request import FinishReason, Request, Violation

VOCAB_SIZE = 300
MAX_MODEL_LEN = 4096


def hashed(context: Sequence[int], choice: int) -> int:
    """The token that follows ``context``."""
    return crc32(repr((choice, *context)).encode()) % VOCAB_SIZE


@dataclass
class Choice:
    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)

    @property
    def place(self) -> Place:
        known = len(self.request.prompt_token_ids) + len(self.tokens)
        return Place(self.request.id, self.index, known - 1, known)

    @property
    def may_run(self) -> bool:
        return self.request.emit_upto is None or len(self.tokens) < self.request.emit_upto


class FakeCore:
    def __init__(
        self,
        config: EngineConfig,
        next_token: Callable[[Sequence[int], int], int] = hashed,
        eos_token_ids: Sequence[int] = (),
        tokens_per_step: int = 1,
    ) -> None:
        self.info = EngineInfo(
            model=config.model,
            architecture="FakeForCausalLM",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=list(eos_token_ids),
            block_size=16,
            device_blocks=64,
            host_blocks=0,
            kv_bytes_per_token=1,
            device="cpu",
            dtype="float32",
            load_seconds={"load": 0.0},
        )
        self.recorder = FlightRecorder()
        self.closed = False
        self.peak_requests = 0
        self._max_waiting = config.max_waiting
        self._next_token = next_token
        self._tokens_per_step = tokens_per_step
        self._choices: dict[str, dict[int, Choice]] = {}
        self._commands: list[Command] = []
        self._stats = Stats()

    def handle(self, command: Command) -> None:
        self._commands.append(command)

    def has_work(self) -> bool:
        return bool(self._commands) or any(c.may_run for c in self._running())

    def next_deadline(self) -> float | None:
        return min(
            (c.request.deadline for c in self._running() if c.request.deadline is not None), default=None
        )

    def stats(self) -> Stats:
        return self._stats

    def check_integrity(self) -> None:
        if any(not choices for choices in self._choices.values()):
            raise RuntimeError("a request without a choice is still known")

    def close(self) -> None:
        self.closed = True

    def step(self) -> StepOutput:
        output = StepOutput()
        commands, self._commands = self._commands, []
        for command in commands:
            self._apply(command, output)
        self.recorder.launched(self._stats.steps, [choice.place for choice in self._running()])
        for _ in range(self._tokens_per_step):
            self._run_all(output)
        self.recorder.landed(self._stats.steps)
        self._stats.steps += 1
        if output:
            output.stats = self._stats
        return output

    def _run_all(self, output: StepOutput) -> None:
        for choice in self._running():
            deadline = choice.request.deadline
            if deadline is not None and time.monotonic() >= deadline:
                self._finish(choice, FinishReason.DEADLINE, output)
            elif choice.may_run:
                self._run(choice, output)

    def _running(self) -> list[Choice]:
        return [choice for choices in self._choices.values() for choice in choices.values()]

    def _apply(self, command: Command, output: StepOutput) -> None:
        if isinstance(command, Submit):
            self._submit(command.request, output)
        elif isinstance(command, Limit) and command.request_id in self._choices:
            for choice in self._choices[command.request_id].values():
                choice.request.emit_upto = max(choice.request.emit_upto or 0, command.emit_upto)
        elif isinstance(command, Finish):
            for choice in list(self._choices.get(command.request_id, {}).values()):
                if command.choice in (None, choice.index):
                    del choice.tokens[command.at_offset :]
                    self._finish(choice, command.reason, output)

    def _submit(self, request: Request, output: StepOutput) -> None:
        match request.id:
            case "crash":
                raise RuntimeError("the fake engine crashes as told")
            case "exit":
                os._exit(7)
        if len(request.prompt_token_ids) >= MAX_MODEL_LEN:
            output.refused.append(Refused(request.id, [Violation("prompt", "is too long")]))
            return
        if len(self._choices) >= self._max_waiting:
            output.refused.append(Refused(request.id, [Violation("queue", "is full")]))
            return
        self._choices[request.id] = {
            index: Choice(request, index, list(given)) for index, given in request.running_choices().items()
        }
        self.peak_requests = max(self.peak_requests, len(self._choices))
        output.admitted.append(Admitted(request.id, 0, 0))

    def _run(self, choice: Choice, output: StepOutput) -> None:
        if choice.request.id == "die" and len(choice.tokens) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        params = choice.request.params
        token = self._next_token([*choice.request.prompt_token_ids, *choice.tokens], choice.index)
        logprobs = None
        if params.logprobs is not None:
            top = [Logprob(token + rank, -float(rank), rank) for rank in range(1, params.logprobs + 1)]
            logprobs = [PositionLogprobs(Logprob(token, -0.5, 1), top)]
        output.deltas.append(Delta(choice.request.id, choice.index, len(choice.tokens), [token], logprobs))
        choice.tokens.append(token)
        self._stats.output_tokens += 1
        eos = () if params.ignore_eos else self.info.eos_token_ids
        if token in (*params.stop_token_ids, *eos):
            self._finish(choice, FinishReason.STOP_TOKEN, output)
        elif len(choice.tokens) == params.max_tokens:
            self._finish(choice, FinishReason.MAX_TOKENS, output)

    def _finish(self, choice: Choice, reason: FinishReason, output: StepOutput) -> None:
        request = choice.request
        del self._choices[request.id][choice.index]
        if not self._choices[request.id]:
            del self._choices[request.id]
        usage = Usage(len(request.prompt_token_ids), len(choice.tokens), 0, 0, 0)
        output.finished.append(Finished(request.id, choice.index, reason, usage, Timings(0.0, 0.0, 0.0)))


def build(config: EngineConfig, progress: bool) -> FakeCore:
    """The factory that a child process calls; some models' names make it fail."""
    match config.model:
        case "wrong":
            raise ConfigError("wrong/config.json: the field 'hidden_size' is missing")
        case "broken":
            raise RuntimeError("the fake engine cannot start")
        case "slow":
            time.sleep(60)
    return FakeCore(config)
