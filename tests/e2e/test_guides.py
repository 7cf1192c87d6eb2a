"""The guides, followed as a newcomer follows them: every command and every piece of Python in them runs.

Where a command needs what a test has not got, the nearest thing that does without it runs in its place: what
is installed is looked up, ``make`` shows what it would do, and ``kubectl`` is asked only what it knows
without a cluster.
"""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from served import Served, served

from tidegate.service import cli

ROOT = Path(__file__).parents[2]
GUIDES = ("README.md", "service/README.md", "engine/README.md", "protos/README.md", "k8s/README.md")
ADDRESS = re.compile(r"\b(?:127\.0\.0\.1|localhost):50051\b")
"""Of the server, as the guides have it."""
NOT_EVERYWHERE = ("kubectl", "npm", "openssl")
"""Programs that are no package of Python's: a guide is followed as far as they are there."""
ASKING = ("generate", "chat", "batch")
"""Commands that know a server by its flag, and by no word of the guides."""

Serve = Callable[[str], Served]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A real server for a line of a guide; the same one where the line is the same."""
    running: dict[str, Served] = {}
    with ExitStack() as stack:

        def start(line: str) -> Served:
            if line not in running:
                # Wherever it listens, here it is the port that is free.
                _, _, *arguments = shlex.split(re.sub(r"\S+:50051", "127.0.0.1:0", line))
                folder = tmp_path_factory.mktemp("server")
                running[line] = stack.enter_context(served(folder, *arguments))
            return running[line]

        yield start


def blocks(guide: str) -> list[tuple[str, str]]:
    """What stands between fences, in order: language and text."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / guide).read_text(), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} <= {"sh", "python", ""}
    return found


class Newcomer:
    """Follows a guide in a folder that holds what a clone holds."""

    def __init__(self, folder: Path, serve: Serve) -> None:
        ours = shutil.ignore_patterns("node_modules", "build", "generated", "*_pb2*", "__pycache__")
        for part in ("protos", "service/examples", "engine/examples", "k8s"):
            shutil.copytree(ROOT / part, folder / part, ignore=ours)
        self._folder = folder
        self._serve = serve
        self._server: Served | None = None
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path}
        # Stubs lie beside the scripts that import them.
        self._environment.pop("PYTHONSAFEPATH", None)

    def type(self, line: str) -> str:
        """One line; what it printed."""
        program, *arguments = shlex.split(line.removesuffix("&"), comments=True)
        match program, arguments:
            case "tidegate", ["serve", *_] if "--openai-port" in arguments:
                cli.build_parser().parse_args(arguments)  # tests/compat has the gateway that it needs
                return ""
            case "tidegate", ["serve", *_]:
                self._server = self._serve(shlex.join([program, *arguments]))
                return ""
            case "tidegate", [command, *_] if command in ASKING and "--model" not in arguments:
                return self._run(line.partition("#")[0] + f" --server {self.address}")
            case "tidegate", ["top", *_]:
                return self._run(f"tidegate top {self.address}")
            case "pip", ["install", *wanted]:
                for requirement in wanted:
                    assert_installed(requirement)
                return ""
            case "make", targets:
                return self._run(shlex.join(["make", "--dry-run", "--directory", str(ROOT), *targets]))
            case "docker", ["build", "-f", file, *_]:
                assert (ROOT / file).is_file()  # tests/k8s lints it
                return ""
            case "kubectl", _:
                return self._ask_kubectl(arguments)
            case "python", [script, *_] if "/examples/" in script:
                return self._run(f"{line} {self.address}")
            case "npm", [*_, "start", "--", _]:
                return self._run(f"{line} {self.address}")
            case _:
                return self._run(line)

    def write(self, code: str) -> str:
        """A piece of Python; what it printed."""
        if ADDRESS.search(code):
            code = ADDRESS.sub(self.address, code)
        return self._run(shlex.join([sys.executable, "-P", "-c", code]))

    @property
    def address(self) -> str:
        """Of the server that was started last: its port where it has one, else its socket."""
        assert self._server is not None, "the guide asks a server before it starts one"
        addresses: list[str] = self._server.wait_for_log("ready")["addresses"]
        return next((one for one in addresses if not one.startswith("unix:")), self._server.address)

    def _ask_kubectl(self, arguments: list[str]) -> str:
        match arguments:
            case ["apply", "-k", folder]:
                return self._run(f"kubectl kustomize {folder}")
            case ["apply", "-f", file]:
                return (ROOT / file).read_text()  # tests/k8s holds it against its schema
            case ["-n", _, "create", "secret", "generic", _, *files]:
                for file in files:
                    (self._folder / file.partition("=")[2]).write_text("as from an authority")
                return self._run(shlex.join(["kubectl", *arguments, "--dry-run=client", "--output=yaml"]))
            case _:
                return self._run(shlex.join(["kubectl", *arguments]))

    def _run(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


def assert_installed(wanted: str) -> None:
    """What ``pip install WANTED`` brings is here: a package, or ``.[EXTRA,…]`` of this project."""
    if wanted.startswith("."):
        extras = Requirement(f"tidegate{wanted[1:]}").extras
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras <= declared.keys()
    else:
        importlib.metadata.version(wanted)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.timeout(300)
def test_all_that_a_guide_says_to_run_runs(
    guide: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a server's files lie where its line is typed
    newcomer = Newcomer(tmp_path, serve)
    for language, text in blocks(guide):
        if language == "python":
            assert newcomer.write(text).strip(), text
        for line in text.splitlines() if language == "sh" else ():
            program = line.split()[0]
            if program in NOT_EVERYWHERE and shutil.which(program) is None:
                pytest.skip(f"followed as far as {line!r}: {program} is not installed")
            said = newcomer.type(line)
            if "Once upon a time" in line:
                assert len(said.split()) > 10, line


@pytest.mark.parametrize("language", ["Python", "TypeScript"])
def test_a_generated_client_streams_an_answer_in_five_commands(language: str) -> None:
    section = (ROOT / "protos/README.md").read_text().split(f"## A first answer in {language}\n")[1]
    commands = section.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 5
    assert "Once upon a time" in commands[-1]
