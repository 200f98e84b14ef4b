"""SHA-256 of large files, remembered in the user's cache for as long as they do not change.

Datasets and the weights adapters stand on are checked with it. It must never know what is in them.
"""

import hashlib
from pathlib import Path

from penstock.config.folders import user_cache_folder
from penstock.files import atomic_write, canonical_json, sha256_file


def remembered_sha256(file: Path) -> str:
    """SHA-256 of a file, computed once for each size and time of it."""
    status = file.stat()
    identity = canonical_json(
        [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    )
    memory = user_cache_folder() / "checksums" / hashlib.sha256(identity.encode()).hexdigest()
    if memory.is_file():
        return memory.read_text(encoding="ascii")
    digest = sha256_file(file)
    atomic_write(memory, digest)
    return digest
