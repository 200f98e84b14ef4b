"""Generating with llama.cpp, for `benchmarks/generation.py`: the same weights and prompts.

Runs in an environment of its own (`make llama-cpp`, which compiles llama.cpp for this processor):

    build/benchmarks/llama-cpp/bin/python benchmarks/llama_cpp_generation.py WEIGHTS FOLDER TYPE < JOBS

WEIGHTS: GPT-2 in the Hugging Face layout. FOLDER gets the GGUF file. TYPE: BF16 or Q8_0. JOBS, JSON:
name → [prompts as token ids, tokens to generate]. Prints tokens per second by name.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

THREADS = 2
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def tensors(path: Path):
    """Name and float32 array of each tensor of a safetensors file in float32."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(data[8 + size + begin : 8 + size + end], np.float32)
        yield name.removeprefix("transformer."), values.reshape(entry["shape"])


def write_gguf(weights: Path, path: Path, kind: str) -> None:
    """GPT-2 in GGUF, matrices in `kind`; prompts come as ids, so there is no tokenizer."""
    config = json.loads((weights / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    quantized = gguf.GGMLQuantizationType[kind]
    for name, stored in tensors(weights / "model.safetensors"):
        full = name
        for theirs, ours in NAMES.items():
            full = full.replace(theirs, ours)
        full = full.replace("h.", "blk.", 1) if full.startswith("h.") else full
        is_transposed = name.endswith(".weight") and ".c_" in name
        values = stored.T if is_transposed else stored
        if values.ndim == 2 and "position" not in full:
            writer.add_tensor(
                full,
                gguf.quants.quantize(np.ascontiguousarray(values), quantized),
                raw_dtype=quantized,
            )
        else:
            writer.add_tensor(full, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(context, rows: list[tuple[int, int, int, bool]]) -> None:
    """One call over (token, text, position, whether its logits are wanted)."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, text, position, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = text, wanted
    if llama_cpp.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    llama_cpp.llama_batch_free(batch)


def generate(model, prompts: list[list[int]], count: int, vocabulary: int) -> float:
    """Seconds to continue prompts greedily by `count` tokens each."""
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 256 * len(prompts), 1024, 512
    options.n_seq_max = len(prompts)
    options.n_threads = options.n_threads_batch = THREADS
    context = llama_cpp.llama_init_from_model(model, options)
    started = time.perf_counter()
    rows = [
        (token, text, position, position == len(prompt) - 1)
        for text, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    for step in range(count):
        decode(context, rows)
        wanted = [i for i, row in enumerate(rows) if row[3]]
        following = []
        for text, i in enumerate(wanted):
            pointer = llama_cpp.llama_get_logits_ith(context, i)
            logits = np.ctypeslib.as_array(
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (vocabulary,)
            )
            following.append((int(logits.argmax()), text, len(prompts[text]) + step, True))
        rows = following
    seconds = time.perf_counter() - started
    llama_cpp.llama_free(context)
    return seconds


def main() -> None:
    weights, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    path = folder / f"gpt2-{kind.lower()}.gguf"
    if not path.is_file():
        write_gguf(weights, path, kind)
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    figures = {}
    for name, (prompts, count) in json.load(sys.stdin).items():
        generate(model, prompts, 2, vocabulary)
        figures[name] = len(prompts) * count / generate(model, prompts, count, vocabulary)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
