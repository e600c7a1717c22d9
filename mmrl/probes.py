"""Tries that may crash, hang or print: ``python -m mmrl.probes NAME [ARGUMENT]`` runs one and prints its outcome as a JSON line.

``mmrl.doctor`` runs each in a process of its own, so that a driver that takes Python down with it costs one line of the report.
A probe returns a sentence about what works and raises about what does not. Nothing heavy is imported here but what is tried.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping

# SAPIEN, ManiSkill's renderer, works on drivers with one of these and not on Mesa 22.3's for the CPU, which has neither.
SHARING = ("VK_KHR_external_semaphore_fd", "VK_EXT_external_memory_dma_buf")


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
    found = {_device_name(library, device): bool(_extensions(library, device) & set(SHARING)) for device in devices}
    if not any(found.values()):
        raise RuntimeError(f"no device with {' or '.join(SHARING)} ({', '.join(found) or 'no device at all'})")
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


PROBES: Mapping[str, Callable[[str], str]] = {"module": module, "vulkan": vulkan, "egl": egl}


def answer(probe: Callable[[str], str], argument: str) -> None:
    """Run ``probe``, print what came of it, and leave without exit handlers, in which some drivers crash."""
    try:
        outcome = {"ok": True, "detail": probe(argument)}
    except Exception as error:  # whatever a driver or a package throws is the finding
        outcome = {"ok": False, "detail": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(outcome), flush=True)
    os._exit(0)


if __name__ == "__main__":
    answer(PROBES[sys.argv[1]], "".join(sys.argv[2:3]))
