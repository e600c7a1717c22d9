"""Makes torchvision importable beside a torch without CUDA.

PyPI's torchvision is built for CUDA. Beside a CPU torch its compiled half does not load, and the import ends with ``operator
torchvision::nms does not exist``, although most of it (and all that image processors use) is Python on torch. Two schemas are
all that the import lacks. vLLM imports torchvision, and so do the processes that it starts.

Where torchvision imports by itself, or is not installed, nothing is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # they vanish with the object that declared them


def install() -> bool:
    """Import torchvision, with the schemas where it does not import without; whether they were needed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return bool(_declared)
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    importlib.import_module("torchvision")
    return True


def startup(folder: Path) -> None:
    """Write a ``sitecustomize`` into ``folder``: a Python that has it first on PYTHONPATH, and this project, installs the shim."""
    (folder / "sitecustomize.py").write_text(f"from {__name__} import install\n\ninstall()\n")
