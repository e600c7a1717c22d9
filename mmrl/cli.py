"""The command line: ``mmrl`` and ``python -m mmrl``.

A mistake of the user ends in one sentence on standard error and exit code 2; an interrupt says how to go on, exit code 130.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmrl import config as configuration
from mmrl import doctor as diagnosis
from mmrl import evaluation, progress, report, trainer
from mmrl.config import RunConfig
from mmrl.describe import describe
from mmrl.errors import ConfigError, MMRLError

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
# What the operating system may refuse while a run is written, and what to do about it.
_REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "the folder is not writable; choose another with output=FOLDER",
    errno.EPERM: "the folder is not writable; choose another with output=FOLDER",
    errno.EROFS: "the file system is read-only; choose another folder with output=FOLDER",
}

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as stages.improve.optimizer.lr=1e-4.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")]


class _Commands(TyperGroup):
    """Turns the errors a user can mend into a sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MMRLError as error:
            sentence = str(error)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            sentence = f"{error.filename or 'output'}: {_REFUSALS[error.errno]}"
        typer.secho(sentence, fg=typer.colors.RED, err=True)
        raise typer.Exit(EXIT_MISTAKE)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Reinforcement learning for models that see and act.",
)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; left out with --resume.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run from its last checkpoint.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the config's.")] = None,
) -> None:
    """Train what CONFIG describes, or continue a run; the last line printed is the path of its report."""
    if (config is None) == (resume is None):
        raise ConfigError("give a config to train, or --resume RUN to continue a run, and not both")
    if config is None:
        assert resume is not None
        if name is not None:
            raise ConfigError("--name cannot be given with --resume: a run keeps its name and its config")
        _run(_existing_run(resume), None)
        return
    changes = [*(overrides or ()), *([f"name={name}"] if name is not None else [])]
    loaded = configuration.load(config, changes)
    named = any(change.startswith("name=") for change in changes)
    run_dir = _fresh_run(Path(loaded.output) / loaded.name, named=named)
    _run(run_dir, loaded.model_copy(update={"name": run_dir.name}))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or the YAML file it was started from.")],
    overrides: Overrides = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes to play, instead of the config's.")] = None,
) -> None:
    """Measure the policy of a run on held-out episodes."""
    if run.is_file():
        loaded = configuration.load(run)
        run = Path(loaded.output) / loaded.name
    evaluation.evaluate_run(_existing_run(run), overrides or [], episodes, progress.make())


@app.command("report")
def report_(run: RunPath) -> None:
    """Write a run's report.html again and print its path."""
    typer.echo(report.build(_existing_run(run)))


@app.command("doctor")
def doctor() -> None:
    """Say what works on this machine, and the command that mends what does not."""
    for line in diagnosis.lines():
        typer.echo(line)


@app.command("show-config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print CONFIG as it would run: every field, its value and what it means."""
    typer.echo(describe(configuration.load(config, overrides or [])), nl=False)


def main() -> None:
    """Entry point of the ``mmrl`` script."""
    app()


def _run(run_dir: Path, config: RunConfig | None) -> None:
    """Start (``config`` given) or continue the run in ``run_dir``, then print where its report is."""
    display = progress.make()
    try:
        if config is None:
            trainer.resume(run_dir, display)
        else:
            trainer.train(config, run_dir, display)
    except KeyboardInterrupt:
        typer.secho(f"Interrupted; continue with `mmrl train --resume {run_dir}`.", fg=typer.colors.YELLOW, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(report.build(run_dir))


def _existing_run(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: is no run (it has no config.yaml); a run is a folder such as runs/quickstart")
    return path


def _fresh_run(wanted: Path, *, named: bool) -> Path:
    """``wanted`` if nothing is there yet, else the first free ``wanted-2``, ``wanted-3``; a name the user chose stays."""
    if not _occupied(wanted):
        return wanted
    if named:
        raise ConfigError(f"{wanted}: is a run already; continue it with --resume {wanted}, or choose another name=NAME")
    counter = 2
    while _occupied(fresh := wanted.with_name(f"{wanted.name}-{counter}")):
        counter += 1
    typer.echo(f"{wanted} is a run already (--resume {wanted} would continue it); this one goes to {fresh}.", err=True)
    return fresh


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
