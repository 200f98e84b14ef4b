"""Which of this host's addresses and network interfaces another host is reached by.

Torch and gloo take what the host's name resolves to, which on many machines is the loopback or the
wrong card. It must never import torch.
"""

import contextlib
import fcntl
import socket
import struct

_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of netdevice(7)."""


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
