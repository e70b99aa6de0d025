"""Folders that are one user's alone."""

import contextlib
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder and those above it for this user alone; `mkdir(parents=True)` would open the latter to all."""
    for each in (*reversed(folder.parents), folder):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
