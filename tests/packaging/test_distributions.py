"""The distributions: built from a copy of the sources as a fresh clone has them, and installed."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD_INPUTS = (
    ".src",
    "engine",
    "kernels",
    "protos",
    "service",
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
)
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


@dataclass(frozen=True)
class Built:
    """One run of the build, straight from the sources and by way of the sdist."""

    sdist: Path
    wheel: Path
    wheel_from_sdist: Path


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What the command prints; fails the test with all of it unless the command succeeds."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def hatchling_build(source: Path, target: str, into: Path) -> Path:
    """The ``sdist`` or ``wheel`` of the project in ``source``."""
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", into, cwd=source)
    (built,) = into.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("checkout"))


def copy_sources(into: Path) -> Path:
    """The sources with their links, and without what git ignores."""
    ignored = shutil.ignore_patterns("__pycache__", *(f"*{suffix}" for suffix in STUB_SUFFIXES))
    for source in (ROOT / name for name in BUILD_INPUTS):
        if source.is_dir():
            shutil.copytree(source, into / source.name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, into)
    return into


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    checkout = copy_sources(tmp_path_factory.mktemp("checkout"))
    dist = tmp_path_factory.mktemp("dist")
    # The sdist first: the wheel's build leaves stubs in the sources, and the sdist must not need them.
    sdist = hatchling_build(checkout, "sdist", dist / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(dist / "unpacked", filter="data")
    (unpacked,) = (dist / "unpacked").iterdir()
    return Built(
        sdist=sdist,
        wheel=hatchling_build(checkout, "wheel", dist / "direct"),
        wheel_from_sdist=hatchling_build(unpacked, "wheel", dist / "from_sdist"),
    )


def test_both_ways_of_building_give_the_same_wheel(built: Built):
    """A user who builds from the sdist gets, byte for byte, what was built from the checkout."""
    assert contents(built.wheel_from_sdist) == contents(built.wheel)


def test_the_wheel_holds_the_stubs_of_every_proto(built: Built):
    names = contents(built.wheel).keys()
    protos = list((ROOT / "protos/tidegate/v1").glob("*.proto"))
    assert protos
    missing = [
        name
        for proto in protos
        for suffix in (".proto", *STUB_SUFFIXES)
        if (name := f"tidegate/v1/{proto.stem}{suffix}") not in names
    ]
    assert missing == []


def test_the_wheel_holds_types_license_and_command(built: Built):
    files = contents(built.wheel)
    assert "tidegate/py.typed" in files
    metadata = f"tidegate-{importlib.metadata.version('tidegate')}.dist-info"
    assert b"Apache License" in files[f"{metadata}/licenses/LICENSE"]
    assert b"tidegate = tidegate.service.cli:main" in files[f"{metadata}/entry_points.txt"]


def test_the_wheel_holds_the_demo_checkpoint(built: Built):
    """``tidegate serve demo`` works from a wheel: each file of the checkpoint is in it, unchanged."""
    files = contents(built.wheel)
    checkpoint = ROOT / "engine/demo/checkpoint"
    expected = {f"tidegate/engine/demo/checkpoint/{path.name}": path for path in checkpoint.iterdir()}
    assert any(name.endswith(".safetensors") for name in expected)
    assert all(files.get(name) == path.read_bytes() for name, path in expected.items())


def test_the_wheel_holds_the_sources_of_the_native_kernels(built: Built):
    """They are compiled where the wheel is installed."""
    files = contents(built.wheel)
    sources = [path for path in (ROOT / "kernels/cpu").iterdir() if path.suffix in (".c", ".h")]
    assert sources
    assert all(files.get(f"tidegate/kernels/cpu/{path.name}") == path.read_bytes() for path in sources)


def test_the_wheel_holds_the_package_alone(built: Built):
    """No test, no cache, no build file slips into site-packages."""
    top_levels = {name.split("/")[0] for name in contents(built.wheel)}
    assert {name for name in top_levels if not name.endswith(".dist-info")} == {"tidegate"}
    assert not any("__pycache__" in name for name in contents(built.wheel))


def test_the_sdist_holds_protos_and_no_stubs(built: Built):
    """Generated code in an sdist would hide a hook that no longer runs."""
    with tarfile.open(built.sdist) as archive:
        names = archive.getnames()
    assert any(name.endswith("/.src/tidegate/v1/inference.proto") for name in names)
    assert [name for name in names if name.endswith(STUB_SUFFIXES)] == []


def test_a_stub_whose_proto_is_gone_is_not_packed(checkout: Path, tmp_path: Path):
    (checkout / "protos/tidegate/v1/renamed_pb2.py").write_text("raise AssertionError\n")
    wheel = hatchling_build(checkout, "wheel", tmp_path / "dist")
    assert "tidegate/v1/renamed_pb2.py" not in contents(wheel)


def test_a_broken_proto_stops_the_build_and_is_named(checkout: Path):
    """The build fails, and says in which file and line."""
    (checkout / "protos/tidegate/v1/broken.proto").write_text('syntax = "proto3";\nmessage {}\n')
    done = subprocess.run(
        [sys.executable, checkout / "protos/hatch_build.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "tidegate/v1/broken.proto:2:" in done.stderr


FLOOR = [requirement.replace(">=", "==") for requirement in PYPROJECT["project"]["dependencies"]]


@pytest.fixture(scope="module", params=[FLOOR, []], ids=["floor", "latest"])
def client_env(
    request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Programs of an environment with the wheel and its core dependencies, the oldest or the newest."""
    env = tmp_path_factory.mktemp("client") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env)
    pip = [sys.executable, "-m", "pip", "--python", env / "bin/python", "--disable-pip-version-check"]
    run(*pip, "install", "--no-input", built.wheel, *request.param)
    return env / "bin"


def test_the_client_alone_works(client_env: Path):
    """It imports and calls without torch, and warnings are errors."""
    script = Path(__file__).with_name("client_only.py")
    printed = run(client_env / "python", "-P", "-W", "error", script)
    # grpc may log lines of its own before it.
    assert f"\nversion {importlib.metadata.version('tidegate')}, " in "\n" + printed


@pytest.mark.parametrize(
    "command",
    [["python", "-P", "-c", "from tidegate import LLM"], ["tidegate", "serve", "demo"]],
    ids=["LLM", "command"],
)
def test_what_needs_the_server_extra_says_so(client_env: Path, command: list[str]):
    """The last line that a person sees is what to install."""
    done = subprocess.run(
        [client_env / command[0], *command[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'tidegate[server]'")


def test_make_and_the_build_generate_with_the_same_tools():
    """``make protos`` runs in the environment of development, the hook in one of its own."""
    generators = {"grpcio-tools", "mypy-protobuf"}
    in_the_build, in_development = (
        {requirement for requirement in requirements if requirement.split("==")[0] in generators}
        for requirements in (
            PYPROJECT["build-system"]["requires"],
            PYPROJECT["project"]["optional-dependencies"]["dev"],
        )
    )
    assert in_the_build == in_development
    assert len(in_the_build) == len(generators)
