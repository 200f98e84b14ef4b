"""Continue prompts with a key-value cache, several at a time.

`api.generate` builds an `Engine` and calls it. It must never know where weights come from.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.config.schema import GenerateSection
from penstock.console import Console
from penstock.data.tokenizer import Tokenizer
from penstock.errors import CheckpointError, UserError
from penstock.inference.decoding import Decoder, EagerDecoder
from penstock.inference.sampling import is_greedy, next_token, row_generator
from penstock.models.transformer import Transformer

_INCOMPLETE = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and how it goes on."""

    prompt: str
    text: str
    """What was generated, without the prompt and without a stop string."""
    tokens: int
    """Tokens generated."""
    seconds: float
    """Time of the batch the prompt was in."""
    stopped: str
    """Why it ended: "tokens", "end of text" or "stop string"."""

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    def show(self, console: Console) -> None:
        """Prompt and continuation on standard output, the speed beside it."""
        console.write(self.prompt + self.text)
        console.info(f"{self.tokens} tokens in {self.seconds:.2f} s ({self.stopped})")


class _Row:
    """One prompt while it is being continued."""

    def __init__(self, prompt: str, ids: list[int], generator: torch.Generator) -> None:
        self.prompt = prompt
        self.ids = ids
        self.prompt_length = len(ids)
        self.generator = generator
        self.text = ""
        self.shown = 0
        self.stopped: str | None = None

    @property
    def new(self) -> list[int]:
        """Tokens generated so far."""
        return self.ids[self.prompt_length :]


class Engine:
    """A model and its tokenizer, ready to continue text."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, decoder: Decoder | None = None
    ) -> None:
        """The model's device and dtype are used as they are; without `decoder` it runs eagerly."""
        self._model = model
        self._tokenizer = tokenizer
        self._device = next(model.parameters()).device
        self._decoder = decoder or EagerDecoder(model)

    @property
    def model(self) -> Transformer:
        """The model, as it was given."""
        return self._model

    @property
    def decoder(self) -> Decoder:
        """What runs it, position after position."""
        return self._decoder

    def generate(
        self,
        prompts: Sequence[str],
        section: GenerateSection,
        seed: int,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt, `section.batch` at a time, with the same text in any batch.

        on_text is given the text of the first prompt of each batch as it comes, whole characters.

        Raises:
            UserError: a prompt is not text, or longer with its continuation than the model's
                positions; nothing was generated then.
            CheckpointError: the model computes values that are not numbers.
        """
        rows = [self._row(prompt, i, section, seed) for i, prompt in enumerate(prompts)]
        completions: list[Completion] = []
        size = min(section.batch, self._decoder.most_rows or section.batch)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            started = time.perf_counter()
            self._continue(batch, section, on_text)
            seconds = time.perf_counter() - started
            completions += [
                Completion(row.prompt, row.text, len(row.new), seconds, row.stopped or "tokens")
                for row in batch
            ]
        return completions

    def _row(self, prompt: str, index: int, section: GenerateSection, seed: int) -> _Row:
        """Encode a prompt; an empty one starts a new document."""
        if not is_text(prompt):
            raise UserError(
                f"prompt {index + 1} is not text: it holds bytes that are not UTF-8",
                where="generate.prompt",
                do="give the prompt in UTF-8",
            )
        ids = self._tokenizer.encode_prompt(prompt)
        limit = self._decoder.most_tokens
        if len(ids) + section.tokens > limit:
            room = limit - len(ids)
            shorten = "shorten the prompt"
            raise UserError(
                f"prompt {index + 1} has {len(ids)} tokens; with generate.tokens={section.tokens} "
                f"that is more than the {limit} there is room for",
                where="generate.tokens",
                do=f"ask for at most {room} tokens, or {shorten}" if room > 0 else shorten,
            )
        return _Row(prompt, ids, row_generator(seed, index))

    def _continue(
        self, rows: list[_Row], section: GenerateSection, on_text: Callable[[str], None] | None
    ) -> None:
        """Generate until every row has stopped; shorter prompts are padded on the left."""
        longest = max(len(row.ids) for row in rows)
        end = self._tokenizer.end_of_text
        padding = torch.tensor([longest - len(row.ids) for row in rows], device=self._device)
        self._decoder.begin(padding, longest + section.tokens)
        tokens = torch.tensor(
            [[end] * (longest - len(row.ids)) + row.ids for row in rows], device=self._device
        )
        for _ in range(section.tokens):
            logits = self._decoder.extend(tokens).cpu()
            _require_numbers(logits)
            likeliest = logits.argmax(-1).tolist() if is_greedy(section) else None
            for i, row in enumerate(rows):
                if row.stopped is not None:
                    continue
                if likeliest is not None:
                    token = likeliest[i]
                else:
                    token = next_token(logits[i], torch.tensor(row.ids), section, row.generator)
                self._take(row, token, section)
            if on_text is not None:
                _show(rows[0], section, on_text)
            if all(row.stopped for row in rows):
                break
            last = [row.ids[-1] if row.stopped is None else end for row in rows]
            tokens = torch.tensor(last, device=self._device).unsqueeze(1)
        for row in rows:
            row.stopped = row.stopped or "tokens"
        if on_text is not None:
            _show(rows[0], section, on_text)

    def _take(self, row: _Row, token: int, section: GenerateSection) -> None:
        """Add a row's next token and see whether it ends there."""
        if token == self._tokenizer.end_of_text:
            row.stopped = "end of text"
            return
        row.ids.append(token)
        row.text = self._tokenizer.decode_after(row.ids[: row.prompt_length], row.new)
        found = [place for stop in section.stop if stop and (place := row.text.find(stop)) >= 0]
        if found:
            row.text = row.text[: min(found)]
            row.stopped = "stop string"


def _show(row: _Row, section: GenerateSection, on_text: Callable[[str], None]) -> None:
    """Hand on new text, holding back half characters and what may become a stop string."""
    text = row.text
    if row.stopped is None:
        text = text.rstrip(_INCOMPLETE)
        held = max((len(stop) - 1 for stop in section.stop), default=0)
        text = text[: max(0, len(text) - held)] if held else text
    if len(text) > row.shown:
        on_text(text[row.shown :])
        row.shown = len(text)


def is_text(prompt: str) -> bool:
    """Whether it can be encoded: lone surrogates, from JSON or from a terminal, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


def _require_numbers(logits: Tensor) -> None:
    """Refuse to choose from values that mean nothing."""
    # The sum first: it takes a fifth of the time, for one row half. Finite values may overflow it.
    if not logits.sum().isfinite() and not logits.isfinite().all():
        raise CheckpointError(
            "the model computes values that are not numbers: its weights are damaged, or its "
            "training diverged",
            where="generate",
            do="use another checkpoint, or precision.compute=fp32 if it is bf16",
        )
