"""Text to token ids and back, on the `tokenizers` library.

`prepare` trains or loads one; evaluation and generation load it from the dataset or the run. It
must never know about models.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from penstock.data.sentence_pieces import read_sentence_pieces
from penstock.data.special_tokens import (
    BERT,
    ROBERTA,
    MaskedTokens,
    enclose,
    masked_tokens,
    put_in_front,
    token_in_front,
    word_piece,
    word_piece_trainer,
)
from penstock.data.tokenizer_files import (
    END_OF_TEXT,
    SETTINGS,
    byte_level,
    from_vocabulary,
    from_word_pieces,
    setting,
)
from penstock.data.words import WordEncoder, encode_each
from penstock.errors import DataError
from penstock.files import atomic_write

_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""Separators by the names families give them: GPT-2, GPT-J and GPT-NeoX; Llama 3; Llama 2; Gemma.
Those of masked models end a document with their separator (`data/special_tokens.py`).
Chat models' configurations name the end of a turn instead, so these come first."""
_KNOWN_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
"""Tokens before a text, where no settings name one: Llama 3, Llama 2, Gemma."""
_FILE = "tokenizer.json"


class Tokenizer:
    """A tokenizer with one end-of-text token.

    Text never turns into the end-of-text token, even where it spells it.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_of_text: str | None = None) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        Its end-of-text token is the first of the known names it has, else `end_of_text`.

        Raises:
            DataError: it has neither.
        """
        self._inner = inner
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.masked: MaskedTokens | None = masked_tokens(inner)
        ends = _KNOWN_ENDS if self.masked is None else (self.masked.end,)
        names = [name for name in (*ends, end_of_text) if name is not None]
        ids = [(name, inner.token_to_id(name)) for name in names]
        found = [(name, token) for name, token in ids if token is not None]
        if not found:
            raise DataError(
                f"the tokenizer has no end-of-text token: none of {', '.join(names)}",
                where="tokenizer.from",
                do="name it as eos_token in tokenizer_config.json beside tokenizer.json",
            )
        self.end_of_text_name: str = found[0][0]
        self.end_of_text: int = found[0][1]
        self._strips = self._drops_leading_space()
        self.begin: int | None = token_in_front(inner) if self.masked is None else self.masked.begin
        """The token before every document and prompt, where the tokenizer puts one there."""

    @staticmethod
    def load(path: str | Path, begins: bool | None = None) -> "Tokenizer":
        """Load from a folder with tokenizer.json, vocab.json + merges.txt, BERT's vocab.txt or
        Llama's tokenizer.model, from a .json file, or by a hub name where there is a network.

        `begins`: whether a token stands before every text; None: where tokenizer.json has one
        there, which is what `transformers` goes by (5.23; not by add_bos_token beside it).

        Raises:
            DataError: nothing there, or not a tokenizer; or no token that could begin a text.
        """
        tokenizer = Tokenizer._load(path)
        if begins is not None:
            tokenizer._begin_with(setting(Path(path), "bos_token"), begins)
        return tokenizer

    @staticmethod
    def _load(path: str | Path) -> "Tokenizer":
        folder = Path(path)
        try:
            for file in (folder, folder / _FILE):
                if file.is_file():
                    inner = tokenizers.Tokenizer.from_file(str(file))
                    return Tokenizer(inner, setting(file.parent, "eos_token"))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return Tokenizer(from_vocabulary(folder))
            if (folder / "vocab.txt").is_file():
                return Tokenizer(from_word_pieces(folder))
            if (folder / "tokenizer.model").is_file():
                return Tokenizer(read_sentence_pieces(folder / "tokenizer.model"))
        except DataError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{path} is not a tokenizer: {error}", where="tokenizer.from", do="check the files"
            ) from None
        if folder.exists() or folder.is_absolute():
            raise DataError(
                f"{path} has no tokenizer.json, vocab.json and merges.txt, vocab.txt or "
                "tokenizer.model",
                where="tokenizer.from",
                do="give a folder in the Hugging Face layout",
            )
        return _from_hub(str(path))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, kind: str = "gpt2") -> "Tokenizer":
        """Train a byte-level BPE (Sennrich et al., arXiv 1508.07909, on GPT-2's bytes) with the
        special tokens of gpt2 or roberta, or word pieces as bert's.
        """
        if kind == "bert":
            inner = word_piece(models.WordPiece(unk_token=BERT["unk_token"]), lowercase=True)
            inner.train_from_iterator(texts, word_piece_trainer(vocab_size))
        else:
            inner = byte_level(models.BPE())
            named = [END_OF_TEXT] if kind == "gpt2" else list(dict.fromkeys(ROBERTA.values()))
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=named,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
            inner.train_from_iterator(texts, trainer)
        if kind != "gpt2":
            enclose(inner, ROBERTA if kind == "roberta" else BERT)
        return Tokenizer(inner)

    def _begin_with(self, name: str | None, begins: bool) -> None:
        """Put a token before every text from now on, by its name or the first known one it has."""
        if self.masked is not None:
            if not begins:
                raise DataError(
                    "a masked model's tokenizer always begins a text with its class token",
                    where="tokenizer.bos",
                    do="leave it out",
                )
            return
        now = None if self.begin is None else self._inner.id_to_token(self.begin)
        if begins == (now is not None) and name in (None, now):
            return
        wanted = (name, *_KNOWN_BEGINNINGS)
        names = [n for n in wanted if n is not None and self._inner.token_to_id(n) is not None]
        if begins and not names:
            raise DataError(
                "the tokenizer has no token to begin a text with",
                where="tokenizer.bos",
                do="name it as bos_token in tokenizer_config.json beside tokenizer.json",
            )
        put_in_front(self._inner, names[0] if begins else None)
        self.begin = token_in_front(self._inner)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model is to continue, behind the token that begins a text
        where there is one; never none: an empty text starts a new document.
        """
        first = [] if self.begin is None else [self.begin]
        return [*first, *self.encode(text)] or [self.end_of_text]

    @property
    def frame(self) -> tuple[int, ...]:
        """Tokens that stand around documents and are no text of theirs."""
        begin = () if self.begin is None else (self.begin,)
        return (*begin, self.end_of_text)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.of(self._inner)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, nothing added; by its words where the tokenizer allows it."""
        if self._words is not None:
            return self._words(texts)
        return [np.array(ids, np.int32) for ids in encode_each(self._inner, texts)]

    def encode_laid_out(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text in which special tokens are meant, and the characters each stands for.

        A chat laid out by a template is such a text.
        """
        self._inner.encode_special_tokens = False
        try:
            encoding = self._inner.encode(text, add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; incomplete UTF-8 shows as U+FFFD, end-of-text as its name."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` as it goes on after `before`.

        Tokenizers made by SentencePiece put a space before the first word of a text and take it
        away again, so that the first word of a continuation would be joined to the text before.
        """
        if not self._strips or not before or before[-1] in self.frame:
            return self.decode(ids)
        last = list(before[-1:])
        return self.decode([*last, *ids])[len(self.decode(last)) :]

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens by the role `transformers` gives them."""
        if self.masked is not None:
            return self.masked.roles
        end = self.end_of_text_name
        begin = end if self.begin is None else self._inner.id_to_token(self.begin) or end
        return {"bos_token": begin, "eos_token": end}

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that are no text."""
        added = self._inner.get_added_tokens_decoder()
        return tuple(sorted(token for token, entry in added.items() if entry.special))

    def _drops_leading_space(self) -> bool:
        """Whether decoding takes away a space that stands before the first word."""
        words = self.encode("a a")
        return self.decode(words) == "a a" and self.decode(words[-1:]) == "a"

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def contradiction(self, other: "Tokenizer") -> str | None:
        """The first token that means something else in another tokenizer, in words; None where
        both agree on all the ids they share.
        """
        if self.sha256 == other.sha256:
            return None
        own, theirs = ({i: t for t, i in one._inner.get_vocab().items()} for one in (self, other))
        for token in sorted(own.keys() & theirs.keys()):
            if own[token] != theirs[token]:
                return f"token {token} is {own[token]!r} in one and {theirs[token]!r} in the other"
        return None

    @property
    def sha256(self) -> str:
        """Identity: SHA-256 of the serialized tokenizer."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def save(self, path: Path, *, settings: bool = False) -> None:
        """Write tokenizer.json at `path`, atomically, and beside it what `load` would not find.

        `settings`: also what it would find, for programs that look for settings alone.
        """
        atomic_write(path, self._inner.to_str(pretty=True))
        if self.masked is None and (settings or self.end_of_text_name not in _KNOWN_ENDS):
            text = json.dumps({"eos_token": self.end_of_text_name})
            atomic_write(path.parent / SETTINGS[0], text)


def _from_hub(name: str) -> Tokenizer:
    """Download tokenizer.json of a hub repository."""
    import huggingface_hub.errors  # noqa: PLC0415 - only where a hub name was given

    try:
        file = Path(huggingface_hub.hf_hub_download(name, _FILE))
        with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download(name, SETTINGS[0])
        inner = tokenizers.Tokenizer.from_file(str(file))
        return Tokenizer(inner, setting(file.parent, "eos_token"))
    except Exception as error:  # many kinds of network and hub errors, one meaning
        raise DataError(
            f"{name} is neither a folder nor a tokenizer the hub gives ({type(error).__name__})",
            where="tokenizer.from",
            do="give a local folder, or check the name and the network",
        ) from None
