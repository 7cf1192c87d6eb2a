"""How the server's addresses are protected: TLS, client certificates, tokens. Nothing falls back to less."""

import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tidegate.engine.config import ConfigError
from tidegate.service.credentials import (
    Authentication,
    SignedTokens,
    StaticTokens,
    Tokens,
    read_file,
    read_secret,
)

RENEWAL_SECONDS = 1.0
"""So often, at the most, a handshake looks whether the files have changed."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Files in PEM, unless they say otherwise."""

    tls_cert: Path | None = None
    """The server's certificate, with the intermediate ones behind it. TCP addresses then speak TLS alone."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Clients must show a certificate that one of these has signed (mTLS)."""
    auth_tokens: Path | None = None
    """Lines of ``TOKEN TENANT [ROLE]``."""
    jwt_keys: Path | None = None
    """A public key, or a JWK set: of those who sign tokens."""
    jwt_issuer: str | None = None
    jwt_audience: str | None = None

    def __post_init__(self) -> None:
        """Raises ``ConfigError``."""
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key") if self.tls_key is None else ("tls_key", "tls_cert")
            raise ConfigError(f"{given} needs {missing} beside it")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls_client_ca needs tls_cert and tls_key beside it")
        for name in ("jwt_issuer", "jwt_audience"):
            if getattr(self, name) is not None and self.jwt_keys is None:
                raise ConfigError(f"{name} needs jwt_keys beside it")

    @property
    def is_safe_for_strangers(self) -> bool:
        """Whether an address may be one that other machines reach: encrypted, and callers are known."""
        authenticates = self.tls_client_ca or self.auth_tokens or self.jwt_keys
        return self.tls_cert is not None and authenticates is not None


class Tls:
    """The files of a certificate, its key and the clients' authority, taken up anew when they change.

    Certificates live for weeks, some for hours, and a server for months. What was negotiated stays; the next
    handshake gets the new ones.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca

    def credentials(self) -> grpc.ServerCredentials:
        """For one address: gRPC tells none but the one that asks what has changed.

        Raises ``ConfigError``.
        """
        renewal = _Renewal(self)
        return grpc.dynamic_ssl_server_credentials(
            self.read(),
            renewal,  # type: ignore[arg-type]  # the stubs forget that None is "as before"
            require_client_authentication=self._client_ca is not None,
        )

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises ``ConfigError`` where they cannot work."""
        chain, key = read_file("tls_cert", self._cert), read_secret("tls_key", self._key)
        certificate, *_ = _certificates("tls_cert", self._cert, chain)
        try:
            private_key = load_pem_private_key(key.encode(), password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"tls_key {self._key}: no private key in PEM without a password") from error
        if private_key.public_key() != certificate.public_key():
            raise ConfigError(f"tls_key {self._key} is not the key of the certificate {self._cert}")
        client_ca = None
        if self._client_ca is not None:
            client_ca = read_file("tls_client_ca", self._client_ca)
            _certificates("tls_client_ca", self._client_ca, client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(key.encode(), chain.encode())], None if client_ca is None else client_ca.encode()
        )

    def stamps(self) -> list[tuple[int, int, int]]:
        """They change when a file does, or its mode.

        A volume of Kubernetes puts a link to another file in its place.
        """
        stamps = []
        for path in (self._cert, self._key, self._client_ca):
            if path is not None:
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    stamps.append((stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
        return stamps


class _Renewal:
    """What has changed for one address since its last handshake."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._seen = tls.stamps()
        self._looked_at = time.monotonic()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """None: what held before. Called in a thread of gRPC's."""
        now = time.monotonic()
        if now - self._looked_at < RENEWAL_SECONDS:
            return None
        self._looked_at = now
        stamps = self._tls.stamps()
        if stamps == self._seen:
            return None
        self._seen = stamps
        try:
            configuration = self._tls.read()
        except (ConfigError, OSError) as error:
            # Half written, perhaps: the next change of a file brings another try.
            _log.warning("tls files stay as they were", reason=str(error))
            return None
        _log.info("tls files renewed")
        return configuration


@dataclass(frozen=True, slots=True)
class Security:
    tls: Tls | None = None
    """For TCP addresses; None: plaintext."""
    authentication: Authentication | None = None
    """None: every caller is ``identity.LOCAL``."""


def load_security(config: SecurityConfig) -> Security:
    """Read the files. Raises ``ConfigError`` where one of them cannot work."""
    tokens: list[Tokens] = []
    if config.auth_tokens is not None:
        tokens.append(StaticTokens(config.auth_tokens))
    if config.jwt_keys is not None:
        tokens.append(SignedTokens(config.jwt_keys, config.jwt_issuer, config.jwt_audience))
    authentication = None
    if tokens or config.tls_client_ca is not None:
        authentication = Authentication(tokens, certificates=config.tls_client_ca is not None)
    return Security(_load_tls(config), authentication)


def _load_tls(config: SecurityConfig) -> Tls | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    tls = Tls(config.tls_cert, config.tls_key, config.tls_client_ca)
    tls.read()
    return tls


def _certificates(name: str, path: Path, text: str) -> list[x509.Certificate]:
    """At least one, and none whose time is over. Raises ``ConfigError``."""
    try:
        certificates = x509.load_pem_x509_certificates(text.encode())
    except ValueError as error:
        raise ConfigError(f"{name} {path}: no certificate in PEM") from error
    for certificate in certificates:
        if (end := certificate.not_valid_after_utc) <= datetime.now(UTC):
            raise ConfigError(f"{name} {path}: a certificate has expired, on {end:%Y-%m-%d}")
    return certificates
