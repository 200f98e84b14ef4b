"""The training loop: steps, logging, validation, checkpoints and stopping, on one screen.

`api.train` builds a `TrainingJob` and runs it. The trainer must never know where model, data or
kernels came from.
"""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from penstock.checkpoint import CheckpointState
from penstock.config.schema import CheckpointSection, ScheduleSection, TrainSection
from penstock.console import get_console
from penstock.data.loader import Loader
from penstock.parallel.replicas import Replicas
from penstock.parallel.world import World
from penstock.saving import AsyncSaver
from penstock.training.guard import Guard, Limits, said
from penstock.training.metrics import MetricsLog, Throughput, peak_memory_bytes
from penstock.training.optimizers import Optimizer
from penstock.training.rollback import load_optimizer, roll_back
from penstock.training.saves import Saves
from penstock.training.schedule import learning_rate
from penstock.training.signals import StopSignals
from penstock.training.step import Passes, StepResult, train_step
from penstock.training.totals import Totals
from penstock.training.validation import Validation, validate

if TYPE_CHECKING:  # It loads torch's pipelines.
    from penstock.parallel.pipeline import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything a training run works with."""

    passes: "Passes | Pipeline"
    optimizer: Optimizer
    loader: Loader
    validation: list[Validation]
    """Empty where there is nothing held out."""
    train: TrainSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection
    lr: float
    """Peak learning rate."""
    seed: int
    total_steps: int
    flops_per_token: int
    peak_flops: float
    """FLOP/s of matrix products this device was measured at, in the compute format."""
    world: World
    replicas: Replicas
    restore: Callable[[], CheckpointState | None]
    """The newest checkpoint, this process's rows of it."""
    saver: AsyncSaver | None
    """None where another process saves what this one would."""
    metrics: MetricsLog | None
    """None in all processes but the first."""
    identity: dict[str, Any]
    """What a checkpoint must agree with to be resumed: architecture, tokenizer, data."""


class _Done(NamedTuple):
    """A step whose figures may still be on the device."""

    step: int
    samples: str
    """Which ones, counted over all epochs."""
    tokens: int
    """Since the run began."""
    lr: float
    limits: Limits
    """What it was allowed."""
    result: StepResult


