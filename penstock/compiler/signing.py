"""Who made an executable: signatures with a key that never leaves the user's account.

`compiler/executable.py` and the kernel cache sign what they write and check what they read. This
module knows nothing about what is signed.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from penstock.config.folders import user_config_folder
from penstock.errors import ExecutableError
from penstock.files import fsync_folder

_KEY_BYTES = 32


def sign(data: bytes) -> dict[str, str]:
    """Return {"key_id", "hmac"}: HMAC-SHA256 of `data` under this user's key."""
    key = _user_key()
    return {"key_id": _key_id(key), "hmac": hmac.new(key, data, hashlib.sha256).hexdigest()}


def made_by_this_user(signature: dict[str, str]) -> bool:
    """Whether the signature names this user's key (it may still not verify)."""
    return signature.get("key_id") == _key_id(_user_key())


def verifies(data: bytes, signature: dict[str, str]) -> bool:
    """Whether `signature` is this user's signature of `data`, compared in constant time."""
    return hmac.compare_digest(sign(data)["hmac"], str(signature.get("hmac", "")))


def _key_id(key: bytes) -> str:
    """A public name of the key."""
    return hashlib.sha256(b"penstock key id" + key).hexdigest()[:16]


def _user_key() -> bytes:
    """This user's signing key, made on first use; the file is 0600 and owned by the user."""
    path = user_config_folder() / "signing.key"
    if not path.exists():
        _create_key(path)
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ExecutableError(
            "the signing key can be read or written by others",
            where=str(path),
            do=f"chmod 600 {path}, or remove it if it is not yours and compile again",
        )
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ExecutableError(
            "the signing key is damaged", where=str(path), do="remove it and compile again"
        )
    return key


def _create_key(path: Path) -> None:
    """Write a new key; when two processes race, the first one's key stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(secrets.token_bytes(_KEY_BYTES))
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
