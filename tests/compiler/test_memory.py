"""Memory and time by region: closed forms, sharding, streaming, and what saving costs."""

import dataclasses

import pytest

from penstock.compiler.cost import CostModel
from penstock.compiler.loops import block_loops, head_loops
from penstock.compiler.memory import MemoryModel, block_activations
from penstock.compiler.planner import make_plan
from penstock.compiler.regions import trace_kernel
from penstock.config.lora import LoraSection
from penstock.config.schema import BatchSection, ModelSection, PlanSection
from penstock.hardware.target import Target, load_target
from penstock.models.architecture import Architecture
from penstock.models.lora import adapted
from penstock.models.resolve import resolve_architecture

GPT2 = resolve_architecture(ModelSection(preset="gpt2"))
PARAMETERS = GPT2.parameter_count(padded=True)


def memory(**fields: object) -> MemoryModel:
    values = {
        "architecture": GPT2, "micro": 4, "sequence_length": 512, "accumulation": 1,
        "compute": "bf16", "recompute": "selective", "loss_chunks": 7, "device": "cpu",
    }  # fmt: skip
    return MemoryModel(**{**values, **fields})


def whole(**fields: object) -> dict[str, int]:
    return memory(**fields).stage(12, embedding=True, head=True, block_passes=12).device


def cost(target: Target | None = None, **fields: object) -> CostModel:
    values = {
        "architecture": GPT2, "target": target or load_target("zen5-2core"), "micro": 4,
        "sequence_length": 512, "compute": "bf16", "recompute": "selective",
    }  # fmt: skip
    return CostModel(**{**values, **fields})


@pytest.mark.parametrize(
    ("optimizer", "compute", "expected"),
    [
        # Weights are the upper halves of their masters.
        ("adamw", "bf16", 10 * PARAMETERS),
        # Float32 weights are their own masters.
        ("adamw", "fp32", 8 * PARAMETERS),
        # Muon has one moment less for the blocks' matrices: 12 times 12 D².
        ("muon", "bf16", 10 * PARAMETERS - 2 * 12 * 12 * 768**2),
        ("muon", "fp32", 8 * PARAMETERS - 4 * 12 * 12 * 768**2),
    ],
)
def test_optimizer_state_by_the_closed_form(optimizer: str, compute: str, expected: int) -> None:
    assert whole(optimizer=optimizer, compute=compute)["optimizer"] == expected


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_saving_while_training_holds_a_copy_of_masters_and_moments(compute: str) -> None:
    plain, saved = whole(compute=compute), whole(compute=compute, saves=True)
    assert plain["checkpoint"] == 0
    assert saved["checkpoint"] == 12 * PARAMETERS
    assert saved["total"] == plain["total"] + 12 * PARAMETERS


def test_resuming_holds_what_is_read_beside_the_new_state_before_a_step() -> None:
    plain, resumed = whole(), whole(resumes=True)
    made = sum(plain[kind] for kind in ("gradients", "activations", "logits"))
    assert resumed["checkpoint"] == 12 * PARAMETERS - made
    # A step that needs more than reading does, or a copy in any case, is the peak itself.
    assert whole(resumes=True, micro=64)["checkpoint"] == 0
    assert whole(resumes=True, saves=True) == whole(saves=True)


def test_beside_a_gpu_the_copy_is_in_the_hosts_memory() -> None:
    found = memory(device="cuda", saves=True).stage(12, embedding=True, head=True, block_passes=12)
    assert "checkpoint" not in found.device
    assert found.outside == {"checkpoint": 12 * PARAMETERS}


def test_masters_of_a_gpu_and_of_other_optimizers_are_held_whole() -> None:
    on_gpu = memory(device="cuda").stage(12, embedding=True, head=True, block_passes=12)
    assert on_gpu.device["optimizer"] == 12 * PARAMETERS
    assert whole(optimizer="nadam")["optimizer"] == 12 * PARAMETERS


def test_gradients_are_summed_beside_themselves_only_in_another_format() -> None:
    assert whole(accumulation=4)["gradients"] == (2 + 4) * PARAMETERS
    assert whole(accumulation=4, compute="fp32")["gradients"] == 4 * PARAMETERS
    assert whole(accumulation=4, sums="bf16")["gradients"] == 2 * PARAMETERS