class Trainer:
    """Runs a job from where it stands to its end, a stop signal, or its target loss."""

    def __init__(self, job: TrainingJob, resume: CheckpointState | None = None) -> None:
        """Start fresh, or exactly where a checkpoint left off."""
        self.job = job
        self.totals = Totals()
        self.guard = Guard(job.train)
        self.saves = Saves(job.saver, job.world, job.checkpoint.on_error)
        self.device = job.passes.device
        self.throughput = Throughput(
            warmup_steps=job.train.throughput_warmup_steps,
            flops_per_token=job.flops_per_token,
            peak_flops=job.peak_flops,
        )
        # A GPU works on the next step while the last one's figures are read.
        self.data_state: dict[str, Any] = {}
        """Of all processes, where data come from: as the last checkpoint has it."""
        self._own_data_state: dict[str, Any] = {}
        self._lag = 1 if self.device.type == "cuda" else 0
        self._pending: deque[_Done] = deque()
        self._judged: list[tuple[_Done, float, float]] = []
        if resume is not None:
            self._resume(resume)

    def run(self) -> Totals:
        """Train; returns the totals. A stop signal checkpoints first.

        Raises:
            TrainingStoppedError: the guard gave up.
        """
        job, totals = self.job, self.totals
        with (
            StopSignals() as stop,
            contextlib.closing(job.loader.steps(totals.position)) as steps,
            get_console().progress("training", total=job.total_steps) as progress,
        ):
            progress.advance(totals.step)
            interrupted = False
            while totals.step < job.total_steps and not totals.has_stopped:
                self.throughput.start()
                loaded = next(steps)
                self.throughput.data_ready()
                lr = learning_rate(totals.step, job.schedule, job.lr, job.total_steps)
                limits = self.guard.limits
                result = train_step(
                    job.passes,
                    loaded.batches,
                    job.optimizer,
                    step=totals.step,
                    seed=job.seed,
                    lr=lr,
                    limits=limits,
                    replicas=job.replicas,
                )
                samples = f"samples {totals.position} to {loaded.position - 1}"
                totals.step, totals.position = totals.step + 1, loaded.position
                self._own_data_state = loaded.state
                totals.tokens += loaded.tokens
                done = _Done(totals.step, samples, totals.tokens, lr, limits, result)
                self._pending.append(done)
                self._read_results(self._lag)
                if self.guard.asks_to_roll_back():
                    self._settle_saves()
                    roll_back(job.optimizer, job.restore)
                totals.seconds += self.throughput.stop(loaded.tokens)
                self._log()
                progress.advance(1, **self._fields())
                self._between_steps()
                # One process alone must not leave: the others would wait for it.
                interrupted = job.world.end_step(bool(stop.requested))
                if interrupted:
                    why = stop.requested or "another process was told to stop"
                    get_console().warning(f"{why}: saving a checkpoint, then stopping")
                    break
        self._finish(interrupted=interrupted)
        return totals

    def _read_results(self, keep: int) -> None:
        """Judge the steps whose figures are due, all but the newest `keep`."""
        while len(self._pending) > keep:
            done = self._pending.popleft()
            loss, norm = float(done.result.loss), float(done.result.grad_norm)
            self._judged.append((done, loss, norm))
            if self.guard.admit(done.step, loss, norm, limits=done.limits, samples=done.samples):
                self.totals.last_loss = loss
                continue
            what = said(done.limits, loss, norm)
            get_console().warning(f"step {done.step} ({done.samples}) skipped: {what}")

    def _log(self) -> None:
        """Write the lines of metrics.jsonl that are due."""
        metrics = self.job.metrics
        for done, loss, norm in self._judged:
            step = done.step
            if metrics and (step % self.job.train.log_every == 0 or step == self.job.total_steps):
                metrics.log(
                    step,
                    {
                        "loss": loss,
                        "lr": done.lr,
                        "grad_norm": norm,
                        "tokens": done.tokens,
                        "tokens_per_second": self.throughput.tokens_per_second,
                        "step_seconds": self.throughput.step_seconds,
                        "memory_bytes": peak_memory_bytes(self.device),
                        "mfu": self.throughput.mfu,
                        "skipped": self.guard.skipped,
                        "data_seconds": self.throughput.data_seconds,
                        **self._drawn(step),
                    },
                )
        self._judged.clear()

    def _drawn(self, step: int) -> dict[str, int]:
        """Samples of each member of a mixture up to a step."""
        behind = (self.totals.step - step) * self.job.loader.batch_size
        drawn = self.job.loader.samples.drawn(self.totals.position - behind)
        return {f"samples/{name}": count for name, count in drawn.items()}

    def _fields(self) -> dict[str, str]:
        """What the progress line shows."""
        loss, speed, mfu = (
            self.totals.last_loss,
            self.throughput.tokens_per_second,
            self.throughput.mfu,
        )
        return {
            "loss": "-" if loss is None else f"{loss:.3f}",
            "tokens/s": "-" if speed is None else f"{speed:,.0f}",
            "mfu": "-" if mfu is None else f"{mfu:.0%}",
        }

    def _between_steps(self) -> None:
        """Validate and save when due; a new best is saved at once where checkpoints are wanted."""
        job, step = self.job, self.totals.step
        self.saves.tell()
        if step >= job.total_steps:
            return
        is_best = _is_due(job.train.evaluate_every, step) and self._validate()
        if _is_due(job.checkpoint.every, step) or (is_best and job.checkpoint.every is not None):
            self._save(is_best=is_best)

    def _validate(self) -> bool:
        """Evaluate on the validation split; returns whether it is the best so far."""
        job, totals = self.job, self.totals
        if not job.validation:
            return False
        self._catch_up()
        loss, parts = validate(job.passes, job.validation, job.replicas, job.world)
        by_part = {f"validation_loss/{name}": value for name, value in parts.items()}
        if job.metrics is not None:
            job.metrics.log(totals.step, {"validation_loss": loss, **by_part})
        is_best = math.isfinite(loss) and (totals.best_loss is None or loss < totals.best_loss)
        if is_best:
            totals.best_loss = loss
        totals.without_improvement = 0 if is_best else totals.without_improvement + 1
        listed = "".join(f", {name} {value:.4f}" for name, value in parts.items())
        get_console().info(
            f"step {totals.step}: validation loss {loss:.4f}{' (best)' if is_best else ''}{listed}"
        )
        target = job.train.target_loss
        totals.reached_target = target is not None and loss <= target
        patience = job.train.patience
        totals.lost_patience = patience is not None and totals.without_improvement >= patience
        if totals.lost_patience:
            get_console().info(f"no lower validation loss in {patience} evaluations: stopping")
        return is_best

    def _catch_up(self) -> None:
        """Wait for the steps still under way on the device, and log them."""
        self._read_results(0)
        self._log()

    def _save(self, *, is_best: bool, wait: bool = False) -> None:
        """Save a checkpoint, or this process's part of it."""
        self._catch_up()
        self._settle_saves()
        if self.job.metrics is not None:
            self.job.metrics.sync(last=wait)
        self.data_state = self.job.world.united(self._own_data_state)
        self.saves.save(self._state, is_best=is_best, wait=wait)

    def _settle_saves(self) -> None:
        """Nobody writes a checkpoint any more; one that failed is counted."""
        self.totals.failed_saves += self.saves.settle()

    def _state(self) -> CheckpointState:
        """Everything needed to go on exactly."""
        return CheckpointState(
            step=self.totals.step,
            tensors=self.job.replicas.saved(self.job.optimizer.state_tensors()),
            values={
                "totals": dataclasses.asdict(self.totals),
                "guard": self.guard.state_dict(),
                "optimizer_steps": self.job.optimizer.steps,
                "identity": self.job.identity,
                "data": self.data_state,
            },
        )

    def _resume(self, state: CheckpointState) -> None:
        """Take up a checkpoint's state."""
        load_optimizer(self.job.optimizer, state)
        self.totals = Totals(**state.values["totals"])
        self.guard.load_state_dict(state.values["guard"])
        self._own_data_state = self.data_state = state.values.get("data", {})
        self.job.loader.samples.resume(self.data_state, self.totals.position)

    def _finish(self, *, interrupted: bool) -> None:
        """Last validation and checkpoint; everything is on disk when this returns."""
        self._catch_up()
        is_best = not interrupted and not self.totals.has_stopped and self._validate()
        self._save(is_best=is_best, wait=True)


def _is_due(every: int | None, step: int) -> bool:
    """Whether `step` is a multiple of `every`, when there is one."""
    return every is not None and step % every == 0
