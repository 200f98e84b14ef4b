"""The learning rate as a pure function of the step.

The trainer asks once per optimizer step; a resumed run asks the same function and so continues
exactly. It must never hold state or know what an optimizer is.
"""

import math

from penstock.config.schema import ScheduleSection
from penstock.errors import ConfigError


def check_schedule(section: ScheduleSection, peak: float, total_steps: int) -> None:
    """Refuse a schedule that cannot be run as written.

    Args:
        section: the user's `schedule` settings.
        peak: learning rate at the end of the warm-up.
        total_steps: length of the run, in optimizer steps.

    Raises:
        ConfigError: naming the key, when the warm-up or decay is longer than the run leaves room
            for, or the learning rate would rise where it should fall.
    """
    if section.warmup >= total_steps:
        raise ConfigError(
            f"the warm-up of {section.warmup} steps is not shorter than the run of {total_steps}",
            where="schedule.warmup",
            do="shorten the warm-up or train for more steps",
        )
    if section.name != "constant" and section.min_lr > peak:
        raise ConfigError(
            f"the final learning rate {section.min_lr:g} is above the peak {peak:g}",
            where="schedule.min_lr",
            do="lower schedule.min_lr or raise optimizer.lr",
        )
    if section.name == "wsd" and section.decay is not None:
        room = total_steps - section.warmup
        if section.decay > room:
            raise ConfigError(
                f"a decay of {section.decay} steps does not fit into the {room} after the warm-up",
                where="schedule.decay",
                do="shorten the decay or the warm-up, or train for more steps",
            )


def learning_rate(step: int, section: ScheduleSection, peak: float, total_steps: int) -> float:
    """Return the learning rate of one optimizer step.

    Warm-up step k uses (k + 1) / warmup of the peak, so that no step is wasted at zero; the first
    step after it is at the peak, and the decay would reach `min_lr` at step `total_steps`, one
    past the last. Steps beyond stay there.

    Source: linear warm-up and cosine decay as in GPT-3 (arXiv 2005.14165, appendix B) and SGDR
    (arXiv 1608.03983, equation 5 without restarts); wsd as in MiniCPM (arXiv 2404.06395, §4.2)
    with a linear decay.

    Args:
        step: counted from 0 for the first optimizer step of the run.
        section: the user's `schedule` settings, accepted by `check_schedule`.
        peak: learning rate at the end of the warm-up.
        total_steps: length of the run, in optimizer steps.
    """
    if step < section.warmup:
        return peak * (step + 1) / section.warmup
    if section.name == "constant":
        return peak
    length = _decay_steps(section, total_steps)
    progress = (step - (total_steps - length)) / length
    progress = min(max(progress, 0.0), 1.0)
    if section.name == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        share = 1.0 - progress
    return section.min_lr + (peak - section.min_lr) * share


def _decay_steps(section: ScheduleSection, total_steps: int) -> int:
    """Return how many of the run's last optimizer steps the decay covers, at least one."""
    room = max(1, total_steps - section.warmup)
    if section.name != "wsd":
        return room
    return min(room, section.decay or max(1, total_steps // 5))
