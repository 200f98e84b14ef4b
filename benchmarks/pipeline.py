"""How long a pipeline's processes wait, measured and simulated.

    python benchmarks/pipeline.py [--layers 8] [--width 512] [--micro-batches 8] [--steps 6]

starts two processes with a thread each, trains some steps by every schedule, and sets the share of
their time that is not spent in passes against what `compiler/pipeline.py` simulates from the same
passes' mean times. One stage a core: on a machine of two cores more stages would measure how cores
are shared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

STAGES = 2


def passes_timed(stages: list) -> dict:
    """Make torch's stages add up the seconds of each pass, by (piece, direction)."""
    spent: dict[tuple[int, int], list[float]] = defaultdict(list)

    def timed(stage, name: str, direction: int) -> None:
        run = getattr(stage, name)

        def measured(*args, **more):
            start = time.perf_counter()
            result = run(*args, **more)
            spent[stage.stage_index, direction].append(time.perf_counter() - start)
            return result

        setattr(stage, name, measured)

    for stage in stages:
        timed(stage, "forward_one_chunk", 0)
        timed(stage, "backward_one_chunk", 1)
        timed(stage, "backward_weight_one_chunk", 2)
    return spent


def measure(arguments: argparse.Namespace) -> None:
    """In one of the processes: train by every schedule; the first prints a line for each."""
    import torch
    import torch.distributed as dist

    from penstock.compiler.pipeline import Piece, Schedule
    from penstock.config.schema import ModelSection
    from penstock.data.loader import Batch
    from penstock.models.initialization import initialize
    from penstock.models.resolve import resolve_architecture
    from penstock.models.transformer import Transformer
    from penstock.parallel.environment import find_place
    from penstock.parallel.mesh import Mesh
    from penstock.parallel.pipeline import Pipeline
    from penstock.parallel.stage import Stage, layers_of_pieces, named_parameters
    from penstock.parallel.world import World

    torch.set_num_threads(1)
    keys = {"layers": arguments.layers, "hidden_size": arguments.width, "heads": 8}
    section = ModelSection.model_validate({"preset": "gpt2-tiny", **keys, "max_positions": 256})
    architecture = resolve_architecture(section, 512)
    shape, count = (2, 256), arguments.micro_batches
    world = World(find_place())
    with world.joined("cpu", 120, Path(tempfile.gettempdir(), "penstock-stacks")):
        mesh = Mesh.of(world, STAGES, 120)
        for schedule in ("gpipe", "1f1b", "interleaved", "zero-bubble"):
            whole = Transformer(architecture)
            initialize(whole, 1)
            parts = 2 if schedule == "interleaved" else 1
            pieces = layers_of_pieces([arguments.layers // STAGES] * STAGES, parts)
            own = [Stage(whole, pieces, i, 0.0) for i in range(world.rank, len(pieces), STAGES)]
            names = list(dict(named_parameters(own)))
            pipeline = Pipeline(
                own, mesh.stages, schedule=schedule, micro_batches=count, names=names
            )
            _, inner = pipeline._schedule(torch.Size(shape))
            spent = passes_timed([inner._stage] if hasattr(inner, "_stage") else inner._stages)
            tokens = torch.randint(0, 512, shape)
            weights, places = torch.ones(shape), torch.arange(shape[0])
            batches = [Batch(tokens, tokens, weights, places) for _ in range(count)]
            total, walls, busy = weights.sum() * count, [], []
            for step in range(arguments.steps + 1):
                if step <= 1:
                    spent.clear()
                before = sum(map(sum, spent.values()))
                dist.barrier()
                start = time.perf_counter()
                pipeline.train(batches, total, seed=1, step=step)
                walls.append(time.perf_counter() - start)
                busy.append(sum(map(sum, spent.values())) - before)
                pipeline.clear()
            wall = statistics.median(walls[1:])
            waiting = 1 - statistics.median(b / w for b, w in zip(busy[1:], walls[1:], strict=True))
            means = torch.zeros(len(pieces), 3, dtype=torch.float64)
            for (piece, direction), times in spent.items():
                means[piece, direction] = statistics.median(times)
            world.sum(means)
            mean_waiting = float(world.sum(torch.tensor(waiting))) / STAGES
            way = [Piece(i % STAGES, f, b, weight=w) for i, (f, b, w) in enumerate(means.tolist())]
            simulated = Schedule(tuple(way), schedule)
            seconds = simulated.simulate(count).seconds
            if world.is_first:
                bubble = 1 - count * simulated.work / (STAGES * seconds)
                found = {"step": wall, "simulated": seconds, "measured bubble": mean_waiting}
                print(json.dumps({"schedule": schedule, **found, "simulated bubble": bubble}))


def main() -> None:
    """Start the processes, and show what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 8), ("width", 512), ("micro-batches", 8), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
        return
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={STAGES}"]
    done = subprocess.run(
        [*command, str(Path(__file__).resolve()), *sys.argv[1:]],
        check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    print("| schedule | step | simulated | bubble | simulated |\n|---|---|---|---|---|")
    for line in done.stdout.splitlines():
        row = json.loads(line)
        print(
            f"| {row['schedule']} | {row['step']:.2f} s | {row['simulated']:.2f} s "
            f"| {row['measured bubble']:.1%} | {row['simulated bubble']:.1%} |"
        )


if __name__ == "__main__":
    main()
