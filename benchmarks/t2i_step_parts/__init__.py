"""The sides of benchmarks/t2i_step.py. The project comes first: beside a CPU torch, torchvision needs its help."""

import mmrl  # noqa: F401
