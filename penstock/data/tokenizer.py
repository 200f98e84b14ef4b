"""Text to token ids and back, on the `tokenizers` library.

`prepare` trains or loads one; evaluation and generation load it from the dataset or the run. It
must never know about models.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from penstock.errors import DataError
from penstock.files import atomic_write

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's separator of documents."""
_FILE = "tokenizer.json"


class Tokenizer:
    """A byte-level BPE tokenizer with one end-of-text token.

    Text never turns into the end-of-text token, even where it spells it.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer of the `tokenizers` library."""
        self._inner = inner
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        end = inner.token_to_id(END_OF_TEXT)
        if end is None:
            raise DataError(
                f"the tokenizer has no {END_OF_TEXT} token",
                where="tokenizer.from",
                do="use a GPT-2 style tokenizer, or train one with tokenizer.train=true",
            )
        self.end_of_text: int = end

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Load from a folder with tokenizer.json or vocab.json + merges.txt, from a .json file,
        or by a hub name where there is a network.

        Raises:
            DataError: nothing there, or not a tokenizer.
        """
        folder = Path(path)
        try:
            if folder.is_file():
                return Tokenizer(tokenizers.Tokenizer.from_file(str(folder)))
            if (folder / _FILE).is_file():
                return Tokenizer(tokenizers.Tokenizer.from_file(str(folder / _FILE)))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return Tokenizer(_from_vocabulary(folder))
        except DataError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{path} is not a tokenizer: {error}", where="tokenizer.from", do="check the files"
            ) from None
        if folder.exists() or folder.is_absolute():
            raise DataError(
                f"{path} has no tokenizer.json, nor vocab.json and merges.txt",
                where="tokenizer.from",
                do="give a folder in the Hugging Face layout",
            )
        return _from_hub(str(path))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE (Sennrich et al., arXiv 1508.07909, on GPT-2's bytes)."""
        inner = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return Tokenizer(inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added; in parallel where the process allows it."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; incomplete UTF-8 shows as U+FFFD, end-of-text as its name."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def sha256(self) -> str:
        """Identity: SHA-256 of the serialized tokenizer."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write tokenizer.json at `path`, atomically."""
        atomic_write(path, self._inner.to_str(pretty=True))


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """GPT-2's pipeline around a BPE model."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    return inner


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's two files."""
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    inner = _byte_level(model)
    inner.add_special_tokens([END_OF_TEXT])
    return inner


def _from_hub(name: str) -> Tokenizer:
    """Download tokenizer.json of a hub repository."""
    import huggingface_hub  # noqa: PLC0415 - only where a hub name was given

    try:
        return Tokenizer(
            tokenizers.Tokenizer.from_file(huggingface_hub.hf_hub_download(name, _FILE))
        )
    except Exception as error:  # many kinds of network and hub errors, one meaning
        raise DataError(
            f"{name} is neither a folder nor a tokenizer the hub gives ({type(error).__name__})",
            where="tokenizer.from",
            do="give a local folder, or check the name and the network",
        ) from None
