"""Streams outlive updates, scaling, and the death of everything that runs."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from payloads import picture
from servers import START_S, STOP_S, Live, session, tta_serve, until

from tta_serve.runfolder import RunFolder

pytestmark = pytest.mark.real

MODEL = "/v2/models/digits"


class Traffic:
    """Clients that ask all the time; what could not be answered, and which versions were seen."""

    def __init__(self, url: str, images: list[bytes]) -> None:
        self.failed: list[str] = []
        self.answered = 0
        self.totals: dict[str, int] = {}  # the largest version of each stream in an answer, unsynced changes included
        self._url, self._images = url, images
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(f"s{number}",)) for number in range(4)]

    def __enter__(self) -> "Traffic":
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for each in self._threads:
            each.join()

    def _ask(self, stream: str) -> None:
        with httpx.Client(timeout=60) as client:
            place = 0
            while not self._stopping.is_set():
                place += 1
                content, headers = self._images[place % len(self._images)], {"x-session-id": stream}
                try:
                    answer = client.post(f"{self._url}{MODEL}/predict", content=content, headers=headers)
                except httpx.TransportError as error:
                    self.failed.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.failed.append(answer.text)
                    continue
                self.answered += 1
                stored, _, rest = answer.headers["x-state-version"].partition("+")
                total = int(stored) + int(rest.partition("@")[0] or 0)
                self.totals[stream] = max(self.totals.get(stream, 0), total)


def stored(live: Live) -> dict[str, int]:
    listed = httpx.get(f"{live.model}/streams", timeout=30).json()["streams"]
    return {each["stream"]: each["version"] for each in listed}


def replicas(live: Live) -> list[int]:
    return [pid for pid, said in live.processes().items() if said.startswith("ray::ServeReplica:model-digits")]


def kill_everything(live: Live) -> None:
    for pid in session(live.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not session(live.pid), 60, "everything is dead")


@pytest.mark.timeout(1200)  # seven starts of replicas, one of a node
def test_streams_outlive_scaling_updates_and_the_death_of_the_node(write_config, held_out):
    images = [picture(255 - image) for image in held_out[0][:64]]
    path, port = write_config(replicas=1)

    def up(*words: str, **model: object) -> None:
        content = yaml.safe_load(path.read_text())
        content["models"][0] |= model
        path.write_text(yaml.safe_dump(content))
        said = tta_serve("up", path, *words, folder=path.parent, seconds=2 * START_S)
        assert said.returncode == 0, said.stderr + said.stdout

    up("--detach")
    status = RunFolder(port).read()
    assert status is not None
    live = Live(port, status.pid)
    try:
        with Traffic(live.url, images) as traffic:
            until(lambda: len(stored(live)) == 4 and min(stored(live).values()) > 0, 60, "all have learned")
            up(replicas=3)  # in place: the server that runs goes over to it
            until(lambda: len(replicas(live)) == 3, 120, "three replicas")
            up(replicas=2, adaptation={"budget": 0.5})
            until(lambda: len(replicas(live)) == 2, 120, "two replicas")
        assert traffic.failed == []
        assert traffic.answered > 100
        assert RunFolder(port).read() == status._replace(update=RunFolder(port).read().update)

        settled = until(lambda: stored(live), 30, "a listing")
        time.sleep(2.5)  # intervals in which everything is saved
        settled = stored(live)
        assert all(settled[stream] >= total for stream, total in traffic.totals.items())

        wrong = Path(path.parent / "wrong.yaml")
        wrong.write_text(path.read_text().replace("builtin: digits", "python: nowhere:build"))
        refused = tta_serve("up", wrong, folder=path.parent, seconds=2 * START_S)
        assert refused.returncode == 2
        assert httpx.get(f"{live.model}/ready", timeout=30).status_code == 200

        kill_everything(live)
        up("--detach")
        live = Live(port, RunFolder(port).read().pid)
        after = {
            stream: httpx.post(
                f"{live.model}/predict",
                content=images[0],
                headers={"x-session-id": stream, "x-adapt": "off"},
                timeout=30,
            ).headers["x-state-version"]
            for stream in settled
        }
        assert after == {stream: str(version) for stream, version in settled.items()}
    finally:
        if RunFolder(port).alive():
            tta_serve("down", "--port", str(port), folder=path.parent, seconds=STOP_S)
