"""Who calls: a tenant and a role, settled by the guard from a credential, never by the caller's word."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

MAX_TENANT_CHARS = 256


class Role(StrEnum):
    USER = "user"
    """Acts on its own tenant alone."""
    ROUTER = "router"
    """May name another tenant where a message has a field for it."""
    ADMIN = "admin"
    """May call ``AdminService``."""


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    """Request ids, sessions, quotas and cached prefixes are kept apart by it."""
    role: Role = Role.USER


LOCAL = Caller("local")
"""Whoever reaches a server that asks for no credentials."""

_caller: ContextVar[Caller] = ContextVar("caller", default=LOCAL)


def caller() -> Caller:
    """Of the RPC in whose task, or in a task started by it, this runs."""
    return _caller.get()


def become(caller: Caller) -> None:
    """The RPC of the present task is this caller's, from here on."""
    _caller.set(caller)
