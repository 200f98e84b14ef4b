"""Pipelines of the `tokenizers` library from the files that families of models come with.

`data/tokenizer.py` wraps what they give. It must never encode text.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from penstock.data.special_tokens import BERT, ROBERTA, enclose, word_piece

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's separator of documents."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside tokenizer.json that say more, the first that does decides."""


def setting(folder: Path, key: str) -> str | None:
    """The special token that the files beside tokenizer.json name for a role, such as eos_token."""
    for name in SETTINGS:
        try:
            value = json.loads((folder / name).read_bytes())[key]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        found = value.get("content") if isinstance(value, dict) else value
        if isinstance(found, str):
            return found
    return None


def byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """GPT-2's pipeline around a BPE model."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    return inner


def from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's two files, or RoBERTa's."""
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    inner = byte_level(model)
    if model.token_to_id(ROBERTA["mask_token"]) is None:
        inner.add_special_tokens([END_OF_TEXT])
    else:
        inner.add_special_tokens(list(dict.fromkeys(ROBERTA.values())))
        enclose(inner, ROBERTA)
    return inner


def from_word_pieces(folder: Path) -> tokenizers.Tokenizer:
    """BERT's vocab.txt, and whether it is in lower case from tokenizer_config.json."""
    model = models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=BERT["unk_token"])
    settings = folder / SETTINGS[0]
    given = json.loads(settings.read_bytes()) if settings.is_file() else {}
    inner = word_piece(model, lowercase=bool(given.get("do_lower_case", True)))
    inner.add_special_tokens(list(BERT.values()))
    enclose(inner, BERT)
    return inner
