"""Tasks against plain implementations of the same definitions with transformers."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

import penstock
from penstock.cli import main
from penstock.errors import ConfigError, DataError, MissedTargetError
from penstock.evaluation.detokenize import detokenize_wikitext

LENGTH = 64


@pytest.fixture(scope="module")
def model_folder(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with GPT-2's own tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=48, n_head=3, n_positions=LENGTH, initializer_range=0.3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((test_data / "gpt2-tokenizer" / name).read_bytes())
    return folder


def theirs(
    folder: Path,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = transformers.GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=False
    )
    return model, tokenizer


def evaluate(folder: Path, data: Path, *tasks: str, **section: object) -> dict[str, dict]:
    result = penstock.evaluate(
        model={"from": str(folder)},
        evaluate={"tasks": list(tasks), "task_data": str(data), **section},
    )
    return result.json()["tasks"]


@torch.no_grad()
def reference_wikitext(folder: Path, text: str, stride: int) -> dict[str, float]:
    """Megatron's definition, window by window, masks and all."""
    model, tokenizer = theirs(folder)
    words = len(text.strip().split(" "))
    tokens = tokenizer(detokenize_wikitext(text), add_special_tokens=False)["input_ids"]
    windows = max(math.ceil(max(len(tokens) - 1 - stride, 0) / stride) + 1, 1)
    total = 0.0
    for index in range(windows):
        piece = tokens[index * stride : index * stride + LENGTH + 1]
        mask = torch.tensor([1.0] * len(piece) + [0.0] * (LENGTH + 1 - len(piece)))[1:]
        piece = piece + [50256] * (LENGTH + 1 - len(piece))
        if index and stride != LENGTH:
            mask[:-stride] = 0
        logits = model(torch.tensor([piece[:-1]])).logits[0].double()
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(piece[1:]), reduction="none"
        )
        total += float((losses * mask).sum())
    loss = total / (len(tokens) - 1)
    ratio = (len(tokens) - 1) / (words - 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(20, loss)),
        "word_perplexity": math.exp(min(20, loss * ratio)),
    }


@pytest.mark.parametrize("stride", [32, 17, LENGTH])
def test_wikitext_equals_megatrons_definition(
    stride: int, model_folder: Path, test_data: Path, tmp_path: Path
) -> None:
    lines = (test_data / "wikitext-2" / "valid.txt").read_text().splitlines(keepends=True)
    data = tmp_path / "part.txt"
    data.write_text("".join(lines[:12]))
    found = evaluate(model_folder, data, "wikitext", stride=stride)["wikitext"]
    expected = reference_wikitext(model_folder, data.read_text(), stride)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["stride"] == stride
    assert found["sequence_length"] == LENGTH


def test_wikitext_is_detokenized_by_the_known_rules() -> None:
    tokens = ' = = History = = \n The dogs \' tail ( as @-@ yet ) was 1 @,@ 000 @.@ 5 m ; " big " !'
    plain = ' == History ==\nThe dogs\' tail (as-yet) was 1,000.5 m; "big" !'
    assert detokenize_wikitext(tokens) == plain
    assert detokenize_wikitext("it 's 20 ° C , N of [ a ] : x") == "it's 20°C, 1 of [a]: x"


@torch.no_grad()
def reference_lambada(folder: Path, texts: list[str]) -> list[tuple[bool, bool, float]]:
    """Strict, by the last token, and the last word's loss, one passage at a time."""
    model, tokenizer = theirs(folder)
    found = []
    for text in texts:
        word = text.split()[-1]
        context = tokenizer(text[: text.rfind(word)].strip(), add_special_tokens=False)["input_ids"]
        target = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([*context, *target])[-(LENGTH + 1) :]
        logits = model(tokens[None, :-1]).logits[0, -len(target) :].double()
        answers = logits.argmax(-1) == tokens[-len(target) :]
        loss = torch.nn.functional.cross_entropy(logits, tokens[-len(target) :], reduction="sum")
        whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = whole[-(LENGTH + 1) :]
        last = model(whole[None, :-1]).logits[0, -1].argmax() == whole[-1]
        found.append((bool(answers.all()), bool(last), float(loss)))
    return found