def test_gradients_take_the_room_of_what_none_keeps_besides_where_products_are_ours() -> None:
    def gradients(recompute: str, **fields: object) -> int:
        return whole(recompute=recompute, own=True, **fields)["gradients"]

    # In bf16, of 2,048 tokens: two norms' results and the activation's of four widths, and the
    # norms' means and deviations in float32.
    more = 12 * 2048 * (2 * (2 + 4) * 768 + 4 * 4)
    assert gradients("none") - gradients("none", own_products=True) == more
    assert gradients("none", own_products=True, micro=64) == 0  # no more than there are
    for recompute in ("selective", "blocks"):
        assert gradients(recompute) == gradients(recompute, own_products=True)


def test_stages_hold_every_parameter_once() -> None:
    model = memory()
    for tied in (True, False):
        architecture = dataclasses.replace(GPT2, tie_embeddings=tied)
        model = memory(architecture=architecture)
        first = model.parameters(3, embedding=True, head=tied)
        last = model.parameters(9, embedding=False, head=not tied)
        assert first + last == architecture.parameter_count(padded=True)


def test_shared_layers_are_held_once_and_factorised_tables_at_their_width() -> None:
    albert = resolve_architecture(ModelSection(preset="albert-base-v2"))
    held = memory(architecture=albert).parameters(12, embedding=True, head=True)
    assert held == albert.parameter_count(padded=True)
    # 30,080 padded rows, 512 positions and 2 types of 128, and the norm; 128 × 768 and 768;
    # one block; the head's dense layer, norm and bias.
    block = 12 * 768**2 + 9 * 768 + 3072
    tables = (30080 + 512 + 2 + 2) * 128 + 128 * 768 + 768
    assert held == tables + block + (768 + 1 + 2) * 128 + 30080


def test_sharding_divides_state_and_full_sharding_gathers_one_region() -> None:
    alone = whole(replicas=4)
    optimizer = whole(replicas=4, shard="optimizer")
    full = whole(replicas=4, shard="weights")
    gradients = whole(replicas=4, shard="gradients")
    assert gradients["gradients"] == full["gradients"]
    assert gradients["weights"] == alone["weights"]
    assert optimizer["optimizer"] == alone["optimizer"] // 4
    assert optimizer["weights"] == alone["weights"]
    assert full["weights"] == alone["weights"] // 4
    # Alone, the replicas' gradients are summed in float32 besides; torch adds divided ones.
    assert full["gradients"] == alone["gradients"] // 3 // 4
    # The table of tokens is the largest region: its weights and gradients, whole; of what comes and
    # goes with a step, 15% more are cut up.
    table, less = 2 * 2 * GPT2.padded_vocab_size * 768, alone["gradients"] // 3 - full["gradients"]
    more = full["workspace"] - alone["workspace"]
    assert more == pytest.approx(1.15 * table - 0.15 * less, abs=2)


def test_recompute_keeps_inputs_and_one_block() -> None:
    full = block_activations(GPT2, 4 * 512, 2)
    assert whole()["activations"] == 12 * full
    again = whole(recompute="blocks")["activations"]
    assert again == 12 * 4 * 512 * 768 * 2 + full
    # Blocks 5 and 10 of 12 are computed again, while nothing after the tenth is left.
    assert whole(recompute="every-5")["activations"] == 10 * full + 2 * 4 * 512 * 768 * 2
    every_second = whole(recompute="every-2")["activations"]
    assert every_second == 6 * full + 6 * 4 * 512 * 768 * 2 + full
    assert whole(recompute="every-1") == whole(recompute="blocks")


def test_streamed_kinds_are_outside_and_not_in_the_total() -> None:
    model = memory(device="ipu", streams=("optimizer", "weights"))
    found = model.stage(12, embedding=True, head=True, block_passes=12)
    assert found.outside == {"optimizer": 12 * PARAMETERS, "weights": 2 * PARAMETERS}
    assert not found.outside.keys() & found.device.keys()
    kinds = {kind: size for kind, size in found.device.items() if kind != "total"}
    assert found.device["total"] == sum(kinds.values())


