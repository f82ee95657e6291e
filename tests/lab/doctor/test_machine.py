"""What is missing on a machine, and what the doctor says to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab.doctor import machine
from lab.doctor.machine import advice, describe

DEVICE = {"device": "cuda:0", "name": "H200", "capability": "9.0"}
WELL: dict[str, Any] = {
    "native": {"level": "x86-64-v3", "missing": None},
    "cpu": {"multiplies_bf16": True},
    "gpu": {
        "on_the_bus": 1, "driver": "595.58", "torch_cuda": "13.0", "torch_hip": None, "devices": [DEVICE],
        "triton_missing": None, "c_compiler": "/usr/bin/gcc", "in_container": False,
    },
}  # fmt: skip


def changed(**gpu: object) -> dict[str, Any]:
    return WELL | {"gpu": WELL["gpu"] | gpu}


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert advice(WELL) == []


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (changed(triton_missing="Triton is not installed"), ["Triton is not installed. Without it, GPUs compute with torch"]),
        (changed(devices=[DEVICE | {"capability": "7.5"}]), ["cuda:0 (H200) has compute capability 7.5"]),
        (changed(devices=[], driver=None), ["The PCI bus has 1 NVIDIA GPU(s), but the kernel has no NVIDIA driver"]),
        (
            changed(devices=[], driver=None, on_the_bus=0, in_container=True),
            ["This container sees no NVIDIA GPU. If the host has one"],
        ),
        (
            changed(devices=[], driver=None, on_the_bus=0, torch_cuda=None, triton_missing="Triton is not installed"),
            [
                "This machine has no NVIDIA GPU that can be seen",
                "A GPU needs a CUDA build of torch",
                "The kernels for GPUs are compiled by Triton, which cannot be used here: Triton is not installed. `make",
            ],
        ),
        (
            changed(devices=[], torch_cuda=None),
            ["There is an NVIDIA driver (595.58), but torch is built without CUDA", "A GPU needs a CUDA build of torch"],
        ),
        (changed(devices=[]), ["There is an NVIDIA driver (595.58), but torch (CUDA 13.0) finds no device"]),
        (WELL | {"native": {"level": None, "missing": "they are not made for it"}}, ["The native CPU kernels are not used: they"]),
        (WELL | {"cpu": {"multiplies_bf16": False}}, ["This processor does not multiply bfloat16"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], sentences: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = advice(found)
    assert len(said) == len(sentences)
    assert all(one.startswith(start) for one, start in zip(said, sentences, strict=True)), said


def test_hidden_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert advice(changed(devices=[]))[0].startswith("CUDA_VISIBLE_DEVICES hides every GPU")


def test_this_machine() -> None:
    found = describe()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpu"]["cores"] >= 1
    assert 0 < found["cpu"]["free_bytes"] <= found["cpu"]["memory_bytes"]
    assert (found["native"]["level"] is None) == (found["native"]["missing"] is not None)
    assert len(found["gpu"]["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_gpus_on_the_bus_and_the_driver_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("a", "0x10de", "0x030200"),
        ("b", "0x10de", "0x040300"),  # its sound
        ("c", "0x8086", "0x030000"),
        ("d", "0x10de", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    (tmp_path / "e").mkdir()
    monkeypatch.setattr(machine, "_PCI", tmp_path)
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    assert (machine.gpu()["on_the_bus"], machine.gpu()["driver"]) == (2, None)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  595.58.03  Release Build\nGCC version: 13.3.0\n"
    )
    assert machine.gpu()["driver"] == "595.58.03"
