"""A socket on this machine, and the server behind it."""

import errno
import ipaddress
import socket
from typing import Any, Final

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from uniter.datasets.errors import UniterError

SILENCE_SECONDS: Final = 30  # after which a connection on which nothing comes is closed


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address of this machine; nobody can connect before `server_on` listens.

    Raises:
        UniterError: the port is taken or not allowed, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UniterError(f"--host {host}: {error.strerror or error}; expected an address of this machine, such as 127.0.0.1") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UniterError(f"--host {host} is no address of this machine; 127.0.0.1 serves this machine alone, 0.0.0.0 all") from error
        said = {errno.EADDRINUSE: "is taken by another program", errno.EACCES: "is not allowed to you"}
        sentence = said.get(error.errno or 0, f"cannot be had ({error.strerror})")
        raise UniterError(f"port {port} {sentence}; choose another one with --port, or 0 for any that is free") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """What to type into a browser on this machine."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serves_this_machine_alone(bound: socket.socket) -> bool:
    """Whether no other machine can reach this address."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


class _Quiet(WSGIRequestHandler):
    """Says nothing of who asked what, and not what it runs on."""

    timeout = SILENCE_SECONDS

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass

    def version_string(self) -> str:
        return "uniter-app"


def server_on(bound: socket.socket, application: Any) -> BaseWSGIServer:
    """The server, listening; `serve_forever` answers until Ctrl-C, each connection in a thread of its own."""
    host, port = bound.getsockname()[:2]
    bound.listen(64)
    return make_server(host, port, application, threaded=True, request_handler=_Quiet, fd=bound.fileno())
