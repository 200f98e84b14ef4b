"""A run's folder: where things lie, who may write, whether to resume.

`api` and the report ask here. It must never know what is in the files.
"""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from penstock.checkpoint import (
    CheckpointState,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
)
from penstock.compiler.plan import Plan
from penstock.errors import CheckpointError


class RunFolder:
    """Paths inside a run folder, and its lock."""

    def __init__(self, path: str | Path) -> None:
        """Nothing is created until `lock`."""
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.tokenizer = self.path / "tokenizer.json"
        self.plan = self.path / "plan.json"
        self.executable = self.path / "executable.penstock"
        self.report = self.path / "report.html"
        self.curve = self.path / "loss.png"
        self.stacks = self.path / "stacks"
        self.samples = self.path / "samples"

    def lock(self) -> "RunLock":
        """Take the folder for this process.

        Raises:
            CheckpointError: another process has it, or this one may not write there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return RunLock(self.path / ".lock")
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be a run folder: {error.strerror}",
                where="run",
                do="choose a folder you may write to",
            ) from None

    def resume_state(
        self, policy: str, wanted: Callable[[str], bool] | None = None
    ) -> CheckpointState | None:
        """The checkpoint to go on from, by `checkpoint.resume`, of it the `wanted` tensors; None to
        start fresh.

        Raises:
            CheckpointError: "must" without a checkpoint, "never" with one, or none is whole.
        """
        if policy == "never":
            if list_checkpoints(self.checkpoints):
                raise CheckpointError(
                    f"{self.path} already has checkpoints",
                    where="checkpoint.resume=never",
                    do="choose another run folder, or set checkpoint.resume=auto to go on",
                )
            return None
        state = load_newest(self.checkpoints, wanted=wanted)
        if state is None and policy == "must":
            raise CheckpointError(
                f"{self.path} has no checkpoint to resume",
                where="checkpoint.resume=must",
                do="check the run folder, or set checkpoint.resume=auto",
            )
        return state

    def state_for(self, use: str | int) -> CheckpointState:
        """The weights `checkpoint.use` names: the newest whole checkpoint's, the best's by
        validation loss, or those of a step.

        Raises:
            CheckpointError: there is none such.
        """
        if isinstance(use, int):
            return self._state_of_step(use)
        if use == "best":
            best = best_checkpoint(self.checkpoints)
            if best is None:
                raise CheckpointError(
                    f"{self.path} has no best checkpoint: it was never validated",
                    where="checkpoint.use",
                    do="use checkpoint.use=newest, or train with train.evaluate_every",
                )
            return load_checkpoint(best, weights_only=True)
        state = load_newest(self.checkpoints, weights_only=True)
        if state is None:
            raise CheckpointError(f"{self.path} has no checkpoint", where="run", do="train first")
        return state

    def _state_of_step(self, step: int) -> CheckpointState:
        names = {path.name: path for path in list_checkpoints(self.checkpoints)}
        found = names.get(f"step-{step:08}")
        if found is None:
            steps = ", ".join(str(int(name[5:])) for name in names if name[5:].isdigit())
            raise CheckpointError(
                f"{self.path} has no checkpoint of step {step}",
                where="checkpoint.use",
                do=f"choose from {steps}" if steps else "train first",
            )
        return load_checkpoint(found, weights_only=True)

    def read_plan(self) -> Plan:
        """What the run was trained by.

        Raises:
            CheckpointError: not a run, or its plan is damaged.
        """
        self.require()
        try:
            return Plan.from_json(json.loads(self.plan.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{self.plan} is missing or damaged", where="run", do="restore it from a copy"
            ) from None

    def require(self) -> None:
        """Refuse a folder that is no run.

        Raises:
            CheckpointError: missing, or nothing was trained in it.
        """
        if not self.config.is_file() or not list_checkpoints(self.checkpoints):
            raise CheckpointError(
                f"{self.path} is not a run with a checkpoint",
                where="run",
                do="train first: `penstock train run=FOLDER …`",
            )


class RunLock:
    """Holds the folder until `release` or the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Lock or refuse.

        Raises:
            CheckpointError: another process has it.
            OSError: the file cannot be made.
        """
        self._file = path.open("a+", encoding="ascii", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise CheckpointError(
                f"{path.parent} is in use by process {owner}",
                where="run",
                do="wait for it, stop it, or choose another run folder",
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder."""
        self._file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
