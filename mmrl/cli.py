"""The command line: ``mmrl`` and ``python -m mmrl``.

A mistake of the user ends in one sentence on standard error and exit code 2; an interrupt says how to go on, exit code 130.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmrl.errors import ConfigError, MMRLError

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130
_FOLDER = "choose another with output=FOLDER"
# What the operating system may refuse while a run is written, and what to do about it.
_REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: f"there is no permission to write here; {_FOLDER}",
    errno.EPERM: f"there is no permission to write here; {_FOLDER}",
    errno.EROFS: f"the file system is read-only; {_FOLDER}",
    errno.ENOTDIR: f"a file stands where a folder is needed; {_FOLDER}",
    errno.EEXIST: f"a file stands where a folder is needed; {_FOLDER}",
}

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as stages.improve.optimizer.lr=1e-4.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")]


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
    pretty_exceptions_enable=False,
    help="Reinforcement learning for models that see and act.",
)


@app.command("train")
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; left out with --resume.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run from its last checkpoint.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the config's.")] = None,
) -> None:
    """Train what CONFIG describes, or continue a run; the last line printed is the path of its report."""
    if resume is not None:
        if config is not None or name is not None:
            raise ConfigError(
                "--resume takes no config, override or name: a run goes on with the configuration it was started with"
            )
        _until_interrupted(resume, lambda: _commands().resume(resume))
    elif config is not None:
        loaded, run_dir, note = _commands().plan(config, overrides or [], name)
        if note:
            typer.echo(note, err=True)
        _until_interrupted(run_dir, lambda: _commands().train(loaded, run_dir))
    else:
        raise ConfigError("give a config to train, such as configs/quickstart.yaml, or --resume RUN to continue a run")


@app.command("evaluate")
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A policy's folder or hub id, or a run's folder, such as runs/quickstart.")
    ],
    config_and_overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file of a run or of an evaluation, and changes to it."),
    ] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Instead of the config's evaluation.episodes.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What to write, instead of evaluations/NAME; only with CONFIG.")
    ] = None,
) -> None:
    """Measure a policy on held-out episodes.

    With CONFIG the results get a folder of their own, and the last line printed is the path of their report; without it,
    CHECKPOINT is a run, which is measured as its own config says and gets the results.
    """
    given = config_and_overrides or []
    config, overrides = (given[0], given[1:]) if given and "=" not in given[0] else (None, given)
    if config is None:
        if output is not None:
            raise ConfigError("--output needs a CONFIG after the checkpoint; without one the results go to the run's folder")
        _commands().evaluate(checkpoint, overrides, episodes)
        return
    with _saving_nothing():
        typer.echo(_commands().measure(checkpoint, Path(config), overrides, episodes, output))


@app.command("collect")
def collect(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/collect/tabletop.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Save episodes of the scripted expert or of a policy as a data set; the last line printed is its folder."""
    with _saving_nothing():
        typer.echo(_commands().collect(config, overrides or []))


@app.command("statistics")
def statistics(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A LeRobot data set's folder, or the YAML file of a run.")],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Which stage's data, where the YAML file has several.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A policy's checkpoint that gets them.")] = None,
) -> None:
    """Mean, std and quantiles of states and actions, as a policy's checkpoint keeps them; printed, or saved with --output."""
    typer.echo(_commands().statistics(data, overrides or [], stage, output))


@app.command("report")
def report(run: Run) -> None:
    """Write the report.html of a run, or of an evaluation, again and print its path."""
    typer.echo(_commands().build_report(run))


@app.command("doctor")
def doctor() -> None:
    """Say what works on this machine, and the command that mends what does not."""
    for line in _commands().diagnose():
        typer.echo(line)


@app.command("check-policy")
def check_policy(config: Config, overrides: Overrides = None) -> None:
    """Try what the policy of CONFIG promises on its own weights, and print what was measured; exit code 1 if something fails."""
    if not _commands().check_policy(config, overrides or []):
        raise typer.Exit(EXIT_FAILED)


@app.command("serve-rewards")
def serve_rewards(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/serve/rewards.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Offer the rewards of CONFIG over HTTP, to ``mmrl.rewards.remote:Remote`` on this or another machine, until interrupted."""
    _commands().serve_rewards(config, overrides or [], typer.echo)


@app.command("show-config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print CONFIG as it would run: every field, its value and what it means."""
    typer.echo(_commands().show_config(config, overrides or []), nl=False)


def main() -> None:
    """Entry point of the ``mmrl`` script."""
    app()


def _commands() -> ModuleType:
    """``mmrl.commands``, which loads torch: only once there is something to do."""
    return importlib.import_module("mmrl.commands")


@contextmanager
def _saving_nothing() -> Iterator[None]:
    """Around work that leaves its results whole or not at all."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("Interrupted; nothing was saved.", fg=typer.colors.YELLOW, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _until_interrupted(run_dir: Path, work: Callable[[], Path]) -> None:
    """Do the work and print where its report is; an interrupt ends in a sentence that says how to go on."""
    try:
        typer.echo(work())
    except KeyboardInterrupt:
        typer.secho(f"Interrupted; continue with `mmrl train --resume {run_dir}`.", fg=typer.colors.YELLOW, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
