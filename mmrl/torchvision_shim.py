"""Makes torchvision importable beside a torch without CUDA.

PyPI's torchvision is built for CUDA. Beside a CPU torch its compiled half does not load, and the import ends with ``operator
torchvision::nms does not exist``, although most of it (and all that image processors use) is Python on torch. Two schemas are
all that the import lacks. transformers imports torchvision where it is installed, and vLLM brings it.

``install`` imports nothing: it stands by until somebody imports torchvision. Where that works by itself, nothing is changed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "torchvision"
_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # libraries of torch's, whose schemas vanish with them


def install() -> None:
    """Help when torchvision is imported for the first time."""
    if _NAME not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def startup(folder: Path) -> None:
    """Write a ``sitecustomize``: a Python that finds ``folder`` and this project on its path begins with ``install``."""
    (folder / "sitecustomize.py").write_text(f"from {__name__} import install\n\ninstall()\n")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader that there is; when it fails for want of the schemas, they are declared, and it is asked again."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._inner.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith(f"{_NAME}.")]:
                del sys.modules[name]
            library = importlib.import_module("torch.library").Library(_NAME, "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(operator + _ARGUMENTS)
            _declared.append(library)
            self._inner.exec_module(module)
