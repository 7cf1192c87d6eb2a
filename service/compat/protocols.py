"""Which of the protocols a server speaks beside its own."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from tidegate.service.compat import kserve, openengine, vllm
from tidegate.service.hub import Hub
from tidegate.service.intake import Intake

SERVICES = {"kserve": (kserve.SERVICE,), "openengine": openengine.SERVICES, "vllm": (vllm.SERVICE,)}
"""Their gRPC services, by the names that a server's flag has for them."""
PROTOCOLS = tuple(SERVICES)


@dataclass(frozen=True, slots=True)
class Compat:
    """Which protocols to serve, and what they tell of the engine that it does not say itself."""

    protocols: Collection[str]
    folder: Path
    """The checkpoint's, from which a gateway loads the tokenizer."""
    max_num_seqs: int


def add_protocols(server: grpc.aio.Server, compat: Compat, intake: Intake, hub: Hub) -> None:
    """Serve the protocols named."""
    if "kserve" in compat.protocols:
        kserve.add(server, intake, hub)
    if "openengine" in compat.protocols:
        openengine.add(server, intake, hub, compat.max_num_seqs)
    if "vllm" in compat.protocols:
        vllm.add(server, intake, hub, compat.folder, compat.max_num_seqs)
