"""Prompts and completions as token sequences with roles, and such sequences packed into rows.

What `prepare` needs to make the files of SambaNova's generative_data_prep from the same input. It
must never know about files. Source: sambanova/generative_data_prep (its rules, held against its
own output).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from penstock.data.formats.sequence import (
    COMPLETION,
    PROMPT,
    SEPARATOR,
    TokenSequence,
    weights_or_none,
)
from penstock.data.packing import Packing
from penstock.data.sources.piece import Pair


@dataclasses.dataclass(frozen=True)
class ArticleRules:
    """How prompts and completions become articles, with the tool's own defaults."""

    separate: bool = True
    """Exactly one space stands before each completion, whatever prompt and completion have; off
    for plain text."""
    pack_pairs: bool = False
    """Packing may part the pairs of one article."""
    attend_pairs: bool = False
    """Each pair ends with a separator, not only the article."""
    prefix: str = ""
    """Stands before each prompt."""
    postfix: str = ""
    """Stands behind each prompt."""
    keep_prompt_only: bool = False
    """Pairs and rows without a completion are kept."""
    prompt_weight: float = 0.0
    """What a prompt's tokens weigh in the loss; completions and separators weigh 1."""


def article_texts(pairs: Sequence[Pair], rules: ArticleRules) -> list[str]:
    """The texts `tokenize_article` will encode, in its order."""
    return [text for pair in pairs for text in _separated(pair, rules) if text]


def tokenize_article(
    pairs: Sequence[Pair],
    encode: Callable[[str], Sequence[int]],
    end_of_text: int,
    rules: ArticleRules = ArticleRules(),
    categories: Sequence[int] = (),
) -> list[TokenSequence]:
    """Tokens, roles and loss weights of a text, a prompt and completion, or a dialogue.

    End-of-text follows each pair; the last of an article is its separator. One sequence, or one a
    pair where packing may part them. `categories`: one of each pair, or none.
    """
    found: list[TokenSequence] = []
    tokens: list[int] = []
    roles: list[int] = []
    kinds: list[int] = []
    for number, pair in enumerate(pairs):
        prompt, completion = _separated(pair, rules)
        asked = encode(prompt) if prompt else []
        told = encode(completion) if completion else []
        if asked or told:
            tokens += [*asked, *told, end_of_text]
            roles += [PROMPT] * len(asked) + [COMPLETION] * (len(told) + 1)
        if categories:
            kinds += [categories[number]] * (len(tokens) - len(kinds))
        if roles and (rules.attend_pairs or number == len(pairs) - 1):
            roles[-1] = SEPARATOR
        if rules.pack_pairs and number < len(pairs) - 1:
            found.append(_article(tokens, roles, kinds, rules))
            tokens, roles, kinds = [], [], []
    if roles:
        roles[-1] = SEPARATOR
    return [*found, _article(tokens, roles, kinds, rules)]


def _separated(pair: Pair, rules: ArticleRules) -> Pair:
    """What is encoded of a pair: nothing of one that is left out."""
    prompt, completion = pair
    if rules.separate:
        prompt, completion = prompt.rstrip(" "), completion and " " + completion.lstrip(" ")
    prompt = prompt and rules.prefix + prompt + rules.postfix
    return (prompt, completion) if completion or rules.keep_prompt_only else ("", "")


def _article(
    tokens: list[int], roles: list[int], categories: list[int], rules: ArticleRules
) -> TokenSequence:
    kinds = np.array(roles, np.uint8)
    weights = np.where(kinds == PROMPT, np.float32(rules.prompt_weight), np.float32(1))
    return TokenSequence(
        np.array(tokens, np.int32),
        weights_or_none(weights),
        kinds,
        np.array(categories, np.int32) if categories else None,
    )


