"""What was told survives the replica that was told, and is gone from the disk when it is forgotten."""

import os
import signal
from pathlib import Path

import httpx
import pytest
from payloads import picture
from servers import until

pytestmark = pytest.mark.real

RECOVERY_S = 120.0


def test_labels_outlive_a_replica_that_is_killed(detached, held_out):
    image = picture(255 - held_out[0][0])
    with detached(adapter={"kv_bottleneck": {"codebooks": 64, "branches": [8, 4]}}) as live:
        store = Path(f"/proc/{live.pid}/cwd").readlink() / "tta-state" / "digits"

        def predict() -> httpx.Response:
            return httpx.post(f"{live.model}/predict", content=image, headers={"x-session-id": "told"}, timeout=30)

        def answers() -> bool:
            try:
                return predict().status_code == 200
            except httpx.TransportError:  # the request that was under way
                return False

        def tell(id: str) -> str:
            item = {"id": id, "label": "a-name-that-is-found"}
            answer = httpx.post(f"{live.model}/feedback", json={"stream": "told", "items": [item]}, timeout=30)
            assert answer.status_code == 200, answer.text
            return answer.json()["results"][0]["result"]

        def kept() -> bytes:
            return b"".join(path.read_bytes() for path in store.iterdir())

        id = predict().json()["id"]
        assert tell(id) == "applied"
        assert predict().json()["predictions"][0]["label"] == "a-name-that-is-found"
        assert b"a-name-that-is-found" in kept()

        def replicas() -> set[int]:
            return {pid for pid, said in live.processes().items() if said.startswith("ray::ServeReplica:model-digits")}

        (killed,) = replicas()
        os.kill(killed, signal.SIGKILL)
        until(lambda: replicas() - {killed}, RECOVERY_S, "another takes its place")
        until(answers, RECOVERY_S, "the model answers again")
        assert predict().json()["predictions"][0]["label"] == "a-name-that-is-found"
        assert tell(id) == "repeated"

        forgotten = httpx.post(f"{live.model}/forget", json={"stream": "told", "ids": [id]}, timeout=30).json()
        assert (forgotten["removed"], forgotten["verified"], forgotten["residue"]) == (1, True, None)
        assert predict().json()["predictions"][0]["label"] != "a-name-that-is-found"
        assert b"a-name-that-is-found" not in kept()
        assert id.encode() not in kept()
