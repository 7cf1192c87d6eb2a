"""Which server a command speaks to, and what it shows there: the flags of all commands but ``serve``."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import grpc

from tidegate.engine.config import ConfigError
from tidegate.service.client import DEFAULT_TARGET
from tidegate.service.credentials import read_file, read_secret
from tidegate.service.launch import private_server

ADDRESS_HELP = f"HOST:PORT or unix:PATH of a running server (default: {DEFAULT_TARGET})"


class Credentials(TypedDict):
    """Arguments of a client."""

    credentials: grpc.ChannelCredentials | None
    token: str | None


def add_server_argument(parser: argparse.ArgumentParser) -> None:
    """``--server`` and its credentials."""
    parser.add_argument("--server", default=DEFAULT_TARGET, metavar="ADDRESS", help=ADDRESS_HELP)
    add_credentials_arguments(parser)


def add_source_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """The same, or ``--model``, which is served for this ``purpose`` alone."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--server", default=DEFAULT_TARGET, metavar="ADDRESS", help=ADDRESS_HELP)
    source.add_argument(
        "--model", metavar="MODEL", help=f"no server: run this checkpoint for this {purpose} alone"
    )
    add_credentials_arguments(parser)


def add_credentials_arguments(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, summary: str) -> None:
        parser.add_argument(flag, type=Path, metavar="FILE", help=summary)

    add("--tls-ca", "speak TLS, with a server whose certificate this authority has signed")
    add("--tls-cert", "the command's own certificate, for a server that asks for one")
    add("--tls-key", "its private key")
    add("--token-file", "show the bearer token that is the first word of this file")


def credentials(args: argparse.Namespace) -> Credentials:
    """Read the files. Raises ``ConfigError`` where one of them cannot work."""
    channel = None
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together")
    if args.tls_cert is not None and args.tls_ca is None:
        raise ConfigError("--tls-cert needs --tls-ca beside it")
    if args.tls_ca is not None:
        key, chain = None, None
        if args.tls_cert is not None:
            key = read_secret("--tls-key", args.tls_key).encode()
            chain = read_file("--tls-cert", args.tls_cert).encode()
        channel = grpc.ssl_channel_credentials(read_file("--tls-ca", args.tls_ca).encode(), key, chain)
    token = None
    if args.token_file is not None:
        words = read_secret("--token-file", args.token_file).split()
        if not words:
            raise ConfigError(f"--token-file {args.token_file} is empty")
        token = words[0]
    return Credentials(credentials=channel, token=token)


@contextlib.contextmanager
def server_of(args: argparse.Namespace) -> Iterator[str]:
    """The address of ``--server``, or of one of the command's own that serves ``--model`` meanwhile.

    Raises ``ConfigError``, ``LaunchFailed``.
    """
    if args.model is None:
        yield args.server
        return
    if any(file is not None for file in (args.tls_ca, args.tls_cert, args.tls_key, args.token_file)):
        raise ConfigError(
            "--tls-ca, --tls-cert, --tls-key and --token-file are for --server: beside --model nobody asks"
            " for them"
        )
    if sys.stderr.isatty():
        sys.stderr.write(f"loading {args.model}...\n")
    with private_server([args.model]) as address:
        yield address
