"""What the commands of ``mmrl`` do. Apart from ``mmrl.cli`` because these imports take seconds and ``--help`` should not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmrl import collecting, conformance, doctor, measuring, normalisation, playback, progress, report, serving, trainer
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
    fresh = _free(wanted)
    if fresh == wanted:
        return loaded, wanted, ""
    if any(change.startswith("name=") for change in changes):
        raise ConfigError(f"{wanted}: is a run already; continue it with --resume {wanted}, or choose another name=NAME")
    note = f"{wanted} is a run already (--resume {wanted} would continue it); this one goes to {fresh}."
    return loaded.model_copy(update={"name": fresh.name}), fresh, note


def train(config: configuration.RunConfig, run_dir: Path) -> Path:
    """Train from the start; the path of the report."""
    return report.build(trainer.train(config, run_dir, progress.make()))


def resume(run: Path) -> Path:
    """Continue a run from its last checkpoint; the path of the report."""
    return report.build(trainer.resume(existing_run(run), progress.make()))


def evaluate(run: str, overrides: Sequence[str], episodes: int | None) -> None:
    """Measure a run's policy. ``run`` is its folder, or the YAML file it was started from."""
    path = Path(run)
    if path.is_file():
        loaded = configuration.load(path)
        path = Path(loaded.output) / loaded.name
    playback.evaluate_run(existing_run(path), overrides, episodes, progress.make())


def measure(checkpoint: str, config: Path, overrides: Sequence[str], episodes: int | None, output: Path | None) -> Path:
    """Measure a checkpoint under a configuration; the path of the report.

    output: the folder to write, which must be free; None: ``output``/``name`` of the configuration, or where that is taken and
    the name was not chosen by an override, with the first free counter.
    """
    changes = [*overrides, *([f"evaluation.episodes={episodes}"] if episodes is not None else [])]
    loaded = measuring.load_measurement(config, changes)
    wanted = output or Path(loaded.output) / loaded.name
    fresh = _free(wanted)
    if fresh != wanted and (output is not None or any(change.startswith("name=") for change in overrides)):
        raise ConfigError(f"{wanted}: is there already; choose another folder with --output FOLDER or another name=NAME")
    return measuring.measure(checkpoint, loaded, fresh, progress.make())


def collect(config: Path, overrides: Sequence[str]) -> Path:
    """Record a data set; its folder."""
    return collecting.collect(configuration.load_as(collecting.CollectionConfig, config, overrides), progress.make())


def statistics(data: Path, overrides: Sequence[str], stage: str | None, output: Path | None) -> str:
    """The statistics of a data set, as json, or the path of the file that holds them."""
    return normalisation.compute(data, overrides, stage, output, progress.make())


def build_report(folder: Path) -> Path:
    """Of a run, or of what ``measure`` left."""
    return report.build_evaluation(folder) if report.is_evaluation(folder) else report.build(existing_run(folder))


def show_config(config: Path, overrides: Sequence[str]) -> str:
    return describe(configuration.load(config, overrides))


def serve_rewards(config: Path, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Answer until the process is told to end."""
    serving.serve(configuration.load_as(serving.ServingConfig, config, overrides), say)


def check_policy(config: Path, overrides: Sequence[str]) -> bool:
    """Try a policy's promises and print a table; whether all of them hold."""
    return conformance.check(conformance.load(config, overrides), str(config))


def diagnose() -> Iterator[str]:
    return doctor.lines()


def existing_run(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: is no run (it has no config.yaml); a run is a folder such as runs/quickstart")
    return path


def _free(wanted: Path) -> Path:
    """``wanted``, or where something is there already with the first free counter."""
    fresh, counter = wanted, 2
    while _occupied(fresh):
        fresh, counter = wanted.with_name(f"{wanted.name}-{counter}"), counter + 1
    return fresh


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