@pytest.mark.parametrize(
    "preset",
    ["gpt2", "gpt2-medium", "gpt2-xl", "pythia-1b", "gpt-j-6b", "llama-3-8b", "bert-base"],
)
def test_regions_do_the_flops_of_the_whole(preset: str) -> None:
    architecture: Architecture = resolve_architecture(ModelSection(preset=preset))
    target = dataclasses.replace(
        load_target("h100"), peak_flops={"bf16": 1.0}, bandwidth_bytes_per_second=1e30
    )
    model = cost(target, architecture=architecture)
    seconds = sum(part.compute for part in (*model.embedding(), *model.head()))
    seconds += architecture.layers * sum(part.compute for part in model.block())
    assert seconds == pytest.approx(4 * 512 * architecture.flops_per_token(512), rel=1e-12)


def test_recompute_costs_one_more_forward_pass() -> None:
    forward, backward = cost().block()
    for policy, share in (("blocks", 1), ("every-1", 1), ("every-4", 1 / 4)):
        again = cost(recompute=policy).block()
        assert again[0] == forward
        assert again[1].total == pytest.approx(backward.total + share * forward.total)
    assert cost(recompute="none").block()[1].total > backward.total


def test_the_update_moves_28_bytes_per_parameter_and_sums_over_replicas() -> None:
    target = load_target("h100")
    alone = cost(target).update(1_000_000)
    assert alone.bandwidth * target.bandwidth_bytes_per_second == pytest.approx(28e6)
    assert alone.link == 0
    # A ring sends 2 (R - 1)/R of 16-bit gradients.
    four = cost(target, replicas=4).update(1_000_000)
    assert four.link * target.link_bytes_per_second == pytest.approx(2 * 0.75 * 2e6)


