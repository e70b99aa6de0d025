"""How a load test reports: the machine, and one JSON form for all scripts.

    {"script": "shift", "commit": "1a2b3c4d5e6f", "machine": {…}, "date": "2025-01-31T12:00:00+00:00",
     "figures": {"error/continual/default": 23.71, …}}

Errors in %, times in the unit that the name tells, ratios and shares as fractions.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.errors import MissingFile, MissingTool

ROOT = Path(__file__).resolve().parent.parent  # of the repository
PACKAGES = ("torch", "ray", "numpy", "onnxruntime")  # whose versions are told


def add_arguments(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    """`--json FILE` and `--plot FILE`, the same in every script."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture here (PNG)")


def check_outputs(json_file: Path | None, plot: Path | None = None) -> None:
    """Before a long run: whether what it will write can be written.

    Raises:
        MissingFile: a folder does not exist.
        MissingTool: matplotlib is not installed.
    """
    for file in (json_file, plot):
        if file and not file.resolve().parent.is_dir():
            raise MissingFile(f"the folder of {file} does not exist")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise MissingTool("--plot needs matplotlib: pip install matplotlib (it is in the dependency group `load`)")


def write_json(file: Path, script: str, figures: Mapping[str, float]) -> None:
    """Write the figures in the common form."""
    file.write_text(json.dumps(form(script, figures), indent=2, allow_nan=False) + "\n")


def form(script: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """The common form. A figure that is not finite could not be measured, and is left out."""
    return {
        "script": script,
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": {name: value for name, value in figures.items() if math.isfinite(value)},
    }


def commit() -> str:
    """The commit that ran, with `-dirty` where files had changed since; "unknown" outside a checkout."""
    described = _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or "unknown"


def machine() -> dict[str, str | int | float]:
    """What the figures depend on: processor, memory, versions."""
    described: dict[str, str | int | float] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    if gpu := _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        described["gpu"] = gpu
    for package in PACKAGES:
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return described


def machine_line() -> str:
    """`machine()` for people."""
    told = machine()
    versions = ", ".join(f"{name} {told[name]}" for name in ("python", *PACKAGES) if name in told)
    gpu = f", {told['gpu']}" if "gpu" in told else ""
    return f"{told['cpu']}, {told['cores']} cores, {told['memory_gib']} GiB{gpu}; {versions}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _first_line(*command: str) -> str:
    """The first line that a program prints; "" where it is not installed or fails."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
