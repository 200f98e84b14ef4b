"""A model of `transformers` of another family: trained here, generated from, and handed back."""

from pathlib import Path

import pytest
import torch
import transformers

import penstock
from penstock.data.dataset import Dataset

SMALL = {"vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
CONFIGS = {
    "llama": transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=100, max_position_embeddings=64
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        **SMALL, intermediate_size=100, max_position_embeddings=64, rotary_pct=0.5
    ),
    "gptj": transformers.GPTJConfig(
        vocab_size=512, n_embd=48, n_layer=2, n_head=6, n_positions=64, rotary_dim=4
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_is_trained_generated_from_and_handed_back(
    family: str, dataset_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = Dataset.open(dataset_folder).tokenizer()
    tokenizer.save(tmp_path / "theirs" / "tokenizer.json")
    eager = {"compile": {"mode": "off"}, "precision": {"compute": "fp32"}}
    penstock.train(
        model={"from": str(tmp_path / "theirs")},
        data={"path": dataset_folder, "sequence_length": 64},
        batch={"micro": 2, "size": 4},
        optimizer={"lr": 1e-3},
        train={"steps": 3, "report": False, "tensorboard": False},
        run=tmp_path / "run",
        **eager,
    )
    penstock.convert("checkpoint", run=tmp_path / "run", out=tmp_path / "ours")
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    before = theirs.get_input_embeddings().weight
    assert not torch.equal(trained.get_input_embeddings().weight, before)
    prompt = "def read("
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = trained.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    settings = {"prompt": prompt, "tokens": 12, "temperature": 0}
    for source in ({"run": tmp_path / "run"}, {"model": {"from": str(tmp_path / "ours")}}):
        made = penstock.generate(**source, generate=settings, precision={"compute": "fp32"})
        assert made.completions[0].text == tokenizer.decode(expected[0, ids.shape[1] :].tolist())
