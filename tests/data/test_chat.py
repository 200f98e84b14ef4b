"""Chat templates: the text and tokens of transformers, and the loss on the assistant's part alone."""

import json
from pathlib import Path

import pytest

import penstock
from penstock.data.chat import ChatTemplate, TemplateError
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "<|im_start|>assistant\n{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "    {%- else %}<|im_start|>{{ message | tojson }}{% endif %}\n"
    "    {%- if loop.index > 9 %}{% break %}{% endif %}\n"
    "{%- endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "naïve <|im_end|> 漢字?"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because 🙂"},
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Tokenizer.train(["Be brief. Yes. Because assistant user system " * 40], 330)
    made._inner.add_special_tokens(SPECIAL)
    made.save(tmp_path / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>"},
        "eos_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def theirs(folder: Path):
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<|endoftext|>"
    )


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_text_and_tokens_are_those_of_transformers(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    reference = theirs(folder)
    reference.chat_template = template
    text, spans = ChatTemplate.find(str(folder)).render(CHAT)
    assert text == reference.apply_chat_template(CHAT, tokenize=False)
    encoded = reference.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=template == MARKED
    )
    ids, offsets = Tokenizer.load(folder).encode_laid_out(text)
    assert ids == encoded["input_ids"]
    if template == MARKED:
        ours = [any(a < end and b > start for start, end in spans) for a, b in offsets]
        assert ours == [bool(mask) for mask in encoded["assistant_masks"]]
    said = [text[start:end] for start, end in spans]
    first = " Yes. <|im_end|>" if template == MARKED else "Yes.<|im_end|>\n"
    assert said[0] == first
    assert said[1].startswith("Because 🙂<|im_end|>")


def test_prepare_weighs_only_what_the_assistant_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps({"messages": CHAT})] * 5))
    dataset = penstock.prepare(
        source={"kind": "jsonl", "path": str(tmp_path / "in.jsonl")},
        tokenizer={"from": str(folder)},
        data={
            "path": str(tmp_path / "d"),
            "sequence_length": 200,
            "packing": "single::drop",
            "splits": [1, 0, 0],
        },
        prepare={"workers": 1},
    ).dataset
    split = dataset.split("train")
    _, targets, weights = split.sample(0, 200)
    said = dataset.tokenizer().decode(targets[weights == 1].tolist())
    assert said == "Yes.<|im_end|>\nBecause 🙂<|im_end|>\n<|endoftext|>"


def test_templates_cannot_do_harm_and_refuse_with_a_reason(folder: Path, tmp_path: Path) -> None:
    for template, reason in (
        ("{{ messages.__class__.__mro__ }}", "unsafe|access to attribute"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
    ):
        with pytest.raises(TemplateError, match=reason):
            ChatTemplate(template, {}).render(CHAT)
    whole = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match="laid out otherwise"):
        ChatTemplate(whole, {}).render(CHAT)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="chat template of .* is none"):
        ChatTemplate.find(str(folder))


def test_a_chat_without_a_template_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        penstock.prepare(
            source={"kind": "jsonl", "path": str(tmp_path / "in.jsonl")},
            tokenizer={"from": str(folder)},
            data={"path": str(tmp_path / "d")},
            prepare={"workers": 1},
        )