def easy_passages(folder: Path, test_data: Path, tmp_path: Path) -> Path:
    """Real passages; every third ends with what the model would write, so that some are right."""
    model, tokenizer = theirs(folder)
    lines = (test_data / "lambada" / "lambada_200.jsonl").read_text().splitlines()[:30]
    texts = [json.loads(line)["text"] for line in lines]
    for index in range(0, 30, 3):
        context = texts[index].rsplit(maxsplit=1)[0]
        for _ in range(20):
            tokens = torch.tensor(tokenizer(context)["input_ids"])[-LENGTH:]
            token = int(model(tokens[None]).logits[0, -1].argmax())
            word = tokenizer.decode([token])
            if word.startswith(" ") and word.strip().isalpha():
                break
            context = f"{context} and"
            if token in tokenizer(" and")["input_ids"]:
                break
        texts[index] = context + word
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_lambada_equals_a_plain_implementation(
    model_folder: Path, test_data: Path, tmp_path: Path
) -> None:
    data = easy_passages(model_folder, test_data, tmp_path)
    output = tmp_path / "out"
    found = evaluate(model_folder, data, "lambada", output=str(output))["lambada"]
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    expected = reference_lambada(model_folder, texts)
    assert found["passages"] == len(texts)
    assert found["accuracy"] == pytest.approx(sum(one for one, _, _ in expected) / len(texts))
    assert 0 < found["accuracy"] < 1
    assert found["last_token_accuracy"] == pytest.approx(
        sum(two for _, two, _ in expected) / len(texts)
    )
    mean = sum(loss for _, _, loss in expected) / len(texts)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    records = [json.loads(line) for line in (output / "lambada.jsonl").read_text().splitlines()]
    assert [record["correct"] for record in records] == [one for one, _, _ in expected]
    assert json.loads((output / "results.json").read_text())["tasks"]["lambada"] == found


@torch.no_grad()
def test_sst2_equals_plain_generation(model_folder: Path, test_data: Path, tmp_path: Path) -> None:
    model, tokenizer = theirs(model_folder)
    lines = (test_data / "sst2" / "dev.tsv").read_text().splitlines()
    sentences = [line.split("\t")[0] for line in lines if len(line) < 60][:12]
    records = []
    for index, sentence in enumerate(sentences):
        prompt = f"SENTIMENT ANALYSIS: {sentence} QUESTION: Is it?\n\n"
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=50256)
        text = tokenizer.decode(new[0, tokens.shape[1] :])
        right = index % 3 == 0 and text.startswith(" ") and text.strip().isascii()
        completion = text.strip() if right else " positive"
        records.append({"prompt": prompt, "completion": completion, "text": text})
    data = tmp_path / "sst2.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    wanted = [record["text"].strip().startswith(record["completion"]) for record in records]
    output = tmp_path / "out"
    found = evaluate(model_folder, data, "sst2", output=str(output))["sst2"]
    assert found["accuracy"] == pytest.approx(sum(wanted) / len(wanted))
    written = [json.loads(line) for line in (output / "sst2.jsonl").read_text().splitlines()]
    assert [record["correct"] for record in written] == wanted
    for record, one in zip(written, records, strict=True):
        assert record["generated"].startswith(one["text"].strip())


