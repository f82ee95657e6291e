"""What a machine has for this engine, what is missing for its GPU, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from engine.kernels import native
from engine.kernels.native.levels import LEVELS
from engine.kernels.toolchain import triton_missing
from engine.step.build import cpu_multiplies_bfloat16

_PACKAGES = ("dsa-serve", "torch", "triton", "numpy", "msgspec", "ziglang")
_DRIVER = Path("/proc/driver/nvidia/version")
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_DISPLAY = ("0x0300", "0x0302")  # PCI classes: VGA and 3D controllers
_LEAST_CAPABILITY = (8, 0)
"""The first generation whose matrix units multiply bfloat16, which the kernels need to be fast."""


def describe() -> dict[str, Any]:
    """Return system, versions, processor, memory, native kernels and devices."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "native": _native(),
        "gpu": gpu(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": _free_memory(),
        "multiplies_bf16": cpu_multiplies_bfloat16(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _free_memory() -> int | None:
    try:
        found = re.search(
            r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text("utf-8"), re.MULTILINE
        )
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def _native() -> dict[str, Any]:
    """The compiled kernels: the level in use, the best that is made for this machine, why there is none."""
    made = [level.name for level in LEVELS if level.machine == platform.machine()]
    return {
        "level": native.level(),
        "levels_of_this_machine": made,
        "missing": native.missing(),
        "compiler": None if importlib.util.find_spec("ziglang") is None else f"ziglang {_version('ziglang')}",
    }


def gpu() -> dict[str, Any]:
    """Return what there is of a GPU, of its driver and of software for it."""
    usable = torch.cuda.is_available()
    return {
        "on_the_bus": _on_the_bus(),
        "driver": _driver(),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if usable else [],
        "triton_missing": triton_missing(),
        "c_compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "in_container": Path("/.dockerenv").exists() or bool(os.environ.get("KUBERNETES_SERVICE_HOST")),
    }


def _on_the_bus() -> int:
    """How many NVIDIA GPUs the PCI bus has, with or without a driver."""
    count = 0
    for device in _PCI.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == _NVIDIA and kind[:6] in _DISPLAY
    return count


def _driver() -> str | None:
    """The version of NVIDIA's driver in the kernel; None: there is none."""
    try:
        text = _DRIVER.read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else "unknown"


def _device(index: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "device": f"cuda:{index}",
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_bytes": total,
        "free_bytes": free,
        "multiprocessors": about.multi_processor_count,
    }


def advice(found: dict[str, Any]) -> list[str]:
    """Say what is missing on a machine and what to do, a sentence or two each.

    Args:
        found: as `describe` returned it
    """
    said = []
    if found["native"]["level"] is None:
        said.append(
            f"The native CPU kernels are not used: {found['native']['missing']}. Without them the CPU computes with "
            "torch, which is slower."
        )
    elif not found["cpu"]["multiplies_bf16"]:
        said.append(
            "This processor does not multiply bfloat16, so models run in float32 with torch on the CPU, which is slower."
        )
    return said + _gpu_advice(found["gpu"])


def _gpu_advice(found: dict[str, Any]) -> list[str]:
    if not found["devices"]:
        return [_why_no_device(found), *missing_software(found)]
    said = (
        [f"{found['triton_missing']}. Without it, GPUs compute with torch."]
        if found["triton_missing"]
        else []
    )
    said += [
        f"{device['device']} ({device['name']}) has compute capability {device['capability']}; the kernels are made for "
        f"{'.'.join(map(str, _LEAST_CAPABILITY))} and above, so they may be slow or fail."
        for device in found["devices"]
        if tuple(map(int, device["capability"].split("."))) < _LEAST_CAPABILITY
    ]
    return said


def _why_no_device(found: dict[str, Any]) -> str:
    """Why torch has no CUDA device, and what to do first."""
    if found["driver"] is None:
        if found["on_the_bus"]:
            return (
                f"The PCI bus has {found['on_the_bus']} NVIDIA GPU(s), but the kernel has no NVIDIA driver: install it "
                "(Debian, Ubuntu: the package nvidia-driver), restart, and see that nvidia-smi lists them."
            )
        if found["in_container"]:
            return (
                "This container sees no NVIDIA GPU. If the host has one, install NVIDIA's container toolkit there and "
                "start the container with: docker run --gpus all."
            )
        return "This machine has no NVIDIA GPU that can be seen, so the CPU serves."
    if found["torch_cuda"] is None:
        return f"There is an NVIDIA driver ({found['driver']}), but torch is built without CUDA."
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU from torch: unset it, or name the devices in it."
    return (
        f"There is an NVIDIA driver ({found['driver']}), but torch (CUDA {found['torch_cuda']}) finds no device: the driver "
        "may be too old for this CUDA, or this process may not open /dev/nvidia*. See what nvidia-smi says."
    )


def missing_software(found: dict[str, Any]) -> list[str]:
    """What a GPU would need of this installation besides its driver."""
    said = []
    if found["torch_cuda"] is None:
        said.append(
            "A GPU needs a CUDA build of torch: set pip up for an index that has one, then run `make clean` and "
            "`make serve GPU=1`."
        )
    if (why := found["triton_missing"]) is not None:
        hint = ". `make serve GPU=1` installs it" if "not installed" in why else ""
        said.append(f"The kernels for GPUs are compiled by Triton, which cannot be used here: {why}{hint}.")
    return said
