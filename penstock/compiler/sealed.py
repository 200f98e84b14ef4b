"""Code that has been verified, as an anonymous file nobody can change.

Toolchains that load shared libraries use it. It must never know what the code is.
"""

import fcntl
import os

_SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE (linux/fcntl.h)."""
_F_ADD_SEALS = 1033


def sealed_file(name: str, code: bytes) -> int:
    """Put verified code into an anonymous file nobody can change, so that what was verified is
    what runs. The descriptor stays open for good: the loader tells libraries apart by their path,
    and the path names the descriptor.
    """
    descriptor = os.memfd_create(f"penstock-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(code)
    while view:
        view = view[os.write(descriptor, view) :]
    fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    return descriptor
