"""``tidegate serve | generate | chat | bench | demo``.

What imports torch is reached through the package's lazy names alone, so that help, the client's
commands and the serving front start without it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import msgspec
except ModuleNotFoundError:
    # The script is installed with the client alone, too.
    sys.exit("tidegate: error: the command needs the server's libraries: pip install 'tidegate[server]'")

import tidegate
from tidegate.engine.config import BLOCK_SIZES, DEVICES, DTYPES, PREEMPTIONS, ConfigError, EngineConfig
from tidegate.engine.request import InvalidRequest
from tidegate.service import batch, bench, console, demo, life, top
from tidegate.service.client import TidegateError, Unavailable
from tidegate.service.config import ServerConfig
from tidegate.service.launch import LaunchFailed
from tidegate.service.security import SecurityConfig

OK, FAILED, INTERRUPTED = 0, 1, 130

_SERVER_FIELDS, _SECURITY_FIELDS = dataclass_fields(ServerConfig), dataclass_fields(SecurityConfig)
_DEFAULTS = {field.name: field.default for field in (*_SERVER_FIELDS, *_SECURITY_FIELDS)} | {
    field.name: field.default for field in msgspec.structs.fields(EngineConfig)
}
_FLAG_OF = {
    name: f"--{name.replace('_', '-')}" for name in _DEFAULTS if name not in ("model", "engine", "security")
} | {
    "addresses": "--listen",
    "admin_addresses": "--admin-listen",
    "prefix_caching": "--no-prefix-caching",
}
"""Fields of the configurations, and how the command line calls them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status. A failure that the user can do something about is one line on stderr."""
    args = build_parser().parse_args(argv)
    if args.run is not serve:
        # A command that has a server of its own must get to stop it.
        signal.signal(signal.SIGTERM, _exit)
        signal.signal(signal.SIGHUP, _exit)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except (ConfigError, InvalidRequest, LaunchFailed, TidegateError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has enough. Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        print(f"{args.prog}: error: {_explained(error, args)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tidegate", description="LLM inference over streaming gRPC, with a KV cache in two tiers."
    )
    parser.add_argument("--version", action="version", version=f"tidegate {tidegate.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(prog=command.prog)
        return command

    _add_serve_arguments(add("serve", "Serve a checkpoint over gRPC until SIGTERM."))
    console.add_generate_arguments(add("generate", "Continue a text."))
    console.add_chat_arguments(add("chat", "Talk with a model."))
    batch.add_arguments(add("batch", "Answer a file of requests in OpenAI's batch format."))
    top.add_arguments(add("top", "Watch the two tiers of a running server."))
    demo.add_arguments(add("demo", "Watch eight conversations share the two tiers of a small server."))

    benches = add("bench", "Measure.").add_subparsers(required=True, metavar="offline | serve")
    for name, summary, add_arguments in (
        ("offline", "Throughput in this process.", bench.add_offline_arguments),
        ("serve", "Throughput and latency of a running server.", bench.add_serve_arguments),
    ):
        command = benches.add_parser(name, help=summary, description=summary)
        command.set_defaults(prog=command.prog)
        add_arguments(command)
    return parser


def serve(args: argparse.Namespace) -> int:
    """Exit status 1 where the start cannot work; the reason is the log's last line."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "protocols" in given:
        given["protocols"] = tuple(name for name in given["protocols"].split(",") if name)
    for name in ("addresses", "admin_addresses"):
        if name in given:
            given[name] = tuple(given[name])
    engine = EngineConfig(**{name: given[name] for name in EngineConfig.__struct_fields__ if name in given})
    security = SecurityConfig(**{f.name: given[f.name] for f in _SECURITY_FIELDS if f.name in given})
    settings = {field.name: given[field.name] for field in _SERVER_FIELDS if field.name in given}
    config = ServerConfig(engine=engine, security=security, **settings)
    return life.run(config)


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags are named as the fields of the configurations, which hold every default."""
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format, a hub name, or demo")

    def add(name: str, summary: str, **options: Any) -> None:
        shown = _DEFAULTS[name]
        if isinstance(shown, tuple):
            shown = ",".join(shown)
        if shown not in (None, "") and not isinstance(shown, bool):
            summary = f"{summary} (default: {shown})"
        parser.add_argument(_FLAG_OF[name], dest=name, help=summary, default=None, **options)

    add("addresses", "HOST:PORT or unix:PATH; may be repeated", action="append", metavar="ADDRESS")
    add("tls_cert", "the server's certificate: TCP then speaks TLS alone", type=Path, metavar="FILE")
    add("tls_key", "its private key", type=Path, metavar="FILE")
    add("tls_client_ca", "clients must show a certificate of this authority", type=Path, metavar="FILE")
    add("auth_tokens", "bearer tokens: lines of TOKEN TENANT [ROLE]", type=Path, metavar="FILE")
    add("jwt_keys", "who signs tokens: a public key or a JWK set", type=Path, metavar="FILE")
    add("jwt_issuer", "signed tokens must come from here", metavar="ISS")
    add("jwt_audience", "signed tokens must be meant for this", metavar="AUD")
    add(
        "insecure",
        "listen on addresses that other machines can reach without TLS and authentication",
        action="store_true",
    )
    add("health_port", "answer health probes alone there, in plaintext", metavar="[HOST:]PORT")
    add("admin_addresses", "serve AdminService there", action="append", metavar="ADDRESS")
    add("metrics_port", "serve metrics for Prometheus there", metavar="[HOST:]PORT")
    add("otlp_endpoint", "send spans of requests to this OpenTelemetry collector", metavar="URL")
    add("reflection", "answer gRPC reflection", action="store_true")
    add(
        "max_restarts",
        "of the engine process in five minutes; 0: its end is the server's",
        type=int,
        metavar="N",
    )
    add("hang_timeout", "seconds without progress after which the engine is killed", type=float, metavar="S")
    add("protocols", "other people's protocols to speak too; '' for none", metavar="NAMES")
    add("openai_port", "an OpenAI endpoint there, by the SMG gateway", metavar="[HOST:]PORT")
    add("drain_grace", "seconds that requests may take to finish after SIGTERM", type=float, metavar="S")
    add("log_format", "for a person or for a machine", choices=("console", "json"))
    add("device", "where the model runs", choices=DEVICES)
    add("dtype", "of weights and KV; auto: what the checkpoint says", choices=DTYPES)
    add(
        "max_model_len", "prompt and output tokens of one sequence; default: what fits", type=int, metavar="N"
    )
    add(
        "block_size",
        "tokens in a KV block; default: 32 on the CPU, 64 or 128 on a GPU",
        type=int,
        choices=BLOCK_SIZES,
    )
    add("device_kv_tokens", "size of the device tier; default: from free memory", type=int, metavar="K")
    fraction_summary = "of a GPU's memory, for weights, steps and device tier together"
    add("device_memory_fraction", fraction_summary, type=float, metavar="F")
    host_summary = "size of the host tier, 0 for none; default: twice the device tier"
    add("host_kv_tokens", host_summary, type=int, metavar="H")
    add("preemption", "what to do with KV that must go", choices=PREEMPTIONS)
    add("prefix_caching", "compute every prompt anew", action="store_const", const=False)
    add("max_num_seqs", "sequences in one step", type=int, metavar="N")
    add(
        "max_step_tokens",
        "tokens computed in one step; default: 512 on the CPU, 2048 on a GPU",
        type=int,
        metavar="N",
    )
    add("max_waiting", "requests that may wait", type=int, metavar="N")
    add("max_waiting_tokens", "their tokens to prefill, all together", type=int, metavar="N")
    add("tenant_requests", "requests of one tenant under way at once", type=int, metavar="N")
    add("tenant_tokens", "their prompts and possible output, all together", type=int, metavar="N")
    add("park_grace", "seconds without credit after which KV leaves the device", type=float, metavar="S")
    add("pipeline_depth", "steps under way at once", type=int, choices=(1, 2))
    parser.set_defaults(run=serve)


def _explained(error: Exception, args: argparse.Namespace) -> str:
    """In the words of the command line."""
    if isinstance(error, ConfigError):
        field, space, rest = str(error).partition(" ")
        return f"{_FLAG_OF.get(field, field)}{space}{rest}"
    if isinstance(error, TidegateError) and error.violations:
        return "; ".join(f"{violation.field}: {violation.description}" for violation in error.violations)
    if isinstance(error, Unavailable) and not error.reason and "server" in args:
        if args.tls_ca is not None:
            return f"no server answers at {args.server} with TLS: {error}"
        return f"no server answers at {args.server}; start one with: tidegate serve demo"
    return str(error)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
