"""What a caller shows, and who that makes it: bearer tokens, signed tokens, certificates."""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import jwt

from tidegate.engine.config import ConfigError
from tidegate.service.errors import Failure
from tidegate.service.identity import LOCAL, MAX_TENANT_CHARS, Caller, Role

MIN_TOKEN_CHARS = 16
TENANT_CLAIM, ROLE_CLAIM = "tenant", "role"
ALGORITHMS = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
    "oct": ("HS256", "HS384", "HS512"),
}
"""By the type of the key, so that a public key is never taken for a shared secret. ``none`` is not there."""
CLOCK_SKEW = 30.0
"""Seconds by which the clock of a token's issuer may differ from ours."""


class Tokens(Protocol):
    """One kind of bearer token."""

    def identify(self, token: str) -> Caller | None:
        """None where the token is not one of these. Raises ``Failure`` where it is, and does not hold."""


class StaticTokens:
    """A file with a line for each token: the token, its tenant and, if it is not ``user``, its role."""

    def __init__(self, path: Path) -> None:
        """Raises ``ConfigError``. The file's content never shows in it."""
        self._callers: list[tuple[bytes, Caller]] = []
        """By the digest of the token."""
        for number, line in enumerate(read_secret("auth_tokens", path).splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"auth_tokens {path}, line {number}"
            if not 2 <= len(words) <= 3:
                raise ConfigError(f"{where}: must be TOKEN TENANT or TOKEN TENANT ROLE")
            token, tenant, *role = words
            if len(token) < MIN_TOKEN_CHARS:
                raise ConfigError(f"{where}: the token needs at least {MIN_TOKEN_CHARS} characters")
            if len(tenant) > MAX_TENANT_CHARS:
                raise ConfigError(f"{where}: the tenant may have at most {MAX_TENANT_CHARS} characters")
            if role and role[0] not in list(Role):
                raise ConfigError(f"{where}: the role must be one of {', '.join(Role)}")
            digest = _digest(token)
            if any(digest == other for other, _ in self._callers):
                raise ConfigError(f"{where}: the token stands there twice")
            self._callers.append((digest, Caller(tenant, Role(role[0]) if role else Role.USER)))
        if not self._callers:
            raise ConfigError(f"auth_tokens {path} holds no token")

    def identify(self, token: str) -> Caller | None:
        digest, found = _digest(token), None
        for known, caller in self._callers:
            # All of them, each in constant time: how long it takes tells nothing about any.
            if hmac.compare_digest(known, digest):
                found = caller
        return found


class SignedTokens:
    """JSON Web Tokens with an expiry and the claim ``tenant``; the claim ``role`` may be there too."""

    def __init__(self, path: Path, issuer: str | None, audience: str | None) -> None:
        """``path``: a public key as PEM, or a JWK set. Raises ``ConfigError``."""
        self._issuer = issuer
        self._audience = audience
        self._keys = _read_keys(path)
        """By key id; a PEM file's own has none."""

    def identify(self, token: str) -> Caller | None:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            return None
        try:
            claims = self._verify(token, header)
        except jwt.PyJWTError as error:
            # The class alone: the message of some quotes the token's claims.
            raise _invalid(f"the token does not hold: {type(error).__name__}") from None
        tenant, role = claims.get(TENANT_CLAIM), claims.get(ROLE_CLAIM, Role.USER)
        if not isinstance(tenant, str) or not _is_tenant(tenant):
            raise _invalid(f"the token has no claim {TENANT_CLAIM!r} that can be a tenant's name")
        if role not in list(Role):
            raise _invalid(f"the token's claim {ROLE_CLAIM!r} is none of {', '.join(Role)}")
        return Caller(tenant, Role(role))

    def _verify(self, token: str, header: Mapping[str, Any]) -> dict[str, Any]:
        key_id = header.get("kid")
        if key_id in self._keys:
            key = self._keys[key_id]
        elif len(self._keys) == 1 and (key_id is None or None in self._keys):
            (key,) = self._keys.values()
        else:
            raise jwt.InvalidKeyError
        return jwt.decode(
            token,
            key.key,
            algorithms=ALGORITHMS[str(key.key_type)],
            issuer=self._issuer,
            audience=self._audience,
            leeway=CLOCK_SKEW,
            options={"require": ["exp"]},
        )


class Authentication:
    """Makes a caller of an RPC's credentials."""

    def __init__(self, tokens: Sequence[Tokens], certificates: bool) -> None:
        """Where there are tokens, every caller shows one, and it decides. ``certificates``: else those do."""
        self._tokens = tokens
        self._certificates = certificates

    def identify(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Caller:
        """Raises ``Failure``: CREDENTIALS_MISSING, CREDENTIALS_INVALID."""
        if self._tokens:
            return self._by_token(context)
        peer = context.auth_context()
        if self._certificates and "ssl" in map(bytes.decode, peer.get("transport_security_type", ())):
            return _by_certificate(peer)
        # A Unix socket has no certificates; its mode says who may open it.
        return LOCAL

    def _by_token(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Caller:
        given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        if not given:
            raise Failure("CREDENTIALS_MISSING", "send metadata authorization: Bearer TOKEN")
        scheme = re.fullmatch(r"(?i:bearer) +(\S+)", str(given[0])) if len(given) == 1 else None
        if scheme is None:
            raise _invalid("the metadata authorization must be once there, as Bearer TOKEN")
        for tokens in self._tokens:
            if caller := tokens.identify(scheme[1]):
                return caller
        raise _invalid("the token is not known here")


def read_secret(name: str, path: Path) -> str:
    """A file that strangers on this machine cannot read. Raises ``ConfigError``, which names the setting."""
    text = read_file(name, path)
    if (mode := path.stat().st_mode) & 0o007:
        raise ConfigError(
            f"{name} {path}: every user of this machine has access to it (mode {mode & 0o777:o}); "
            "do: chmod o-rwx, or set the volume's defaultMode to 0440"
        )
    return text


def read_file(name: str, path: Path) -> str:
    """Raises ``ConfigError``, which names the setting."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{name} {path}: {reason}") from error


def _read_keys(path: Path) -> dict[str | None, jwt.PyJWK]:
    """Raises ``ConfigError``."""
    text = read_file("jwt_keys", path)
    if text.lstrip().startswith("{"):
        try:
            keys = {key.key_id: key for key in jwt.PyJWKSet.from_json(text).keys}
        except (jwt.PyJWTError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"jwt_keys {path}: no JWK set: {type(error).__name__}") from error
        if any(key.key_type == "oct" for key in keys.values()):
            read_secret("jwt_keys", path)  # a shared secret: whoever reads it can sign
        return keys
    for key_type, algorithm in (("RSA", "RS256"), ("EC", "ES256"), ("OKP", "EdDSA")):
        implementation = jwt.get_algorithm_by_name(algorithm)
        try:
            key = json.loads(implementation.to_jwk(implementation.prepare_key(text)))
        except (ValueError, TypeError, jwt.PyJWTError):
            continue
        if "d" in key:
            raise ConfigError(f"jwt_keys {path}: a private key; this server needs the public one alone")
        if key["kty"] == key_type:
            return {None: jwt.PyJWK(key)}
    raise ConfigError(f"jwt_keys {path}: neither a public key in PEM nor a JWK set")


def _by_certificate(peer: Mapping[str, Iterable[bytes]]) -> Caller:
    """The tenant is the certificate's first URI, else its first DNS name, else its common name.

    gRPC has verified the chain. A SPIFFE identity is a URI.
    """
    for field in ("peer_uri", "peer_dns", "x509_common_name"):
        for name in peer.get(field, ()):
            tenant = name.decode(errors="replace")
            if _is_tenant(tenant):
                return Caller(tenant)
    raise _invalid("the certificate has no URI, DNS name or common name that can be a tenant's name")


def _is_tenant(name: str) -> bool:
    return 1 <= len(name) <= MAX_TENANT_CHARS and name.isprintable()


def _invalid(message: str) -> Failure:
    return Failure("CREDENTIALS_INVALID", message)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
