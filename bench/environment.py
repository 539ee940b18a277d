"""On what a result was measured, and when: the device, its driver, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastattn.ops.core.backends import device_obstacle

ROOT = Path(__file__).parents[1]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "quack-kernels",
    "flash-attn",
    "xformers",
)


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """What a result file says about where it comes from."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    obstacle = device_obstacle(device.type, device.index)
    return {
        "device": _device(device),
        "backend": "triton" if obstacle is None else "reference",
        "why_reference": obstacle,
        "versions": versions,
        "commit": commit(),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "runtime": torch.version.cuda or torch.version.hip,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*: (.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return (answer.stdout.splitlines() or ["unknown"])[0]


def commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" outside git."""
    if shutil.which("git") is None:
        return "unknown"
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    # Without optional locks git writes nothing, which a read-only checkout needs.
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def slug(name: str) -> str:
    """A device's name as it stands in a file's name: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
