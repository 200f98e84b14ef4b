"""Every key a user can set: type, default, unit and meaning, in one place.

`config/load.py` fills these models from YAML and overrides; every other module receives the one
section it needs. This module must never import torch or know what the keys do.
"""

from typing import Annotated, Literal

from pydantic import Field

from penstock.config.cleaning import CleanSection
from penstock.config.data import (
    DataSection,
    PrepareSection,
    RaySection,
    SourceSection,
    TokenizerSection,
)
from penstock.config.launch import LaunchSection
from penstock.config.lora import LoraSection
from penstock.config.optimizer import OptimizerSection
from penstock.config.planning import PlanSection
from penstock.config.section import Probability, Section


class ModelSection(Section):
    """What to build. Choose `preset`, `family` or `from`; any other key overrides it."""

    preset: str | None = None
    """Name of a known shape: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-demo, gpt2-tiny,
    pythia-70m, pythia-160m, pythia-410m, pythia-1b, pythia-1.4b, pythia-2.8b, pythia-6.9b,
    pythia-12b, gpt-neox-20b, pythia-tiny, gpt-j-6b, gpt-j-tiny, llama-2-7b, llama-2-13b,
    llama-2-70b, llama-3-8b, llama-3-70b, llama-3.1-8b, llama-3.2-1b, llama-tiny,
    bert-base, bert-large, bert-tiny, roberta-base, roberta-large, roberta-tiny,
    distilbert-base, distilbert-tiny, albert-base-v2, albert-tiny."""
    family: str | None = None
    """Architecture family, gpt2 when neither it nor a preset is named: gpt2, gpt_neox, gptj, llama,
    bert, roberta, distilbert, albert. Starts from the family's first preset."""
    from_: str | None = Field(default=None, alias="from")
    """Folder in the Hugging Face layout (config.json + weights), a hub name, or, for `train`, a run
    folder, to start from."""
    layers: int | None = Field(default=None, ge=1)
    """Depth, in blocks."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Width of the residual stream, in elements."""
    heads: int | None = Field(default=None, ge=1)
    """Query heads per block; must divide hidden_size."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads per block, each shared by heads / kv_heads query heads."""
    mlp_size: int | None = Field(default=None, ge=1)
    """Width of the MLP, in elements; 4 × hidden_size when neither given nor the preset's."""
    max_positions: int | None = Field(default=None, ge=1)
    """Longest sequence the model allows, in tokens."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Vocabulary, in tokens; taken from the dataset when there is one."""
    dropout: Probability | None = None
    """Probability of dropping an activation (embedding, attention, residual) in training."""
    embedding_dropout: Probability | None = None
    """The same for the embeddings' sum, where it differs."""
    attention_dropout: Probability | None = None
    """The same for attention's probabilities, where it differs."""
    norm_epsilon: float | None = Field(default=None, gt=0)
    """Constant added to the variance in norms."""
    tie_embeddings: bool | None = None
    """Whether the head's projection is the token embedding."""
    rotary_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of each head that rotary positions rotate."""
    rotary_base: float | None = Field(default=None, gt=0)
    """Base of rotary positions' wavelengths."""


class BatchSection(Section):
    """How many sequences at once."""

    micro: int = Field(default=4, ge=1)
    """Sequences per device pass."""
    size: int | None = Field(default=None, ge=1)
    """Sequences per optimizer step over all replicas; `micro` of each replica when not given."""


class PrecisionSection(Section):
    """Number formats."""

    compute: Literal["bf16", "fp32"] | None = None
    """Format of weights and activations (masters stay fp32); bf16 where the device does it fast."""
    weights: Literal["int8"] | None = None
    """Format of the matrices of blocks and head when generating and evaluating; like `compute` when
    not given. int8: rounded when they are loaded, a scale for every 128 weights of an output."""


