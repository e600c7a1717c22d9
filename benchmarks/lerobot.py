"""Random access to a LeRobot data set: memory and samples per second, with videos and with images.

    python benchmarks/lerobot.py [--frames 50000] [--batch 128] [--seconds 10] [--cache 128] [--folder FOLDER]

The set is made of the tabletop expert's episodes, 64x64 pixels, and stays in FOLDER if one is given. Every sample is a picture, a
state and a chunk of 8 actions of a frame drawn from the whole set. "RSS" is the memory of this process: before the set is opened,
after it is, and after the measurement; of what is added, the caches may hold ``--cache`` MiB. "raw" is what the pictures of the
whole set would take. "first" is the speed of the first batches, with nothing in the caches. "cpu" is processor time over wall
time: well below 1, it says that other programs had the processor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from mmrl.collecting import play
from mmrl.data.lerobot import LeRobot
from mmrl.data.lerobot_write import LeRobotWriter
from mmrl.progress import make
from mmrl.protocols import DataContext
from simulators.tabletop import Tabletop

HORIZON, NUM_ENVS = 8, 64
MIB = 2**20


def write(folder: Path, storage: str, frames: int) -> None:
    """Expert episodes until there are ``frames`` frames."""
    environment = Tabletop(Tabletop.Config(), num_envs=NUM_ENVS)
    written, task = 0, 0
    config = LeRobotWriter.Config(storage=storage)  # type: ignore[arg-type]
    with LeRobotWriter(config, folder, name="tabletop") as writer, make().task(f"writing {folder.name}", frames) as advance:
        while written < frames:
            episodes = play(environment, lambda *_: environment.expert_action()[:, None], torch.arange(task, task + NUM_ENVS))
            task += NUM_ENVS
            for episode in episodes:
                if written < frames:
                    writer.add(episode)
                    written += len(episode)
                    advance(len(episode))
        writer.finish()


def rss() -> float:
    """Resident memory of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(folder: Path, batch: int, seconds: float, cache_mb: int) -> tuple[int, list[float]]:
    """Frames; RSS before, opened and after, samples/s at first and over the whole time, cpu share."""
    before = rss()

    def none(num_envs: int, changes: object) -> Tabletop:
        raise AssertionError("a data set needs no environment")

    config = LeRobot.Config(path=str(folder), cache_mb=cache_mb)
    source = LeRobot(config, context=DataContext(none, HORIZON, 0, torch.device("cpu")))
    opened = rss()
    samples, first, start, cpu = 0, 0.0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - start) < seconds:
        source.batch(batch)
        samples += batch
        first = first or (samples / (time.perf_counter() - start) if samples >= 4 * batch else 0.0)
    return len(source), [before, opened, rss(), first, samples / spent, (time.process_time() - cpu) / spent]


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description="Random access to a LeRobot data set")
    parser.add_argument("--frames", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0, help="per measurement")
    parser.add_argument("--cache", type=int, default=128, help="MiB")
    parser.add_argument("--folder", type=Path, help="keeps the sets for the next time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        for storage in ("video", "image"):
            folder = root / f"tabletop-{storage}-{arguments.frames}"
            if not folder.exists():
                write(folder, storage, arguments.frames)
        print(f"batches of {arguments.batch}, caches of {arguments.cache} MiB, one thread")
        print("storage    frames   disk MiB   raw MiB   RSS before   opened   after   samples/s first     all   cpu")
        for storage in ("video", "image"):
            folder = root / f"tabletop-{storage}-{arguments.frames}"
            frames, numbers = measure(folder, arguments.batch, arguments.seconds, arguments.cache)
            before, opened, after, first, rate, share = numbers
            raw = frames * 64 * 64 * 3 / MIB
            memory = f"{before:12.0f} {opened:8.0f} {after:7.0f}"
            print(
                f"{storage:9s} {frames:7d} {size(folder):10.1f} {raw:9.0f} {memory} {first:17.0f} {rate:7.0f} {share:5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
