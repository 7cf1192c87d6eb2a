"""The two clients: grpcio in this process, and grpc-js in a Node process of its own."""

import shutil
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from calls import Connect
from front import Front
from wire_clients import GrpcioClient, NodeClient, NodeDriver, WireClient, build_node_client


@pytest.fixture(scope="session")
def node_folder() -> Path:
    if shutil.which("npm") is None:
        pytest.skip("needs Node with npm: install nodejs 18.3 or later")
    return build_node_client()


@pytest.fixture(scope="session")
def node_driver(node_folder: Path) -> Iterator[NodeDriver]:
    driver = NodeDriver(node_folder)
    yield driver
    driver.close()


@pytest.fixture(params=["grpcio", "grpc-js"])
async def connect(request: pytest.FixtureRequest) -> AsyncGenerator[Connect]:
    """A client of a server, of one kind and then of the other."""
    clients: list[WireClient] = []

    def made(server: Front | str) -> WireClient:
        address = server if isinstance(server, str) else server.server.addresses[0]
        if request.param == "grpcio":
            clients.append(GrpcioClient(address))
        else:
            clients.append(NodeClient(request.getfixturevalue("node_driver"), address))
        return clients[-1]

    yield made
    for client in clients:
        await client.close()