class CompileSection(Section):
    """How executables are made."""

    mode: Literal["auto", "off"] = "auto"
    """What training does without an executable: compile first, or run eagerly."""
    toolchain: str | None = None
    """What makes machine code: inductor, native (for generating, on processors with AVX-512 and
    bf16), eager (none: graphs run as they are), or one installed; native where it can when not
    given, else inductor."""
    workers: int | None = Field(default=None, ge=1)
    """Compiler processes at once; all cores when not given."""
    cache: str | None = None
    """Folder of the content-addressed kernel cache; the user's cache folder when not given."""


class ScheduleSection(Section):
    """Learning rate over the run."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: constant, then a linear decay at the end."""
    warmup: int = Field(default=0, ge=0)
    """Linear warm-up, in optimizer steps."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    decay: int | None = Field(default=None, ge=1)
    """Length of wsd's decay, in optimizer steps; a fifth of the run when not given."""


class TrainSection(Section):
    """The training loop. Give one of `steps`, `epochs` or `tokens`."""

    steps: int | None = Field(default=None, ge=1)
    """Length of the run, in optimizer steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run, in passes over the split."""
    tokens: int | None = Field(default=None, ge=1)
    """Length of the run, in tokens."""
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between metrics lines."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations on the validation split; only at the end if null."""
    evaluate_sequences: int | None = Field(default=256, ge=1)
    """Sequences per evaluation during training; null: the whole split."""
    target_loss: float | None = Field(default=None, gt=0)
    """Stop early once the validation loss, in nats per token, is at or below this."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early after this many evaluations in a row without a lower validation loss."""
    freeze: list[str] = Field(default=[])
    """Names of parameters left as they are, * standing for anything, as in [embed.*]."""
    throughput_warmup_steps: int = Field(default=3, ge=0)
    """First optimizer steps left out of the throughput figures."""
    objective: Literal["auto", "causal", "masked"] = "auto"
    """What is learnt: the next token, or tokens that were hidden; auto: what the model is for."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """masked: share of the tokens that are to be predicted; 80% of them are replaced by the mask
    token, 10% by any token, 10% stay (BERT, arXiv 1810.04805, §3.1), chosen anew every epoch."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition penalty (PaLM, arXiv 2204.02311, §5)."""
    bad_steps: int = Field(default=10, ge=0)
    """Stop after more than this many steps were skipped by the guard."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Skip a step whose gradient norm exceeds this multiple of its running mean; null: only
    steps with NaN or infinity are skipped."""
    loss_spike_factor: float | None = Field(default=None, gt=1)
    """Skip a step whose loss exceeds this multiple of its running mean, such as 1.5; null: as for
    the norm. Either counts from the 20th applied step on."""
    rollback_after: int | None = Field(default=None, ge=1)
    """Go back to the weights and optimizer state of the last checkpoint after this many skipped
    steps in a row; data and step count go on, past what was skipped. null: never."""
    log_samples: bool = False
    """Write which samples each process takes, and their checksums, to RUN/samples."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    report: bool = True
    """Write the HTML report and the loss curve at the end."""


class CheckpointSection(Section):
    """Saving and resuming."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; only at the end if null."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    resume: Literal["auto", "must", "never"] = "auto"
    """With checkpoints in the run folder: go on from the newest (auto), fail when there is none
    (must), or refuse to touch them (never)."""
    on_error: Literal["continue", "stop"] = "continue"
    """When one cannot be written, as on a full disk: say so, count it and train on; or stop. The
    last one of a run must be written either way."""
    use: Literal["newest", "best"] | Annotated[int, Field(ge=1)] = "newest"
    """Checkpoint of a run that `evaluate`, `generate` and `convert` read; best: by validation; or
    the number of its optimizer step."""


