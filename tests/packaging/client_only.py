"""Uses an installation of the client alone. Run with ``-W error``; a failure ends in a traceback.

Reads every stub, and calls a server made of the generated code through the public client.
"""

import importlib
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import grpc

import tidegate.v1
from tidegate import Client
from tidegate.v1.control_pb2 import GetServerInfoRequest, GetServerInfoResponse
from tidegate.v1.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server


class Control(ControlServiceServicer):
    def GetServerInfo(
        self, request: GetServerInfoRequest, context: grpc.ServicerContext
    ) -> GetServerInfoResponse:
        return GetServerInfoResponse(version=tidegate.__version__)


for library in ("torch", "transformers", "msgspec"):
    assert find_spec(library) is None, f"{library} is installed: this is not the client alone"

stubs = [module.name for module in pkgutil.iter_modules(tidegate.v1.__path__)]
for name in stubs:
    importlib.import_module(f"tidegate.v1.{name}")

server = grpc.server(ThreadPoolExecutor(max_workers=1))
add_ControlServiceServicer_to_server(Control(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with Client(f"127.0.0.1:{port}") as client:
    info = client.server_info(timeout=60)
server.stop(grace=None).wait()
print(f"version {info.version}, {len(stubs)} stubs, grpcio {grpc.__version__}")
