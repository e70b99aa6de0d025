"""Runs kept as files, so that a table can be made in several sittings: `--keep DIR`.

A file tells which images, batch size and costs its run had, and is not used for others. It does not tell which code:
remove the files of a method whose code or settings have changed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.protocol_jobs import Job, Run, Settings
from loadtests.protocol_probe import Probe


def save(folder: Path, job: Job, asked_for: str, run: Run) -> None:
    """Keep a run.

    Args:
        folder: exists.
        job: that was run.
        asked_for: see `described`.
        run: what came of it.
    """
    arrays: dict[str, Any] = {"wrong": run.wrong, "asked": run.asked, "share_learned": run.share_learned}
    if run.probe is not None:
        arrays |= {f"probe_{name}": array for name, array in run.probe._asdict().items()}
    part = _file(folder, job).with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, asked_for=asked_for, **arrays)
    part.replace(_file(folder, job))


def load(folder: Path, job: Job, asked_for: str) -> Run | None:
    """The run that was kept, if it was one of the same images, batch size and costs."""
    if not _file(folder, job).exists():
        return None
    with np.load(_file(folder, job)) as kept:
        if str(kept["asked_for"]) != asked_for:
            return None
        probe = Probe(**{name: kept[f"probe_{name}"] for name in Probe._fields}) if "probe_state" in kept else None
        return Run(kept["wrong"], kept["asked"], probe, float(kept["share_learned"]))


def described(settings: Settings, cost: float | None) -> str:
    """What a run depends on beside its job and the code."""
    return json.dumps({"corruptions": settings.corruptions, "batch": settings.batch, "cost": cost})


def _file(folder: Path, job: Job) -> Path:
    return folder / f"{job.method}-{job.protocol}.npz"