class EvaluateSection(Section):
    """Held-out evaluation."""

    split: str = "test"
    """Split of the dataset to evaluate on."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens each sliding window moves on; half the sequence length when not given."""
    batch: int = Field(default=8, ge=1)
    """Windows per device pass."""
    compressors: bool = False
    """Also compress the split's text with gzip, bzip2 and xz and show their bits per byte."""
    tasks: list[str] = Field(default=["perplexity"], min_length=1)
    """perplexity: of evaluate.split; wikitext, lambada, sst2; or harness:NAME, a task of
    lm-evaluation-harness (needs the extra `harness`). All but the first read evaluate.task_data."""
    task_data: str | None = None
    """File of the one task, or folder with the tasks' files, such as wikitext-2/test.txt,
    lambada/test.jsonl, sst2/dev.tsv, and NAME/test.jsonl for harness:NAME."""
    limit: int | None = Field(default=None, ge=1)
    """Most examples of each task, from the first on (of WikiText, lines); all when not given."""
    template: str = (
        "SENTIMENT ANALYSIS: {text} QUESTION: Is this sentence positive or negative?\n\n"
    )
    """Prompt of sst2's sentences; {text} is the sentence."""
    labels: list[str] = Field(default=[" negative", " positive"], min_length=2)
    """Texts that sst2's labels 0, 1, … are written as, after the prompt."""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Fail when the accuracy of a task is below this."""
    output: str | None = None
    """Folder for results.json and each task's examples, NAME.jsonl; RUN/evaluation for a run."""
    compare: list[str] = Field(default=[])
    """Other runs, or folders in the Hugging Face layout, to score on the same tasks."""


class GenerateSection(Section):
    """Text generation."""

    prompt: str | None = None
    """Text to continue; asked for on the terminal when neither prompt nor input is given."""
    input: str | None = None
    """JSONL file of prompts, one object with a `prompt` key a line."""
    output: str | None = None
    """JSONL file to write, for `input`; standard output when not given."""
    tokens: int = Field(default=64, ge=1)
    """Most new tokens per prompt."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Softmax temperature; 0: greedy."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from this many likeliest tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches this."""
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divide the logits of tokens already seen by this (CTRL, arXiv 1909.05858, §4.1)."""
    stop: list[str] = Field(default=[])
    """Strings that end the text; not part of it."""
    batch: int = Field(default=8, ge=1)
    """Most prompts per device pass, for `input`."""


class ProfileSection(Section):
    """What `profile` records."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, or new tokens per prompt when generating; 4 and 32 when not given."""
    warmup_steps: int = Field(default=2, ge=0)
    """The same before recording begins."""


class Config(Section):
    """Everything one command needs; each verb reads the sections it names."""

    schema_version: Literal[1] = 1
    """Version of this schema, written into every resolved config."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The one seed all random numbers come from."""
    run: str | None = None
    """Run folder: written by `train`, read by `evaluate`, `generate` and `convert`."""
    executable: str | None = None
    """Executable file: written by `compile`, read by `train`, `evaluate` and `generate`."""
    mode: Literal["train", "evaluate", "generate"] = "train"
    """What `plan` and `compile` work for; the model is that of `run` where it is not training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA when there is a GPU."""
    from_: str | None = Field(default=None, alias="from")
    """Dataset to convert: a file, a folder, a glob or a Megatron prefix, in any known format; or
    the system whose configuration is imported, also `--from SYSTEM`."""
    out: str | None = None
    """Folder to write, for `convert`, `plan`, `bench` and `profile`; file, for `import-config` and,
    of a dataset, `inspect`."""
    trust: list[str] = Field(default=[])
    """SHA-256 of executable files made by others that may run here; also `--trust SHA256`."""
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    source: SourceSection = SourceSection()
    clean: CleanSection = CleanSection()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection = DataSection()
    prepare: PrepareSection = PrepareSection()
    ray: RaySection = RaySection()
    batch: BatchSection = BatchSection()
    precision: PrecisionSection = PrecisionSection()
    plan: PlanSection = PlanSection()
    launch: LaunchSection = LaunchSection()
    compile: CompileSection = CompileSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    generate: GenerateSection = GenerateSection()
    profile: ProfileSection = ProfileSection()
