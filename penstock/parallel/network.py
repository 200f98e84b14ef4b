"""Which of this host's addresses and network interfaces another host is reached by.

Torch and gloo take what the host's name resolves to, which on many machines is the loopback or the
wrong card. It must never import torch.
"""

import contextlib
import fcntl
import os
import socket
import struct
import time

_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of netdevice(7)."""
_AGAIN_SECONDS = 0.5
"""Between two looks whether a port answers."""


def own_address(host: str, port: int) -> str | None:
    """This host's IPv4 address on the way to `host`; None where there is no way. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def is_this_host(host: str, port: int) -> bool:
    """Whether `host` is one of this host's own addresses or names."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host) == own_address(host, port)
    return False


def wait_for_port(host: str, port: int, seconds: float) -> str | None:
    """Wait until something accepts connections there; None then, or why not after so many seconds.

    Torch's own rendezvous waits as well, but writes a page for each time it is refused.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((host, port), timeout=left).close()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "it does not answer"
        else:
            return None
        if time.monotonic() + _AGAIN_SECONDS >= deadline:
            return reason
        time.sleep(_AGAIN_SECONDS)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
            except OSError:
                continue  # It has no address.
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
