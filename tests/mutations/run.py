"""Plant each bug of mutations.py in a copy of this tree and see whether the tests named for it fail there.

    python tests/mutations/run.py [-k NAME]

The tests must pass on an untouched copy first, or their failing would mean nothing. Prints one row a bug. Exit status: 0 if every
bug is caught; 1 if one survives, does not apply, or breaks the tests in a way that is no test failure (an import error, say);
2 if the untouched copy fails.

Each bug gets a process of its own, forked from this one, which has already imported what takes long (never the code under test).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process must not inherit a pool of threads

import hypothesis  # noqa: F401  (imported for the forked processes, as torch is)
import pytest
import torch  # noqa: F401
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SECONDS = 300  # of processor time for one bug: one that makes the tests run for ever is reported, a busy machine is not
VERDICTS = {0: "SURVIVED", 1: "caught"}  # pytest's exit statuses; every other one is an error


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant bugs one at a time; every one must be caught.")
    parser.add_argument("-k", dest="name", default="", help="only bugs whose name contains this")
    name = parser.parse_args().name
    chosen = [mutation for mutation in MUTATIONS if name in mutation.name]
    if not chosen:
        print(f"no bug's name contains {name!r}; the names are in tests/mutations/mutations.py")
        return 1
    if not untouched_tree_passes(chosen):
        return 2
    width = max(len(mutation.name) for mutation in chosen)
    caught = 0
    for mutation in chosen:
        start = time.perf_counter()
        verdict, detail = attempt(mutation)
        caught += verdict == "caught"
        print(f"{mutation.name:<{width}}  {verdict:<8}  {time.perf_counter() - start:5.1f} s  {detail}".rstrip(), flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


def untouched_tree_passes(chosen: list[Mutation]) -> bool:
    tests = list(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        status, output = run_tests(Path(folder), tests)
    if status != 0:
        print(output)
        print("the tests fail without any bug planted; mend them first")
    return status == 0


def attempt(mutation: Mutation) -> tuple[str, str]:
    """(verdict, what there is to say about it) of one bug in a copy of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        victim = folder / mutation.file
        try:
            victim.write_text(mutation.apply(victim.read_text()))
        except (LookupError, FileNotFoundError) as error:
            return "ERROR", str(error)
        status, output = run_tests(folder, list(mutation.tests))
    verdict = VERDICTS.get(status, "ERROR")
    return verdict, "" if verdict == "caught" else last_line(output)


def copy_tree(folder: Path) -> None:
    """Every file that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():  # a tracked file may have been deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status and output, with every module imported from ``folder``."""
    log = folder / "mutation.log"
    child = multiprocessing.get_context("fork").Process(target=pytest_in, args=(folder, tests, log))
    child.start()
    child.join()
    return child.exitcode or 0, log.read_text()


def pytest_in(folder: Path, tests: list[str], log: Path) -> None:
    """Become a fresh pytest in ``folder`` (runs in the forked process)."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)  # for the processes that tests start
    sys.path[0] = str(folder)  # it was the folder of this script
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    strangers = [name for name, module in sys.modules.items() if name.startswith("mmrl") and not from_folder(module, folder)]
    if strangers:
        print(f"imported from outside the copy: {strangers}")
        status = pytest.ExitCode.INTERNAL_ERROR
    sys.stdout.flush()
    os._exit(int(status))  # no clean-up of the parent's objects


def from_folder(module: object, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or Path(file).resolve().is_relative_to(folder.resolve())


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
