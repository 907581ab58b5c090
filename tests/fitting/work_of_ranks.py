"""CPU seconds of each stage of a fit, of every rank: what one process does, and what is left of it for each of several.

    python -m tests.fitting.work_of_ranks FOLDER [fields of FitConfig: queries=600 …]
    mlx.launch -n 4 python -m tests.fitting.work_of_ranks FOLDER …

FOLDER holds a model in `model` (a toy is made where there is none) and a text in book.txt. Prints one JSON line a rank,
where "gathering", the transport and the wait for others, is apart; rank 0 writes out-N.nectar, N ranks.
"""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nectar_mlx  # noqa: F401  before mlx.core
from nectar_mlx import Nectar, models
from nectar_mlx.fitting import distributed, pipeline
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.distributed import World
from tests import toys


def main(argv):
    folder, world = Path(argv[0]), World.here()
    options = {name: json.loads(value) for name, value in (field.split("=") for field in argv[1:])}
    if not (folder / "model").exists():
        toys.save_model(toys.toy("llama"), folder / "model", toys.tokenizer())
    model, tokenizer = models.load(str(folder / "model"))
    seconds, waited, gather = dict[str, float](), [0.0], distributed._gather

    def waiting(x):
        start = time.process_time()
        every = gather(x)
        waited[0] += time.process_time() - start
        return every

    @contextmanager
    def progress(stage, total):
        start = time.process_time() - waited[0]
        yield lambda done: None
        seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - waited[0] - start

    distributed._gather = waiting  # MLX's ring spins while a rank waits for another: that is no work

    start = time.process_time(), time.perf_counter()
    text = (folder / "book.txt").read_text()
    fitted = pipeline.fit(model, tokenizer, text, config=FitConfig(**options), progress=progress, world=world)
    seconds |= {
        "all": time.process_time() - start[0] - waited[0],
        "gathering": waited[0],
        "wall": time.perf_counter() - start[1],
    }
    if world.first:
        Nectar(*fitted).save(folder / f"out-{world.size}.nectar")
    told = {"ranks": world.size, "rank": world.rank} | {stage: round(s, 2) for stage, s in seconds.items()}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
