"""The executable: one zip file with the machine code of a plan's regions, signed.

`api.compile` writes it, training and evaluation open it. Opening compiles nothing, and executes
nothing before origin, integrity and fit are established. It must never know about weights.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.compiler import signing
from penstock.compiler.fingerprint import toolchain_fingerprint
from penstock.compiler.kernels import (
    BuiltKernel,
    CompiledKernel,
    Kernel,
    KernelSpec,
    RegionContract,
)
from penstock.compiler.plan import Plan
from penstock.compiler.toolchains import PORTABLE, find_toolchain
from penstock.errors import ExecutableError
from penstock.files import atomic_write, canonical_json, sha256_file

FORMAT_VERSION = 1
_LARGEST_BYTES = 1 << 30
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
"""One time stamp for every member, so that equal content gives equal bytes."""

_MANIFEST, _SIGNATURE, _PLAN = "manifest.json", "signature.json", "plan.json"


def write_executable(
    path: Path, plan: Plan, kernels: Mapping[str, BuiltKernel], toolchain: str
) -> None:
    """Write and sign an executable; `path` is replaced at once or not at all."""
    members = {_PLAN: json.dumps(plan.to_json(), indent=1).encode()}
    for name, kernel in kernels.items():
        if kernel.code:
            members[_code(name)] = kernel.code
        members[f"graphs/{name}.json"] = kernel.graph.encode()
    manifest = {
        "format_version": FORMAT_VERSION,
        "regions": plan.region_fields(),
        "toolchain": toolchain_fingerprint(toolchain, divided=plan.tensor > 1),
        "predicted_peak_bytes": plan.memory["total"],
        "kernels": {
            name: {"spec": kernel.spec.to_json(), "contract": kernel.contract.to_json()}
            for name, kernel in kernels.items()
        },
        "members": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in members.items()
        },
    }
    signed = canonical_json(manifest).encode()
    signature = json.dumps(signing.sign(signed)).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {_MANIFEST: signed, _SIGNATURE: signature, **members}.items():
            archive.writestr(zipfile.ZipInfo(name, _ZIP_EPOCH), data)
    atomic_write(path, buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class Executable:
    """An opened executable whose integrity has been checked."""

    path: Path
    plan: Plan
    manifest: dict[str, Any]
    origin: str
    """"yours", "trusted", "another user's" or "unsigned"."""
    members: Mapping[str, bytes] = dataclasses.field(repr=False)

    @staticmethod
    def open(path: str | Path, trust: Sequence[str] = ()) -> "Executable":
        """Open an executable for running.

        `trust` lists SHA-256 digests of files of other origin that may run.

        Raises:
            ExecutableError: missing, damaged, tampered with, unsigned, another user's, or made
                for another torch or processor.
        """
        executable = Executable.inspect(path, trust)
        if executable.origin not in ("yours", "trusted"):
            raise ExecutableError(
                f"{executable.path} is {executable.origin} and holds machine code",
                where=str(path),
                do=f"compile it yourself, or trust this very file with --trust {executable.sha256}",
            )
        executable.require_this_machine()
        return executable

    @staticmethod
    def inspect(path: str | Path, trust: Sequence[str] = ()) -> "Executable":
        """Read and check an executable without running, or allowing to run, anything in it."""
        path = Path(path)
        data = _read(path)
        members = _members(path, data)
        signed = members.pop(_MANIFEST)
        signature = members.pop(_SIGNATURE, None)
        wanted = {item.lower() for item in trust}
        # Each member is verified by its own digest: the whole file's is only for this.
        trusted = bool(wanted) and hashlib.sha256(data).hexdigest() in wanted
        origin = "trusted" if trusted else _origin(path, signed, signature)
        try:
            manifest = json.loads(signed)
            _check_members(path, manifest["members"], members)
            if manifest["format_version"] != FORMAT_VERSION:
                raise ExecutableError(
                    f"{path} has format version {manifest['format_version']}, "
                    f"this Penstock reads {FORMAT_VERSION}",
                    where=str(path),
                    do="compile it again with this version",
                )
            plan = Plan.from_json(json.loads(members[_PLAN]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(path, "its manifest does not read") from None
        return Executable(path, plan, manifest, origin, members)

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole file as it is now: what `--trust` takes."""
        return sha256_file(self.path)

    @property
    def toolchain(self) -> str:
        """Name of what built its kernels."""
        return str(self.manifest["toolchain"]["settings"]["toolchain"])

    def require_this_machine(self) -> None:
        """Refuse when torch, the sources or the processor differ from what it was made with."""
        if self.toolchain == PORTABLE:
            raise ExecutableError(
                f"{self.path} holds the graphs of its regions, no machine code for "
                f"{self.plan.target}",
                where=str(self.path),
                do="compile it where a toolchain for that machine is installed",
            )
        made = dict(self.manifest["toolchain"])
        here = toolchain_fingerprint(self.toolchain, divided=self.plan.tensor > 1)
        missing = sorted(set(made.pop("processor_features")) - set(here.pop("processor_features")))
        if missing:
            raise ExecutableError(
                f"{self.path} uses processor features this machine lacks: {', '.join(missing)}",
                where=str(self.path),
                do=self.rebuild_command(self.plan),
            )
        self._require_equal(made, here, "toolchain", self.plan)

    def require(self, plan: Plan) -> None:
        """Refuse when the job's regions differ from those compiled; depth may differ."""
        wanted = json.loads(canonical_json(plan.region_fields()))
        self._require_equal(self.manifest["regions"], wanted, "regions", plan)
        kernels: Mapping[str, Any] = self.manifest["kernels"]
        is_apart = any(name.endswith("_weights") for name in kernels)
        if plan.stages > 1 and plan.schedule == "zero-bubble" and not is_apart:
            raise ExecutableError(
                f"{self.path} gives the gradients of inputs and weights at once, "
                f"plan.schedule={plan.schedule} wants them apart",
                where="plan.schedule",
                do=self.rebuild_command(plan),
            )

    def _require_equal(
        self, made: Mapping[str, Any], wanted: Mapping[str, Any], section: str, plan: Plan
    ) -> None:
        made, wanted = _flatten(made), _flatten(wanted)
        # Another mode explains whatever else differs.
        for name in sorted({*made, *wanted}, key=lambda name: (name != "mode", name)):
            if made.get(name) != wanted.get(name):
                raise ExecutableError(
                    f"{self.path} was compiled for {name}={_short(made.get(name))}, but this job "
                    f"has {name}={_short(wanted.get(name))}",
                    where=f"{section}.{name}",
                    do=self.rebuild_command(plan),
                )

    def rebuild_command(self, plan: Plan) -> str:
        """The command that makes an executable for `plan` in this file's place."""
        settings = " ".join(plan.overrides())
        return f"rebuild it with `penstock compile {settings} executable={self.path}`"

    def kernels(self) -> dict[str, CompiledKernel]:
        """Load the machine code. Takes milliseconds and needs no compiler."""
        if self.origin not in ("yours", "trusted"):
            raise ExecutableError(f"{self.path} may not run: it was opened for inspection only")
        toolchain = find_toolchain(self.toolchain)
        return {
            name: CompiledKernel(
                Kernel(KernelSpec.from_json(entry["spec"]), self.members[_code(name)], toolchain),
                RegionContract.from_json(entry["contract"]),
            )
            for name, entry in self.manifest["kernels"].items()
        }


