"""A run's weights for others: `transformers`, `peft`, and another run that starts from them."""

import json
import os
import shutil
from pathlib import Path

from penstock.config.schema import Config
from penstock.console import get_console
from penstock.errors import CheckpointError
from penstock.files import atomic_write, fsync_folder
from penstock.models.huggingface import save_weights
from penstock.models.peft_format import write_adapter
from penstock.runs import LoadedRun, load_run
from penstock.training.run_folder import RunFolder

_EXPORTS = "weights"


def write_weights_of(loaded: LoadedRun, folder: Path) -> None:
    """Write a run's model and tokenizer as `transformers` loads them."""
    architecture, tokenizer = loaded.plan.architecture, loaded.tokenizer
    if architecture.generic is not None:
        from penstock.models.generic import save_generic  # noqa: PLC0415 - loads transformers

        save_generic(folder, loaded.weights(), architecture)
        tokenizer.save(folder / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
        atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
        return
    save_weights(
        folder,
        loaded.weights(),
        architecture,
        tokenizer=loaded.folder.tokenizer.read_text(encoding="utf-8"),
        end_of_text=tokenizer.end_of_text,
        begin=tokenizer.begin,
        special_tokens=tokenizer.special_tokens,
    )


def write_adapter_of(loaded: LoadedRun, out: Path) -> None:
    """Write a run's adapters as `peft` reads them.

    Raises:
        CheckpointError: it has none.
    """
    architecture = loaded.plan.architecture
    if architecture.adapter is None:
        raise CheckpointError(
            f"{loaded.folder.path} has no adapters: all its weights were trained",
            where="run",
            do="use `penstock convert checkpoint`",
        )
    write_adapter(out, loaded.trained(), architecture, loaded.config.model.from_)


def started_from(config: Config) -> Config:
    """The same where `model.from` names a run: its newest weights, adapters merged, are put beside
    its checkpoints in the layout of others' weights, once for each step, and named instead.

    Raises:
        CheckpointError: its checkpoint is damaged, or its weights cannot be had.
    """
    given = config.model.from_
    if given is None or not RunFolder(Path(given).expanduser()).config.is_file():
        return config
    folder = Path(given).expanduser().resolve()
    loaded = load_run(Config(run=str(folder)))
    target = folder / _EXPORTS / f"step-{loaded.state.step:08}"
    if not target.exists():
        staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            write_weights_of(loaded, staging)
            staging.rename(target)
        except OSError as error:
            if not target.exists():  # else another process has been faster
                raise CheckpointError(
                    f"the weights of {given} cannot be put into {target}: {error.strerror}",
                    where="model.from",
                    do="set model.from to what `penstock convert checkpoint` makes of it",
                ) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        fsync_folder(target.parent)
    get_console().info(f"model.from: the weights of {given} at step {loaded.state.step}")
    model = config.model.model_copy(update={"from_": str(target)})
    return config.model_copy(update={"model": model})
