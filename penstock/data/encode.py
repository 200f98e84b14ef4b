"""Documents to token sequences: texts, prompts with completions, chats.

Preparation and streaming encode batches of documents with it: a pure function of each document.
It must never read or write a file.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.config.data import SourceSection
from penstock.data.articles import ArticleRules, article_texts, tokenize_article
from penstock.data.chat import ChatTemplate, Span, TemplateError
from penstock.data.formats.sequence import (
    COMPLETION,
    PROMPT,
    SEPARATOR,
    TokenSequence,
    begun,
)
from penstock.data.sources.piece import Piece, Tally
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError


def article_rules(section: SourceSection) -> ArticleRules:
    """How prompts and completions become articles, as the user wants it."""
    return ArticleRules(
        separate=section.one_space,
        pack_pairs=section.packing_boundary == "pair",
        attend_pairs=section.attention_boundary == "pair",
        prefix=section.prompt_prefix,
        postfix=section.prompt_postfix,
        keep_prompt_only=section.keep_prompt_only,
        prompt_weight=section.prompt_weight,
    )


class Encoder:
    """A tokenizer, with the rules for prompts and the template for chats."""

    def __init__(
        self, tokenizer: Tokenizer, section: SourceSection, chat: ChatTemplate | None = None
    ) -> None:
        """Take what encoding depends on."""
        self.tokenizer = tokenizer
        self._rules = article_rules(section)
        self._on_error = section.on_error
        self._chat = chat

    def encode(self, pieces: Sequence[Piece], tally: Tally) -> list[list[TokenSequence]]:
        """The sequences of each piece, with roles where they are not of plain text.

        A text has one, end-of-text behind it where the document ends, and in front the token the
        tokenizer begins a text with, if it has one; pairs have one, or one each where packing may
        part them; a chat has one, as the template lays it out, or none where that refuses it.

        Raises:
            DataError: a chat without a template, or refused by it with on_error=stop.
        """
        texts: list[str] = []
        for piece in pieces:
            if piece.pairs:
                texts += article_texts(piece.pairs, self._rules)
            elif not piece.messages:
                texts.append(piece.text)
        ids = iter(self.tokenizer.encode_batch(texts))
        return [self._sequences(piece, ids, tally) for piece in pieces]

    def _sequences(
        self, piece: Piece, ids: Iterator[NDArray[np.int32]], tally: Tally
    ) -> list[TokenSequence]:
        end, begin = self.tokenizer.end_of_text, self.tokenizer.begin
        if piece.pairs:
            made = tokenize_article(
                piece.pairs, lambda text: next(ids).tolist(), end, self._rules, piece.categories
            )
            found = [sequence for sequence in made if len(sequence.tokens)]
            return [
                sequence if begin is None or number else begun(sequence, begin)
                for number, sequence in enumerate(found)
            ]
        if piece.messages:
            return [_categorized(one, piece) for one in self._chat_sequences(piece, tally)]
        before = [begin] if piece.begins and begin is not None else []
        after = [end] if piece.ends else []
        parts = (np.array(before, np.int32), next(ids), np.array(after, np.int32))
        return [_categorized(TokenSequence(np.concatenate(parts)), piece)]

    def _chat_sequences(self, piece: Piece, tally: Tally) -> list[TokenSequence]:
        if self._chat is None:
            raise DataError(
                "there is a chat, and the tokenizer has no chat template",
                where="tokenizer.from",
                do="put chat_template.jinja, or tokenizer_config.json with one, into its folder",
            )
        try:
            text, spans = self._chat.render(piece.messages)
        except TemplateError as error:
            if self._on_error == "stop":
                raise DataError(
                    f"the chat template refuses a chat: {error}",
                    where=f"it begins {piece.text[:40]!r}",
                    do="mend it, or set source.on_error=skip",
                ) from None
            tally.add("chats the template refuses", str(error))
            return []
        tokens, offsets = self.tokenizer.encode_laid_out(text)
        roles = [COMPLETION if _inside(place, spans) else PROMPT for place in offsets]
        if not tokens or tokens[-1] != self.tokenizer.end_of_text:
            tokens.append(self.tokenizer.end_of_text)
            roles.append(SEPARATOR)
        elif roles[-1] == COMPLETION:
            roles[-1] = SEPARATOR
        return [TokenSequence(np.array(tokens, np.int32), None, np.array(roles, np.uint8))]


def _categorized(sequence: TokenSequence, piece: Piece) -> TokenSequence:
    """A whole document's tokens with its category, where that is asked for."""
    if not piece.categories:
        return sequence
    categories = np.full(len(sequence.tokens), piece.categories[0], np.int32)
    return dataclasses.replace(sequence, categories=categories)


def _inside(place: Span, spans: Sequence[Span]) -> bool:
    """Whether a token has a character in one of the spans."""
    return any(place[0] < end and place[1] > start for start, end in spans)


def text_roles(sequence: TokenSequence, ends: bool) -> TokenSequence:
    """A text as a completion without a prompt, its end-of-text the separator."""
    if sequence.roles is not None:
        return sequence
    roles = np.full(len(sequence.tokens), COMPLETION, np.uint8)
    if ends and len(roles):
        roles[-1] = SEPARATOR
    return dataclasses.replace(sequence, roles=roles)
