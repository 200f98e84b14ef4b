"""How long a pipeline's processes wait, measured and simulated.

    python benchmarks/pipeline.py [--layers 8] [--width 512] [--micro-batches 8] [--steps 6]
    python benchmarks/pipeline.py --stages 4 --wait 60 --width 32 --tokens 16

starts two processes with a thread each, trains some steps by every schedule, and sets the share of
their time that is not spent in passes against what `compiler/pipeline.py` simulates from the same
passes' mean times. One stage a core: with more stages than cores it would measure how cores are
shared. There `--wait` makes every pass last as many milliseconds as a device's might that works by
itself: forward so many for a stage's blocks, backward twice as many, half as many again in the last
stage, for its head; what a tiny model really computes is part of it. Schedule, sends and waits are
those of real processes.
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


def passes_timed(stages: list, wait: float) -> dict:
    """Make torch's stages add up the seconds of each pass, by (piece, direction), and each pass of
    a piece last at least `wait` seconds for each third of its work.
    """
    spent: dict[tuple[int, int], list[float]] = defaultdict(list)

    def timed(stage, name: str, direction: int) -> None:
        run = getattr(stage, name)
        third = wait * (1.5 if stage.is_last else 1.0)

        def measured(*args, **more):
            start = time.perf_counter()
            result = run(*args, **more)
            thirds = 1 if direction != 1 or not more.get("full_backward", True) else 2
            if stage.is_first and thirds == 1 and direction > 0:
                # Torch leaves all of the first piece's backward pass to the one for weights.
                thirds = 2 * (direction - 1)
            time.sleep(max(0.0, start + thirds * third - time.perf_counter()))
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
    shape, count, stages = (2, arguments.tokens), arguments.micro_batches, arguments.stages
    world = World(find_place())
    with world.joined("cpu", 120, Path(tempfile.gettempdir(), "penstock-stacks")):
        mesh = Mesh.of(world, stages, 120)
        for schedule in ("gpipe", "1f1b", "interleaved", "zero-bubble"):
            whole = Transformer(architecture)
            initialize(whole, 1)
            parts = 2 if schedule == "interleaved" else 1
            pieces = layers_of_pieces([arguments.layers // stages] * stages, parts)
            own = [Stage(whole, pieces, i, 0.0) for i in range(world.rank, len(pieces), stages)]
            names = list(dict(named_parameters(own)))
            pipeline = Pipeline(
                own, mesh.stages, schedule=schedule, micro_batches=count, names=names
            )
            _, inner = pipeline._schedule(torch.Size(shape))
            made = [inner._stage] if hasattr(inner, "_stage") else inner._stages
            spent = passes_timed(made, arguments.wait / 1000 / parts)
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
            mean_waiting = float(world.sum(torch.tensor(waiting))) / stages
            way = [Piece(i % stages, f, b, weight=w) for i, (f, b, w) in enumerate(means.tolist())]
            simulated = Schedule(tuple(way), schedule)
            seconds = simulated.simulate(count).seconds
            if world.is_first:
                bubble = 1 - count * simulated.work / (stages * seconds)
                found = {"step": wall, "simulated": seconds, "measured bubble": mean_waiting}
                print(json.dumps({"schedule": schedule, **found, "simulated bubble": bubble}))


def main() -> None:
    """Start the processes, and show what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"stages": 2, "layers": 8, "width": 512, "tokens": 256, "micro-batches": 8}
    defaults |= {"steps": 6, "wait": 0}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={arguments.stages}",
    ]
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