def pack_articles(
    articles: Iterable[TokenSequence],
    packing: Packing,
    width: int,
    rules: ArticleRules = ArticleRules(),
    overlap: int = 0,
) -> Iterator[TokenSequence]:
    """Rows of at most `width` tokens; those that full fills begin with `overlap` of the row before.

    full fills each row and spills the rest into the next; greedy puts whole articles into a row
    while they fit; single gives each its own. What is longer than a row loses its end, its
    beginning, or all of it (`packing.overflow`). Rows without a completion are left out unless
    they are to be kept; the row full and greedy have begun at the end stays in any case, as in
    the tool.
    """
    if packing.kind == "full":
        rows = _fill(articles, width, overlap)
    elif packing.kind == "greedy":
        rows = _gather(articles, packing.overflow, width)
    else:
        rows = _one_each(articles, packing.overflow, width)
    for row, is_unfinished in rows:
        if is_unfinished or rules.keep_prompt_only or _completes(row):
            yield row


def _completes(row: TokenSequence) -> bool:
    """Whether a row has a token of a completion; a separator alone is none."""
    return bool((row.roles == COMPLETION).any()) if row.roles is not None else len(row.tokens) > 0


_Rows = Iterator[tuple[TokenSequence, bool]]
"""Rows, and whether each is the one that was being filled when the articles ended."""


def _fill(articles: Iterable[TokenSequence], width: int, overlap: int) -> _Rows:
    """Rows of exactly `width` tokens, but for the last."""
    begun: list[TokenSequence] = []
    used = old = 0
    for article in articles:
        start, length = 0, len(article.tokens)
        while used + length - start > width:
            end = start + width - used
            row = _concatenate([*begun, _part(article, start, end)])
            yield row, False
            begun = [_part(row, width - overlap, width)] if overlap else []
            used = old = overlap
            start = end
        if start < length:
            begun.append(_part(article, start, length))
            used += length - start
    if used > old:
        yield _concatenate(begun), True


def _gather(articles: Iterable[TokenSequence], overflow: str, width: int) -> _Rows:
    """Rows of whole articles; one longer than a row ends the row before it, also when dropped."""
    row: list[TokenSequence] = []
    used = 0
    for whole in articles:
        if used + len(whole.tokens) > width:
            if row:
                yield _concatenate(row), False
            row, used = [], 0
        article = _fit(whole, overflow, width)
        if article is not None and len(article.tokens):
            row.append(article)
            used += len(article.tokens)
    if row:
        yield _concatenate(row), True


def _one_each(articles: Iterable[TokenSequence], overflow: str, width: int) -> _Rows:
    """A row for each article that has tokens and is not dropped."""
    for whole in articles:
        article = _fit(whole, overflow, width)
        if article is not None and len(article.tokens):
            yield article, False


def _fit(article: TokenSequence, overflow: str, width: int) -> TokenSequence | None:
    """The article, cut to `width` tokens; None when it is longer and dropped."""
    length = len(article.tokens)
    if length <= width:
        return article
    if overflow == "drop":
        return None
    start = length - width if overflow == "truncate_left" else 0
    return _part(article, start, start + width)


def _part(sequence: TokenSequence, start: int, end: int) -> TokenSequence:
    """Some of a sequence's tokens."""
    return TokenSequence(
        sequence.tokens[start:end],
        None if sequence.weights is None else sequence.weights[start:end],
        None if sequence.roles is None else sequence.roles[start:end],
        None if sequence.categories is None else sequence.categories[start:end],
    )


def _concatenate(parts: Sequence[TokenSequence]) -> TokenSequence:
    """Sequences of articles, all with roles, as one."""
    roles = [part.roles for part in parts if part.roles is not None]
    categories = [part.categories for part in parts if part.categories is not None]
    return TokenSequence(
        np.concatenate([part.tokens for part in parts]),
        weights_or_none(np.concatenate([part.loss_weights() for part in parts])),
        np.concatenate(roles) if len(roles) == len(parts) else None,
        np.concatenate(categories) if len(categories) == len(parts) else None,
    )
