"""Makes the gRPC stubs from the ``.proto`` files.

One function serves two callers: hatchling, as a build hook for every wheel (an editable one too), and
``make protos``, which runs this file after a ``.proto`` changed.
"""

from importlib.metadata import distribution
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What protoc and mypy-protobuf write beside X.proto.
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


class StubsError(RuntimeError):
    """The stubs could not be made. The message says why; protoc has named file and line above it."""


class StubsHook(BuildHookInterface[Any]):
    """Runs before a wheel is put together. The sdist has none: it ships the ``.proto`` files alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))


def generate(root: Path) -> list[Path]:
    """Write the stubs of every ``.proto`` of the package, each beside its source; returns the sources.

    ``root`` is the folder of ``pyproject.toml``. Raises ``StubsError``.
    """
    # The one root from which both a checkout and an unpacked sdist reach the files: an sdist holds
    # them where the links of the checkout stand.
    proto_root = root / ".src"
    package = proto_root / "tidegate"
    rooms = [package / "v1", *sorted(path for path in (package / "compat").iterdir() if path.is_dir())]
    protos: list[Path] = []
    for room in rooms:
        found = sorted(room.glob("*.proto"))
        if not found:
            raise StubsError(f"no .proto file in {room}: is the link broken?")
        _remove_orphans(room)
        protos += found
    with as_file(files("grpc_tools") / "_proto") as well_known_types:
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={proto_root}",
                f"--proto_path={well_known_types}",
                f"--proto_path={distribution('googleapis-common-protos').locate_file('')}",
                f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
                f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
                f"--python_out={proto_root}",
                f"--grpc_python_out={proto_root}",
                f"--mypy_out=quiet:{proto_root}",
                f"--mypy_grpc_out=quiet:{proto_root}",
                *map(str, protos),
            ]
        )
    if status != 0:
        raise StubsError(f"protoc ended with status {status}")
    return protos


def _remove_orphans(room: Path) -> None:
    # Git ignores the stubs, so nothing else would notice that a renamed proto left its old ones to be packed.
    for suffix in STUB_SUFFIXES:
        for stub in room.glob(f"*{suffix}"):
            if not stub.with_name(stub.name.removesuffix(suffix) + ".proto").exists():
                stub.unlink()


def _plugin(name: str) -> str:
    # Not looked for on PATH: neither an isolated build nor an environment that is not activated needs one.
    for file in distribution("mypy-protobuf").files or ():
        if file.stem == name:
            return str(file.locate())
    raise StubsError(f"mypy-protobuf is installed without its program {name}")


if __name__ == "__main__":
    made = generate(Path(__file__).resolve().parent.parent)
    print(f"stubs made for {', '.join(path.name for path in made)}")
