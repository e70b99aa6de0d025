"""The store's database, read from outside while replicas write to it: does any snapshot carry a life that is over?

Heads, the versions that are kept to roll back to, and the headers inside the snapshots themselves.
"""

import threading
from contextlib import suppress
from pathlib import Path

from loadtests.background import Background
from loadtests.deletes_answers import Floors, Stale
from tta_serve.errors import NotFound, Unavailable
from tta_serve.snapshots import read_header
from tta_serve.state_files import StoredState, list_states, load_snapshot

EVERY_S = 0.5


class Snapshots(Background):
    """A thread that looks again and again, for the length of the block.

    Args:
        database: the file.
        floors: of the streams.
    """

    def __init__(self, database: Path, floors: Floors) -> None:
        super().__init__("snapshots")
        self.stale: list[Stale] = []
        self.checked = 0  # heads and snapshots, each once
        self.looks = 0
        self.blind = 0  # looks at which the file could not be read
        self._database = database
        self._floors = floors
        self._seen: set[tuple[str, str, int, int]] = set()  # generation, stream, incarnation, version
        self._lock = threading.Lock()

    def look(self) -> None:
        """Judge all that lies there by what was over before."""
        with self._lock:
            floors = self._floors.all()
            self.looks += 1
            try:
                states = list_states(self._database)
            except (NotFound, Unavailable):
                self.blind += 1
                return
            for state in states:
                self._judge(state.stream, state.incarnation, floors.get(state.stream, 1), f"the head {state.version}")
                with suppress(NotFound, Unavailable):  # it has changed since, and is looked at the next time
                    self._look_inside(state, floors.get(state.stream, 1))

    def _look_inside(self, state: StoredState, floor: int) -> None:
        for version in (state.version, *state.kept):
            key = (state.generation, state.stream, state.incarnation, version)
            if state.incarnation >= floor and key in self._seen:
                continue
            content = load_snapshot(self._database, state.model, state.generation, state.stream, version)
            self._seen.add(key)
            self._judge(state.stream, read_header(content).incarnation, floor, f"the snapshot {version}")

    def _judge(self, stream: str, incarnation: int, floor: int, where: str) -> None:
        self.checked += floor > 1
        if incarnation < floor:
            self.stale.append(Stale(stream, incarnation, floor, where))

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self.look()
