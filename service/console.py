"""``tidegate generate`` and ``tidegate chat``: text at a terminal, from a server or from a model alone."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from tidegate.service import connection
from tidegate.service.client import BlockingStream, Client, Options, TidegateError

CHAT_HELP = "Ctrl-C stops an answer, Ctrl-D ends the chat.\n"


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    connection.add_source_arguments(parser, "command")
    _add_sampling(parser)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    parser.set_defaults(run=generate)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    connection.add_source_arguments(parser, "command")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(parser)
    parser.set_defaults(run=chat)


def generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    options = _sampling(args)
    if args.stop:
        options["stop"] = args.stop
    with _connected(args) as client, client.generate(prompt, **options) as stream:
        for chunk in stream:
            _write(chunk.text)
        _write("\n")
    return 0


def chat(args: argparse.Namespace) -> int:
    """One line in, one answer out, until the input ends. A failed answer leaves the chat alive."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    is_terminal = sys.stdin.isatty()
    with _connected(args) as client:
        if is_terminal:
            _note(CHAT_HELP)
        while (line := _read_line(is_terminal)) is not None:
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(client.generate(messages, **_sampling(args)))
            except TidegateError as error:
                if not is_terminal:
                    raise
                _note(f"{error}\n")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
    return 0


def _answer(stream: BlockingStream) -> str:
    """Write the answer as it comes; what there was of it, where Ctrl-C stopped it."""
    parts: list[str] = []
    try:
        for chunk in stream:
            parts.append(chunk.text)
            _write(chunk.text)
    except KeyboardInterrupt:
        _note(" [stopped]")
    finally:
        stream.cancel()
    _write("\n")
    return "".join(parts)


def _read_line(is_terminal: bool) -> str | None:
    """The next line without its end; None at the end of the input."""
    while True:
        try:
            if is_terminal:
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            _write("\n")
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _note("\n" + CHAT_HELP)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="output tokens at most (default: what the context holds)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the most likely token (default: 1)"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens that sum to P")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def _sampling(args: argparse.Namespace) -> Options:
    """What was given; the server's defaults hold for the rest."""
    options = Options()
    if args.max_tokens is not None:
        options["max_tokens"] = args.max_tokens
    if args.temperature is not None:
        options["temperature"] = args.temperature
    if args.top_p is not None:
        options["top_p"] = args.top_p
    if args.seed is not None:
        options["seed"] = args.seed
    return options


@contextlib.contextmanager
def _connected(args: argparse.Namespace) -> Iterator[Client]:
    """A client of the server named, or of one that lives as long as this context."""
    with (
        connection.server_of(args) as address,
        Client(address, **connection.credentials(args)) as client,
    ):
        yield client


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    """To the person at the terminal; stdout holds the model's words alone."""
    sys.stderr.write(text)
    sys.stderr.flush()
