"""The special tokens of tokenizers for masked language models, by the names families give them.

`data/tokenizer.py` looks them up. It must never encode text.
"""

import dataclasses

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

ROBERTA = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
"""Role → token. In this order their ids are those of RoBERTa."""
BERT = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""The same for BERT and DistilBERT."""
_ALBERT = {**BERT, "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """What a masked language model's tokenizer has besides words."""

    roles: dict[str, str]
    """Role, as `transformers` names it, → the token's text."""
    mask: int
    """Stands for a token to be filled in."""
    begin: int
    """Stands before every document."""
    end: str
    """Text of the token after every document."""


def masked_tokens(inner: tokenizers.Tokenizer) -> MaskedTokens | None:
    """Those of a tokenizer that has a mask token; None for all others."""
    for roles in (ROBERTA, BERT, _ALBERT):
        if all(inner.token_to_id(text) is not None for text in roles.values()):
            mask, begin = (inner.token_to_id(roles[role]) for role in ("mask_token", "cls_token"))
            return MaskedTokens(roles, mask or 0, begin or 0, roles["sep_token"])
    return None


def word_piece(model: models.WordPiece, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's pipeline around a vocabulary of word pieces (Devlin et al., arXiv 1810.04805)."""
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # type: ignore[assignment]
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    inner.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return inner


def word_piece_trainer(vocab_size: int) -> trainers.WordPieceTrainer:
    """Learns a vocabulary of word pieces with BERT's special tokens."""
    return trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT.values()), show_progress=False
    )


def token_in_front(inner: tokenizers.Tokenizer) -> int | None:
    """The token that a tokenizer's own settings put before every text, where it is one alone."""
    plain, whole = (inner.encode("a", add_special_tokens=added).ids for added in (False, True))
    has_one = len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain
    return whole[0] if has_one else None


def put_in_front(inner: tokenizers.Tokenizer, name: str | None) -> None:
    """Have the tokenizer put this token before every text and nothing behind it; None: nothing."""
    first = "" if name is None else f"{name} "
    known = [] if name is None else [(name, inner.token_to_id(name))]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{first}$A", pair=f"{first}$A {first}$B", special_tokens=known
    )


def enclose(inner: tokenizers.Tokenizer, roles: dict[str, str]) -> None:
    """Have other programs that use the tokenizer put its special tokens around a text."""
    names = (roles["cls_token"], roles["sep_token"])
    (begin, first), (end, last) = ((name, inner.token_to_id(name)) for name in names)
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(begin, first), (end, last)],
    )
