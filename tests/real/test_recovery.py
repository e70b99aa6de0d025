"""A replica that dies is replaced, and the server says so meanwhile."""

import os
import signal

import httpx
import pytest
from servers import until

pytestmark = pytest.mark.real

RECOVERY_S = 120.0


def test_a_replica_that_is_killed_comes_back(live, held_out, infer):
    images, labels = held_out

    def replicas() -> list[int]:
        return [pid for pid, said in live.processes().items() if said.startswith("ray::ServeReplica:model-digits")]

    def ready() -> int:
        return httpx.get(f"{live.url}/v2/health/ready", timeout=30).status_code

    def ask() -> httpx.Response:
        request = infer(images[:4], "recovery", **{"x-adapt": "off"})
        return httpx.post(f"{live.model}/infer", timeout=30, **request)

    assert ready() == 200
    assert ask().status_code == 200
    (killed,) = replicas()
    os.kill(killed, signal.SIGKILL)

    until(lambda: ready() == 503, RECOVERY_S, "the readiness tells")
    assert httpx.get(f"{live.url}/v2/health/live", timeout=30).status_code == 200
    until(lambda: ready() == 200, RECOVERY_S, "the server is ready again")
    until(lambda: ask().status_code == 200, RECOVERY_S, "the model answers again")
    assert ask().json()["outputs"][0]["data"] == labels[:4].tolist()
    assert replicas() != [killed]
    assert httpx.get(f"{live.model}/streams", timeout=30).json()["total"] >= 1
