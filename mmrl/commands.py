"""What the commands of ``mmrl`` do. Apart from ``mmrl.cli`` because these imports take seconds and ``--help`` should not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmrl import collecting, doctor, normalisation, playback, progress, report, trainer
from mmrl import config as configuration
from mmrl.describe import describe
from mmrl.errors import ConfigError


def plan(config: Path, overrides: Sequence[str], name: str | None) -> tuple[configuration.RunConfig, Path, str]:
    """The configuration to train, the folder it goes to, and a sentence about that folder (empty where it is the expected one).

    A folder that holds a run is never written to: a name from the config file gets the first free counter, while a name that
    the user chose is an error.
    """
    changes = [*overrides, *([f"name={name}"] if name is not None else [])]
    loaded = configuration.load(config, changes)
    wanted = Path(loaded.output) / loaded.name
    if not _occupied(wanted):
        return loaded, wanted, ""
    if any(change.startswith("name=") for change in changes):
        raise ConfigError(f"{wanted}: is a run already; continue it with --resume {wanted}, or choose another name=NAME")
    counter = 2
    while _occupied(fresh := wanted.with_name(f"{wanted.name}-{counter}")):
        counter += 1
    note = f"{wanted} is a run already (--resume {wanted} would continue it); this one goes to {fresh}."
    return loaded.model_copy(update={"name": fresh.name}), fresh, note


def train(config: configuration.RunConfig, run_dir: Path) -> Path:
    """Train from the start; the path of the report."""
    return report.build(trainer.train(config, run_dir, progress.make()))


def resume(run: Path) -> Path:
    """Continue a run from its last checkpoint; the path of the report."""
    return report.build(trainer.resume(existing_run(run), progress.make()))


def evaluate(run: Path, overrides: Sequence[str], episodes: int | None) -> None:
    """Measure a run's policy. ``run`` is its folder, or the YAML file it was started from."""
    if run.is_file():
        loaded = configuration.load(run)
        run = Path(loaded.output) / loaded.name
    playback.evaluate_run(existing_run(run), overrides, episodes, progress.make())


def collect(config: Path, overrides: Sequence[str]) -> Path:
    """Record a data set; its folder."""
    return collecting.collect(configuration.load_as(collecting.CollectionConfig, config, overrides), progress.make())


def statistics(data: Path, overrides: Sequence[str], stage: str | None, output: Path | None) -> str:
    """The statistics of a data set, as json, or the path of the file that holds them."""
    return normalisation.compute(data, overrides, stage, output, progress.make())


def build_report(run: Path) -> Path:
    return report.build(existing_run(run))


def show_config(config: Path, overrides: Sequence[str]) -> str:
    return describe(configuration.load(config, overrides))


def diagnose() -> Iterator[str]:
    return doctor.lines()


def existing_run(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: is no run (it has no config.yaml); a run is a folder such as runs/quickstart")
    return path


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