def test_streamed_state_crosses_the_link_once_per_step_each_way() -> None:
    target = load_target("graphcore-pod16")
    seconds = cost(target).update(1_000_000)
    assert seconds.link * target.streaming_bytes_per_second == pytest.approx(24e6)
    streamed = load_target("cerebras-cs2")
    forward, backward = cost(streamed).block()
    size = 2 * GPT2.block_parameters()
    assert forward.link * streamed.streaming_bytes_per_second == pytest.approx(size)
    assert backward.link * streamed.streaming_bytes_per_second == pytest.approx(2 * size)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize(
    ("preset", "micro", "length", "compute", "dropout"),
    [
        ("gpt2", 4, 512, "bf16", 0.0),
        ("gpt2", 1, 1000, "fp32", 0.0),
        ("gpt2-medium", 2, 256, "bf16", 0.0),
        ("gpt2-tiny", 3, 48, "bf16", 0.1),
        ("pythia-tiny", 3, 48, "bf16", 0.0),
        ("gpt-j-tiny", 3, 48, "fp32", 0.0),
        ("llama-tiny", 3, 48, "bf16", 0.0),
        ("llama-tiny", 3, 48, "fp32", 0.1),
        ("bert-tiny", 3, 48, "bf16", 0.0),
        ("albert-tiny", 3, 48, "fp32", 0.1),
    ],
)
def test_what_a_traced_block_keeps_is_what_is_predicted(
    preset: str, micro: int, length: int, compute: str, dropout: float, recompute: str
) -> None:
    import math

    from penstock.compiler.planner import make_plan
    from penstock.compiler.regions import trace_kernel
    from penstock.config.schema import BatchSection, PlanSection

    plan = make_plan(
        resolve_architecture(ModelSection(preset=preset, dropout=dropout)),
        batch=BatchSection(micro=micro),
        plan=PlanSection(recompute=recompute),
        compute=compute,
        sequence_length=length,
        target=load_target("zen5-2core"),
    )
    # Traced on fake tensors, as the compiler does it: nothing is allocated.
    traced = trace_kernel(plan, "block_forward")
    kept = traced.graph.outputs[traced.contract.output_count :]
    block_input = traced.graph.outputs[0]
    size = sum(math.prod(t.shape) * t.element_size() for t in (*kept, block_input))
    assert plan.memory["activations"] == plan.architecture.layers * size


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("preset", ["gpt2", "pythia-70m", "llama-3-8b"])
def test_what_a_block_with_our_attention_keeps_is_what_is_predicted(
    preset: str, recompute: str
) -> None:
    import math

    from penstock.compiler.planner import make_plan
    from penstock.compiler.regions import trace_kernel
    from penstock.config.schema import BatchSection, PlanSection
    from penstock.models.attention import attention_as_one

    plan = make_plan(
        resolve_architecture(ModelSection(preset=preset, dropout=0.0, layers=2)),
        batch=BatchSection(micro=2),
        plan=PlanSection(recompute=recompute),
        compute="bf16",
        sequence_length=256,
        target=load_target("xeon-amx-2core"),
    )
    with attention_as_one():
        traced = trace_kernel(plan, "block_forward")
    assert any("flash" in str(node.target) for node in traced.graph.module.graph.nodes)
    kept = traced.graph.outputs[traced.contract.output_count :]
    size = sum(math.prod(t.shape) * t.element_size() for t in (*kept, traced.graph.outputs[0]))
    assert plan.memory["activations"] == 2 * size


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "preset", ["gpt2-tiny", "pythia-tiny", "gpt-j-tiny", "llama-tiny", "roberta-tiny"]
)
def test_what_a_block_keeps_without_kernels_is_what_is_predicted(
    preset: str, compute: str, dropout: float
) -> None:
    import torch

    from penstock.models.rotary import rotation
    from penstock.models.transformer import Block

    architecture = resolve_architecture(ModelSection(preset=preset, dropout=dropout))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]
    block = Block(architecture).to(dtype)
    x = torch.randn(3, 64, architecture.hidden_size, dtype=dtype, requires_grad=True)
    keys = torch.zeros(3, 3, dtype=torch.int64) if dropout else None
    turns = rotation(architecture, torch.arange(64)[None])
    segments = None if architecture.is_causal else torch.zeros(3, 64, dtype=torch.int64)
    given = [*block.parameters(), *([] if turns is None else [turns])]
    weights = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    )
    with hooks:
        block(x, keys, turns, segments)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    size = sum(n for address, n in sizes.items() if address not in weights)
    model = memory(
        architecture=architecture,
        micro=3,
        sequence_length=64,
        compute=compute,
        compiled=False,
        recompute="none",
    )
    predicted = model.stage(1, embedding=False, head=False, block_passes=1).device["activations"]
    # Left out: norms' weights in float32 and the causal mask, the same for any batch.
    assert size == pytest.approx(predicted, abs=16 * 64 + 64 * 64)
    assert abs(size - predicted) < 0.03 * size


def step_seconds(model: CostModel) -> float:
    seconds = 12 * sum(part.total for part in model.block())
    seconds += sum(part.total for part in (*model.embedding(), *model.head()))
    return seconds + model.update(PARAMETERS).total


def zen4() -> Target:
    """Two cores whose products reach 430 GFLOP/s in bf16 and 200 in fp32, and copies 40 GB/s."""
    return dataclasses.replace(
        load_target("zen5-2core"),
        peak_flops={"bf16": 430e9, "fp32": 200e9},
        bandwidth_bytes_per_second=40e9,
    )


def test_on_measured_machines_kernels_and_steps_take_what_they_took() -> None:
    # docs/performance.md, docs/benchmarks.md; GELU has taken 8 ms less of a block since.
    model = cost(zen4())
    forward, backward = model.block()
    assert forward.total + backward.total == pytest.approx(0.102 + 0.187 - 0.008, rel=0.03)
    assert sum(part.total for part in model.head()) == pytest.approx(1.350, rel=0.03)
    assert 4 * 512 / step_seconds(model) == pytest.approx(417, rel=0.03)


def test_loops_weigh_more_where_products_have_units_of_their_own() -> None:
    def loops(target: Target) -> float:
        """Share of a block's time that no faster product would save."""
        fast = dataclasses.replace(target, products_flops={"bf16": 1e30})
        whole, rest = (sum(part.compute for part in cost(t).block()) for t in (target, fast))
        return rest / whole

    # 31.4 of 281 ms, by docs/performance.md.
    assert loops(zen4()) == pytest.approx(0.112, rel=0.03)
    assert loops(load_target("xeon-amx-2core")) > 1.8 * loops(zen4())
    # A lower bound leaves them out.
    bound = dataclasses.replace(zen4(), measured=False)
    products = 4 * 512 * (2 * GPT2.block_parameters() + 4 * 768 * 512)
    assert cost(bound).block()[0].compute == pytest.approx(products / 430e9)


