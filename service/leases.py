"""What finished requests leave behind for those that continue them.

A lease holds two things. The transcript, the token ids, is here for the whole time. The KV is in the
engine, as long as there is room: it counts against the tenant's quota, and beyond that the one that was
used least recently is given up. Without it, continuing means computing it again.
"""

import asyncio
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tidegate.engine.messages import Command, EngineInfo, Release
from tidegate.engine.request import Parent
from tidegate.service.errors import Failure
from tidegate.service.generation import Generation

LONGEST_LEASE = 86_400.0
"""Seconds."""
TRANSCRIPT_BYTES = 64 * 2**20
"""Of all transcripts of a tenant."""
LEASE_BYTES = 1024
"""What a lease takes beside its tokens."""
TOKEN_BYTES = 4


@dataclass(slots=True, eq=False)
class Lease:
    tenant: str
    request_id: str
    engine_id: str | None
    prompt_token_ids: "array[int]"
    outputs: list["array[int]"]
    """Of each choice."""
    conversation: list[Mapping[str, str]] | None
    has_kv: bool
    """Whether the engine has it, and was not told to let it go."""
    timer: asyncio.TimerHandle | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + sum(map(len, self.outputs))

    @property
    def transcript_bytes(self) -> int:
        return LEASE_BYTES + self.num_tokens * TOKEN_BYTES


@dataclass(slots=True)
class _Tenant:
    leases: dict[str, Lease] = field(default_factory=dict)
    """The least recently used first."""
    kv_bytes: int = 0
    transcript_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stem:
    """What a new request goes on from: the tokens of another one up to an offset."""

    token_ids: list[int]
    parent: Parent | None
    """Where their KV may be."""
    conversation: list[Mapping[str, str]] | None
    """The chat so far, without the answer that stands at the end of the tokens."""
    num_prompt: int
    """Of the tokens, those before that answer."""


class Leases:
    """All leases, by tenant and request id."""

    def __init__(
        self, info: EngineInfo, send: Callable[[Command], None], quota_bytes: int | None = None
    ) -> None:
        """``quota_bytes``: KV of one tenant's leases. By default half of what both tiers hold."""
        self._token_bytes = info.kv_bytes_per_token
        tokens = info.tokens_in(info.device_blocks + info.host_blocks)
        self._quota = tokens * self._token_bytes // 2 if quota_bytes is None else quota_bytes
        self._send = send
        self._tenants: defaultdict[str, _Tenant] = defaultdict(_Tenant)

    def check(self, tenant: str) -> None:
        """Raises ``Failure`` where the tenant has no room for one more transcript."""
        if tenant in self._tenants and self._tenants[tenant].transcript_bytes >= TRANSCRIPT_BYTES:
            raise Failure("LEASES_FULL", "the tenant's leases hold too much; end some, or lease shorter")

    def keep(self, generation: Generation) -> None:
        """A leased request has ended."""
        engine_id, seconds = generation.engine_id, generation.lease_seconds
        if seconds is None or generation.params is None:
            return
        lease = Lease(
            generation.tenant,
            generation.request_id,
            engine_id,
            array("I", generation.prompt_token_ids),
            generation.outputs,
            generation.conversation,
            has_kv=engine_id is not None,
        )
        if known := self._find(lease.tenant, lease.request_id):
            self._drop(known)
        tenant = self._tenants[lease.tenant]
        tenant.leases[lease.request_id] = lease
        if lease.has_kv:
            tenant.kv_bytes += lease.num_tokens * self._token_bytes
        tenant.transcript_bytes += lease.transcript_bytes
        lease.timer = asyncio.get_running_loop().call_later(seconds, self._drop, lease)
        self._shrink(tenant)

    def use(self, tenant: str, request_id: str) -> Lease | None:
        """The lease, which is now the tenant's most recent."""
        lease = self._find(tenant, request_id)
        if lease is not None:
            leases = self._tenants[tenant].leases
            leases[request_id] = leases.pop(request_id)
        return lease

    def close(self) -> None:
        for tenant in self._tenants.values():
            for lease in tenant.leases.values():
                if lease.timer is not None:
                    lease.timer.cancel()

    def _find(self, tenant: str, request_id: str) -> Lease | None:
        return self._tenants[tenant].leases.get(request_id) if tenant in self._tenants else None

    def _shrink(self, tenant: _Tenant) -> None:
        for lease in tenant.leases.values():
            if tenant.kv_bytes <= self._quota:
                return
            self._release(tenant, lease)

    def _drop(self, lease: Lease) -> None:
        tenant = self._tenants[lease.tenant]
        self._release(tenant, lease)
        del tenant.leases[lease.request_id]
        tenant.transcript_bytes -= lease.transcript_bytes
        if lease.timer is not None:
            lease.timer.cancel()
        if not tenant.leases:
            del self._tenants[lease.tenant]

    def _release(self, tenant: _Tenant, lease: Lease) -> None:
        if lease.has_kv and lease.engine_id is not None:
            lease.has_kv = False
            tenant.kv_bytes -= lease.num_tokens * self._token_bytes
            self._send(Release([lease.engine_id]))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a new request goes on from."""

    parent: Generation | Lease
    choice: int
    at_offset: int | None
    """Of the choice's output; None: all there is."""

    async def stem(self) -> Stem:
        """What stands before the offset. Waits until the parent's prompt has been read.

        Raises ``Failure``: PARENT_GONE, OFFSET_OUT_OF_RANGE.
        """
        parent = self.parent
        if isinstance(parent, Generation):
            await parent.has_content()
            if parent.params is None:
                raise Failure("PARENT_GONE", "the parent has ended without a prompt")
        if self.choice >= len(parent.outputs):
            raise Failure("OFFSET_OUT_OF_RANGE", f"the parent has {len(parent.outputs)} choices")
        output = parent.outputs[self.choice]
        if self.at_offset is not None and self.at_offset > len(output):
            raise Failure("OFFSET_OUT_OF_RANGE", f"the parent has {len(output)} output tokens so far")
        return Stem(
            token_ids=[*parent.prompt_token_ids, *output[: self.at_offset]],
            parent=None if parent.engine_id is None else Parent(parent.engine_id, self.choice),
            conversation=parent.conversation,
            num_prompt=len(parent.prompt_token_ids),
        )
