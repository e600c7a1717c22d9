"""A torchvision that is built for another torch imports; one that imports by itself is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrl import torchvision_shim
from mmrl.registry import ROOT

# As torchvision's own import goes where its compiled half does not load: a kernel for an operator that is not there.
REGISTERS = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return scores.new_empty(0)
"""
DECLARES = """
import torch

own = torch.library.Library("torchvision", "DEF")
own.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
SHOW = "from mmrl import torchvision_shim as s; import torchvision; print(torchvision.works, len(s._declared))"


def imported(folder: Path, begin: str, *, command: str = SHOW, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """What a Python that has this torchvision prints."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(f"{begin}\nfrom torchvision import ops\nworks = ops.works\n")
    (package / "ops.py").write_text(REGISTERS + "\nworks = True\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, folder, ROOT)))}
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=env, timeout=120)


def test_schemas_are_declared_where_the_import_fails_without(tmp_path: Path) -> None:
    done = imported(tmp_path, "")
    assert (done.stdout.strip(), done.returncode) == ("True 1", 0), done.stderr


def test_nothing_is_done_where_it_imports_by_itself(tmp_path: Path) -> None:
    done = imported(tmp_path, DECLARES)
    assert (done.stdout.strip(), done.returncode) == ("True 0", 0), done.stderr


def test_what_fails_otherwise_still_fails(tmp_path: Path) -> None:
    done = imported(tmp_path, "raise RuntimeError('another thing')")
    assert done.returncode != 0 and "another thing" in done.stderr


def test_a_process_that_never_imports_mmrl_is_helped_by_its_path(tmp_path: Path) -> None:
    """As those are that vLLM starts."""
    start = tmp_path / "start"
    start.mkdir()
    torchvision_shim.startup(start)
    done = imported(tmp_path, "", command="import torchvision; print(torchvision.works)", path=(start,))
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


def test_installing_twice_is_installing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    torchvision_shim.install()
    torchvision_shim.install()
    assert len(sys.meta_path) == 1
