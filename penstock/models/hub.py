"""Where a model's folder is: on this machine, or on the Hugging Face hub.

`models/resolve.py` and the loading of weights ask here. It must never load a weight.
"""

import re
from pathlib import Path

from penstock.errors import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DESCRIPTION = ["*.json", "merges.txt", "vocab.txt", "tokenizer.model", "*.safetensors"]
_LEGACY = ["pytorch_model*.bin"]


def model_folder(name: str) -> Path:
    """The local folder `name`, or the snapshot of the hub repository of that name, which is
    downloaded where there is a network and taken from the hub's cache where there is none.

    Raises:
        CheckpointError: neither a folder nor a repository the hub gives.
    """
    path = Path(name).expanduser()
    if path.exists() or not _HUB_NAME.fullmatch(name):
        return path
    import huggingface_hub  # noqa: PLC0415 - only where a hub name was given

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_DESCRIPTION))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=_LEGACY)
    except Exception as error:  # many kinds of network and hub errors, one meaning
        raise CheckpointError(
            f"{name} is neither a folder nor a model the hub gives ({type(error).__name__})",
            where="model.from",
            do="give a local folder, or check the name and the network",
        ) from None
    return folder
