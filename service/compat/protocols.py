"""Which of the protocols a server speaks beside its own."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from tidegate.service.compat import kserve, vllm
from tidegate.service.hub import Hub
from tidegate.service.intake import Intake

PROTOCOLS = ("kserve", "vllm")


@dataclass(frozen=True, slots=True)
class Compat:
    """Which protocols to serve, and what they tell of the engine that it does not say itself."""

    protocols: Collection[str]
    folder: Path
    """The checkpoint's, from which a gateway loads the tokenizer."""
    max_num_seqs: int


def add_protocols(server: grpc.aio.Server, compat: Compat, intake: Intake, hub: Hub) -> list[str]:
    """Serve the protocols named; gives the names of their gRPC services."""
    services = []
    if "kserve" in compat.protocols:
        kserve.add(server, intake, hub)
        services.append(kserve.SERVICE)
    if "vllm" in compat.protocols:
        vllm.add(server, intake, hub, compat.folder, compat.max_num_seqs)
        services.append(vllm.SERVICE)
    return services
