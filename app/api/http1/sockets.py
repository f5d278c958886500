"""Sockets: what the system knows about the peer."""

import asyncio
import contextlib
import socket

TCP_CLOSED = 7
# Of connections whose peer is gone without a word: after about 90 s.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


def keep_probing(transport: asyncio.Transport) -> None:
    """Notice peers that vanish: by probes while there is nothing to send, and by what they do not acknowledge."""
    sock = transport.get_extra_info("socket")
    # Other sockets than TCP have no such options.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def is_reset(transport: asyncio.Transport) -> bool:
    """Return whether the peer has reset the connection. While a transport does not read, it does not notice."""
    with contextlib.suppress(OSError):
        info: bytes = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info[0] == TCP_CLOSED
    return True