def test_products_run_as_they_were_measured() -> None:
    target = dataclasses.replace(load_target("zen5-2core"), peak_flops={"bf16": 1e12})
    measured = dataclasses.replace(target, products_flops={"bf16": 0.45e12})
    for region in ("block", "head"):
        whole, half = (getattr(cost(t), region)()[0].compute for t in (target, measured))
        assert half == pytest.approx(2 * whole)
    assert measured.shared_by(2).products_flops == {"bf16": 0.225e12}


def test_loops_run_as_they_were_measured() -> None:
    target = load_target("zen5-2core")
    slow = dataclasses.replace(target, loops_flops=target.peak_flops["fp32"] / 3)
    for region, loops in (("block", block_loops(GPT2, 4, 512)), ("head", head_loops(GPT2, 2048))):
        for way in (0, 1):
            before, after = (getattr(cost(t), region)()[way].compute for t in (target, slow))
            more = 2 * loops[way] / target.peak_flops["fp32"]
            assert after - before == pytest.approx(more)
    assert slow.shared_by(2).loops_flops == slow.loops_flops / 2


def with_adapters(targets: list[str]) -> Architecture:
    return adapted(GPT2, LoraSection(rank=8, targets=targets))


def test_frozen_weights_have_no_gradients_and_no_state() -> None:
    lora = with_adapters(["all-linear"])
    # Rank times rows and columns: 768 → 2304, 768 → 768, 768 → 3072 and back.
    adapters = 12 * 8 * ((768 + 2304) + (768 + 768) + 2 * (768 + 3072))
    assert lora.trained_parameters() == adapters
    found, plain = whole(architecture=lora, saves=True), whole(saves=True)
    assert found["weights"] == plain["weights"] + 2 * adapters
    assert found["gradients"] == 2 * adapters
    assert found["checkpoint"] == 12 * adapters
    assert found["optimizer"] == 10 * adapters
    assert whole(architecture=lora, optimizer="muon")["optimizer"] == 8 * adapters


@pytest.mark.parametrize("preset", ["gpt2", "llama-3.2-1b", "pythia-160m"])
@pytest.mark.parametrize("targets", [[], ["all-linear"]])
def test_blocks_with_adapters_keep_what_their_kernels_keep(preset: str, targets: list[str]) -> None:
    section = LoraSection(rank=8, targets=targets)
    a = adapted(resolve_architecture(ModelSection(preset=preset)), section)
    plan = make_plan(
        a, batch=BatchSection(micro=2), plan=PlanSection(), compute="bf16", sequence_length=64,
        target=load_target("zen5-2core"),
    )  # fmt: skip
    forward, backward = (trace_kernel(plan, f"block_{part}") for part in ("forward", "backward"))
    saved = sum(t.numel() * t.element_size() for t in forward.graph.outputs[1:])
    x = 2 * 128 * a.hidden_size
    assert len(backward.contract.parameters) in backward.contract.kept_inputs  # x itself
    model = memory(architecture=a, micro=2, sequence_length=64)
    kept = model.stage(1, embedding=False, head=False, block_passes=1).device["activations"]
    assert saved + x == kept
    trained = [backward.contract.parameters[i] for i in backward.contract.differentiable[:-1]]
    assert trained
    assert all(".adapters." in name for name in trained)


def test_a_backward_pass_without_gradients_of_weights_takes_half_the_products() -> None:
    # Where nothing but products is arithmetic.
    forward, backward = cost(load_target("h100")).block()
    _, frozen = cost(load_target("h100"), architecture=with_adapters([])).block()
    products = 2 * 4 * 512 * GPT2.block_parameters()
    share = products / (products + 4 * 512 * 4 * 768 * 512)
    assert frozen.compute / forward.compute == pytest.approx(2 - share, rel=0.03)
    assert backward.compute == pytest.approx(2 * forward.compute)
