"""Where a server listens: TCP ports and Unix sockets, opened so that nobody is surprised."""

import contextlib
import fcntl
import ipaddress
import os
import stat
from collections.abc import Callable, Iterator

import grpc.aio

from tidegate.engine.config import ConfigError

SOCKET_MODE = 0o770
UNIX_PREFIX = "unix:"
MAX_PATH_BYTES = 107


def check_address(address: str, may_be_reached: bool) -> None:
    """Raises ``ConfigError`` for an address that cannot be read.

    Unless it ``may_be_reached``, also for one that other machines can reach.
    """
    if address.startswith(UNIX_PREFIX):
        path = address.removeprefix(UNIX_PREFIX)
        if not path:
            raise ConfigError(f"address {address!r} has no path; write unix:PATH")
        if "%" in path:
            raise ConfigError(f"address {address}: gRPC would decode the %; choose a path without one")
        if (size := len(os.fsencode(os.path.abspath(path)))) > MAX_PATH_BYTES:
            raise ConfigError(
                f"address {address}: the path has {size} bytes, a socket's {MAX_PATH_BYTES} at most"
            )
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"address {address!r} must be HOST:PORT or unix:PATH")
    if not may_be_reached and not _is_loopback(host.strip("[]")):
        raise ConfigError(
            f"address {address} can be reached from other machines: give --tls-cert and --tls-key, and "
            "--tls-client-ca, --auth-tokens or --jwt-keys; or listen on 127.0.0.1 or on unix:PATH; or accept "
            "the risk with --insecure"
        )


def every_interface(port: str) -> str:
    """``PORT`` as an address of all interfaces; one that names its host stays as it is."""
    return f"0.0.0.0:{port}" if port.isdigit() else port


@contextlib.contextmanager
def listen(
    server: grpc.aio.Server, address: str, credentials: Callable[[], grpc.ServerCredentials] | None
) -> Iterator[str]:
    """Open an address until the context ends; gives it with the port that was chosen for port 0.

    ``credentials`` makes those for a TCP address: who may open a Unix socket is a matter of its mode. Raises
    ``ConfigError`` where it cannot be opened.
    """
    if address.startswith(UNIX_PREFIX):
        path = os.path.abspath(address.removeprefix(UNIX_PREFIX))
        with _locked(path):
            _open_socket(server, path)
            try:
                yield f"{UNIX_PREFIX}{path}"
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
    else:
        host = address.rpartition(":")[0]
        yield f"{host}:{_add_port(server, address, None if credentials is None else credentials())}"


def _open_socket(server: grpc.aio.Server, path: str) -> None:
    try:
        # Left behind by a server that was killed: we hold the lock, so nobody listens there.
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
        else:
            raise ConfigError(f"address unix:{path}: a file that is no socket is in the way")
    except FileNotFoundError:
        pass
    before = os.umask(0o777 & ~SOCKET_MODE)
    try:
        _add_port(server, f"{UNIX_PREFIX}{path}", None)
    finally:
        os.umask(before)
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    if mode != SOCKET_MODE:
        raise ConfigError(f"address unix:{path}: the socket has mode {mode:o}, not {SOCKET_MODE:o}")


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """A second server would take a live socket's path over without an error; the lock file stops it.

    The file stays: were it removed, two servers could each lock one of that name.
    """
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"address unix:{path}: {error.strerror}: {error.filename}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"address unix:{path}: another server listens there") from None
    finally:
        os.close(lock)


def _add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"address {address} cannot be opened: is it in use, or not of this machine?"
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