def test_results_do_not_depend_on_the_batch(model_folder: Path, test_data: Path) -> None:
    tasks = ("wikitext", "lambada", "sst2")
    one = evaluate(model_folder, test_data, *tasks, batch=1, limit=16)
    many = evaluate(model_folder, test_data, *tasks, batch=16, limit=16)
    for task in tasks:
        for name, value in one[task].items():
            if isinstance(value, float) and name != "seconds":
                assert many[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_an_executable_gives_the_same_figures(trained_run: Path, test_data: Path) -> None:
    section = {
        "tasks": ["wikitext", "lambada", "sst2"],
        "task_data": str(test_data),
        "limit": 8,
        "template": "{text}:",
    }
    short = {"sequence_length": 64}
    found = [
        penstock.evaluate(
            run=trained_run, data=short, evaluate=section, compile={"mode": mode}
        ).json()["tasks"]
        for mode in ("auto", "off")
    ]
    for task, figures in found[0].items():
        for name, value in figures.items():
            if isinstance(value, float) and name != "seconds":
                assert found[1][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    summary = json.loads((trained_run / "summary.json").read_text())
    assert set(summary["tasks"]) == {"wikitext", "lambada", "sst2"}
    assert (trained_run / "evaluation" / "lambada.jsonl").is_file()


def test_models_are_compared_on_the_same_examples(
    model_folder: Path, trained_run: Path, test_data: Path, tmp_path: Path
) -> None:
    data = easy_passages(model_folder, test_data, tmp_path)
    result = penstock.evaluate(
        model={"from": str(model_folder)},
        evaluate={"tasks": ["lambada"], "task_data": str(data), "compare": [str(trained_run)]},
    ).json()
    accuracies = [one["tasks"]["lambada"]["accuracy"] for one in result["models"].values()]
    difference = result["differences"][str(trained_run)]["lambada"]
    assert difference["mean"] == pytest.approx(accuracies[1] - accuracies[0])
    p = accuracies[0]  # the other model is never right: the difference has the spread of p
    assert accuracies[1] == 0
    assert difference["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 29))


def test_checkpoints_of_a_run_are_compared(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    penstock.train(
        model={"preset": "gpt2-tiny"},
        data={"path": dataset_folder, "sequence_length": 64},
        batch={"micro": 4},
        compile={"mode": "off"},
        checkpoint={"every": 4, "keep": 9},
        run=run,
        train={"steps": 12, "report": False, "tensorboard": False},
    )
    rows = [{"prompt": f"def f{i}(", "completion": "yes" if i % 2 else "no"} for i in range(6)]
    data = tmp_path / "dev.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"tasks": ["perplexity", "sst2"], "task_data": str(data)}
    early = str(run / "checkpoints" / "step-00000004")
    given = {"run": str(run), "data": {"path": dataset_folder}}
    models = penstock.evaluate(**given, evaluate={**section, "compare": [early]}).json()["models"]
    last, first = models.values()
    assert list(models) == [str(run), f"{run}, step 4"]
    assert first["loss"] > last["loss"] + 0.05
    alone = penstock.evaluate(**given, evaluate=section, checkpoint={"use": 4}).json()
    assert alone["loss"] == first["loss"]
    # The run's own figures are those of its end, and its page shows them.
    assert json.loads((run / "summary.json").read_text())["evaluation"]["loss"] == last["loss"]
    assert (run / "evaluation" / "step-4" / "results.json").is_file()
    assert "labels accuracy" in (run / "report.html").read_text()
    assert main(["evaluate", f"run={run}", f"data.path={dataset_folder}", "checkpoint.use=5"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no checkpoint of step 5" in line
    assert "choose from 4, 8, 12" in line


def test_a_missed_accuracy_fails_and_is_recorded(
    model_folder: Path, test_data: Path, tmp_path: Path
) -> None:
    section = {"limit": 4, "output": str(tmp_path), "min_accuracy": 0.87}
    with pytest.raises(MissedTargetError, match=r"sst2: accuracy 0\.\d+ is below 0\.87"):
        evaluate(model_folder, test_data, "sst2", **section)
    assert (tmp_path / "sst2.jsonl").is_file()
    with pytest.raises(ConfigError, match="none of the tasks has an accuracy"):
        evaluate(model_folder, test_data, "wikitext", limit=4, min_accuracy=0.5)


@pytest.mark.parametrize(
    ("tasks", "section", "message"),
    [
        (["wikitxt"], {}, "did you mean wikitext"),
        (["sst2"], {"labels": [" good", " good!"]}, "cannot tell them apart"),
        (["sst2"], {"labels": [" same", " same"]}, "two labels are the same text"),
        (["sst2"], {"template": "{text} : ", "labels": ["bad", "fine"]}, "tokenises ambiguously"),
        (["sst2"], {"template": "no place"}, "no place for the sentence"),
        (["sst2"], {"labels": [" a", " b"], "limit": 1, "task_data": "TSV"}, "label from 0 to 1"),
        (["lambada"], {"task_data": "EMPTY"}, "holds no data of the task lambada"),
        (["harness:lambada_openai"], {"task_data": "EMPTY"}, "has no local data"),
    ],
)
def test_mistakes_get_one_line(
    tasks: list[str],
    section: dict[str, object],
    message: str,
    model_folder: Path,
    test_data: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.tsv").write_text("a film\t2\n")
    places = {"EMPTY": str(tmp_path / "nothing"), "TSV": str(tmp_path / "rows.tsv")}
    data = places.get(str(section.get("task_data")), str(test_data))
    options = {key: value for key, value in section.items() if key != "task_data"}
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate(model_folder, Path(data), *tasks, **{"limit": 2, **options})


def test_harness_tasks_agree_with_ours(model_folder: Path, test_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    data = easy_passages(model_folder, test_data, tmp_path)
    found = evaluate(model_folder, data, "lambada", "harness:lambada_openai")
    ours, library = found["lambada"], found["harness:lambada_openai"]
    assert library["acc"] == pytest.approx(ours["accuracy"])
    assert library["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)
