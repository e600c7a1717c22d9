"""Tries that may crash, hang or print: ``python -m mmrl.probes NAME [ARGUMENT]`` runs one and prints its outcome as a JSON line.

``mmrl.doctor`` runs each in a process of its own, so that a driver that takes Python down with it costs one line of the report.
A probe returns a sentence about what works and raises about what does not.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping

import torch

from mmrl.component import Component

_SECONDS = 1.0  # how long a simulator is timed
_ENVS = 32
SEMAPHORE = "VK_KHR_external_semaphore_fd"  # SAPIEN, ManiSkill's renderer, asks for it; Mesa's CPU driver has it since 24.3


def module(name: str) -> str:
    """Import a package and say its version."""
    importlib.import_module(name)
    distributions = importlib.metadata.packages_distributions().get(name, [name])
    return importlib.metadata.version(distributions[0])


class _InstanceInfo(ctypes.Structure):
    """VkInstanceCreateInfo, with sType 1 and everything else empty."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.c_void_p),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Extension(ctypes.Structure):
    """VkExtensionProperties."""

    _fields_ = (("name", ctypes.c_char * 256), ("version", ctypes.c_uint32))


def vulkan(_: str) -> str:
    """Create a Vulkan instance and look for a device with the extension that simulators need."""
    library = ctypes.CDLL("libvulkan.so.1")
    instance, count = ctypes.c_void_p(), ctypes.c_uint32()
    code = library.vkCreateInstance(ctypes.byref(_InstanceInfo(type=1)), None, ctypes.byref(instance))
    if code != 0:
        raise RuntimeError(f"no driver (vkCreateInstance gave {code})")
    library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    devices = (ctypes.c_void_p * count.value)()
    library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
    found = {_device_name(library, device): SEMAPHORE in _extensions(library, device) for device in devices}
    if not any(found.values()):
        raise RuntimeError(f"no device with {SEMAPHORE} ({', '.join(found) or 'no device at all'})")
    return ", ".join(name for name, usable in found.items() if usable)


def _device_name(library: ctypes.CDLL, device: int) -> str:
    properties = ctypes.create_string_buffer(4096)  # VkPhysicalDeviceProperties: five uint32, then the name
    library.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), properties)
    return properties.raw[20:276].split(b"\0")[0].decode()


def _extensions(library: ctypes.CDLL, device: int) -> set[str]:
    count = ctypes.c_uint32()
    library.vkEnumerateDeviceExtensionProperties(ctypes.c_void_p(device), None, ctypes.byref(count), None)
    extensions = (_Extension * count.value)()
    library.vkEnumerateDeviceExtensionProperties(ctypes.c_void_p(device), None, ctypes.byref(count), extensions)
    return {extension.name.decode() for extension in extensions}


def egl(_: str) -> str:
    """Open an EGL display without a screen."""
    os.environ.setdefault("EGL_PLATFORM", "surfaceless")
    library = ctypes.CDLL("libEGL.so.1")
    library.eglGetDisplay.restype = library.eglQueryString.restype = ctypes.c_void_p
    library.eglGetDisplay.argtypes = [ctypes.c_void_p]
    library.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    library.eglQueryString.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    display = library.eglGetDisplay(None)
    if not display or not library.eglInitialize(display, None, None):
        raise RuntimeError("no EGL display opens without a screen")
    vendor, version = (ctypes.cast(library.eglQueryString(display, name), ctypes.c_char_p).value for name in (0x3053, 0x3054))
    return f"{(vendor or b'').decode()} {(version or b'').decode()}"


def simulator(module_name: str) -> str:
    """Build the module's environments with their default config and step them for a second."""
    found = importlib.import_module(module_name)
    environments = [name for name, value in vars(found).items() if inspect.isclass(value) and _is_environment(value, module_name)]
    return "; ".join(f"{name} {_steps_per_second(f'{module_name}:{name}')}" for name in environments) or "no environment in it"


def _is_environment(value: type, module_name: str) -> bool:
    return value.__module__ == module_name and all(hasattr(value, name) for name in ("Config", "reset", "step", "family_of"))


def _steps_per_second(target: str) -> str:
    environment = Component.parse({"target": target}).build(num_envs=_ENVS, device=torch.device("cpu"))
    observation = environment.reset(torch.arange(_ENVS))
    actions = torch.zeros(_ENVS, 1, environment.action_spec.dim)
    environment.step(actions)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        environment.step(actions)
        steps += _ENVS
    rate = steps / (time.perf_counter() - start)
    environment.close()
    cameras = ", ".join(f"{name} {image.shape[2]}x{image.shape[1]}" for name, image in observation.images.items())
    return f"{rate:,.0f} steps/s at {_ENVS} environments ({cameras or 'no camera'})"


PROBES: Mapping[str, Callable[[str], str]] = {"module": module, "vulkan": vulkan, "egl": egl, "simulator": simulator}


def main(arguments: list[str]) -> None:
    name, argument = arguments[0], arguments[1] if len(arguments) > 1 else ""
    try:
        outcome = {"ok": True, "detail": PROBES[name](argument)}
    except Exception as error:  # whatever a driver or a package throws is the finding
        outcome = {"ok": False, "detail": " ".join(f"{error}".split()) or type(error).__name__}
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # some drivers crash in their exit handlers, after the work is done


if __name__ == "__main__":
    main(sys.argv[1:])