def _code(kernel: str) -> str:
    """Name of the member with a kernel's code."""
    return f"kernels/{kernel}.so"


def _damaged(path: Path, how: str) -> ExecutableError:
    return ExecutableError(
        f"{path} is not a whole executable: {how}", where=str(path), do="compile it again"
    )


def _read(path: Path) -> bytes:
    """The file's bytes, read once: what is verified is what runs."""
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise _damaged(path, "it is larger than any executable")
        return path.read_bytes()
    except FileNotFoundError:
        raise ExecutableError(
            f"{path} does not exist",
            where="executable",
            do="make it with `penstock compile … executable=FILE`",
        ) from None
    except OSError as error:
        raise ExecutableError(
            f"{path} cannot be read: {error.strerror}", where="executable", do="check the path"
        ) from None


def _members(path: Path, data: bytes) -> dict[str, bytes]:
    """Every member's bytes by name, refusing anything a writer of ours would not have written."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) != len(entries):
                raise _damaged(path, "it has two members of one name")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _damaged(path, "it has compressed members")
            if sum(entry.file_size for entry in entries) > len(data):
                raise _damaged(path, "its members are larger than the file")
            members = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        raise _damaged(path, "it is truncated or changed") from None
    if _MANIFEST not in members:
        raise _damaged(path, "it has no manifest")
    return members


def _origin(path: Path, signed: bytes, signature: bytes | None) -> str:
    """Who signed the manifest; a signature by this user's key that does not verify is an error."""
    if signature is None:
        return "unsigned"
    try:
        value = json.loads(signature)
        mine = signing.made_by_this_user(value)
    except (ValueError, AttributeError):
        raise _damaged(path, "its signature does not read") from None
    if not mine:
        return "another user's"
    if not signing.verifies(signed, value):
        raise _tampered(path, _MANIFEST)
    return "yours"


def _tampered(path: Path, member: str) -> ExecutableError:
    return ExecutableError(
        f"{path} was changed after it was made: {member} does not match its signature",
        where=str(path),
        do="do not run it; compile it again",
    )


def _check_members(path: Path, expected: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    """Members and manifest must name the same files with the same content."""
    for name in sorted({*expected, *members}):
        data = members.get(name)
        if data is None or name not in expected:
            raise _tampered(path, name)
        if hashlib.sha256(data).hexdigest() != expected[name]["sha256"]:
            raise _tampered(path, name)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
