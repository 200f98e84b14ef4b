"""Training speeds others have published, and what they were measured with.

Tokens per second and GPU. `fitted`: MosaicML's rows with 2,048 tokens were used to choose the
planner's figures for GPUs; all others were not.
"""

from typing import NamedTuple

MOSAIC = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
LLM_C = "karpathy/llm.c, discussions/481: 10 billion tokens in about 90 minutes"
TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"


class Run(NamedTuple):
    """One published figure."""

    model: str
    length: int
    gpus: int
    micro: int
    accumulation: int
    recompute: str
    published: float
    """Tokens per second and GPU."""
    source: str
    fitted: bool = False
    shard: str = "weights"


MPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1536, 24, 12),
    "1b": (2048, 24, 16),
    "3b": (2560, 32, 20),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}
"""Width, depth and heads of MosaicML's models (scripts/train/yamls/pretrain); vocabulary 50,368."""


def mpt(rows: str) -> list[Run]:
    """Rows of MosaicML's tables: model, length, GPUs, micro, accumulation, checkpointing, T/s/GPU."""
    found = []
    for row in rows.split("\n"):
        if not row.strip():
            continue
        model, length, gpus, micro, accumulation, recomputed, published = row.split()
        recompute = "blocks" if recomputed == "yes" else "none"
        numbers = (int(length), int(gpus), int(micro), int(accumulation))
        run = Run(model, *numbers, recompute, float(published), MOSAIC, length == "2048")
        found.append(run)
    return found


H100 = mpt("""
70b 2048 64 8 4 yes 1039
70b 2048 32 2 16 yes 882
30b 2048 32 14 3 yes 2308
30b 2048 16 10 3 yes 2263
30b 2048 8 3 21 yes 2002
13b 2048 64 2 1 no 4800
13b 2048 8 2 1 no 4792
7b 2048 8 6 1 no 10643
3b 2048 64 6 3 no 22525
3b 2048 16 10 3 no 24142
1b 2048 64 20 1 no 44402
1b 2048 8 14 1 no 45455
30b 4096 8 1 21 yes 1802
30b 8192 8 1 21 yes 1384
13b 4096 8 10 3 yes 4717
7b 4096 8 16 2 yes 8611
7b 8192 8 8 2 yes 6935
3b 4096 8 5 6 no 20964
1b 4096 8 7 4 no 38535
""")
H100 += [
    Run("llama-3-8b", 8192, 8, 2, 1, "selective", 5762, TITAN),
    Run("llama-3-8b", 8192, 128, 2, 1, "selective", 5605, TITAN),
]
A100 = mpt("""
70b 2048 64 8 4 yes 410
70b 2048 32 2 16 yes 373
30b 2048 8 3 21 yes 916
13b 2048 8 2 3 no 2262
7b 2048 8 6 2 no 4641
3b 2048 8 10 2 no 10811
1b 2048 8 14 4 no 20513
760m 2048 8 24 2 no 32434
350m 2048 8 32 2 no 58782
125m 2048 8 40 2 no 142830
30b 4096 8 1 21 yes 814
30b 8192 8 1 21 yes 574
13b 4096 8 10 3 yes 2060
13b 8192 8 5 3 yes 1795
7b 4096 8 16 2 yes 3684
7b 8192 8 8 2 yes 3206
3b 4096 8 5 6 no 9457
1b 4096 8 7 4 no 17807
1b 1024 8 18 4 no 22112
125m 4096 8 16 2 no 118396
""")
A100 += [Run("gpt2", 1024, 8, 64, 1, "none", 231_000, LLM_C, shard="none")]
RUNS = {"h100-cluster": H100, "a100-cluster": A100}
