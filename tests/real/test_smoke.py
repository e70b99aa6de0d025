"""The whole way once, in the short: what `make test` knows of Ray and HAProxy."""

import httpx
import pytest
from servers import STOP_S, tta_serve, until

pytestmark = pytest.mark.smoke


def test_a_server_starts_predicts_learns_and_leaves_nothing_behind(detached, held_out, infer, tmp_path):
    images, labels = held_out
    with detached(adaptation={"step_rows": 16, "budget": 1}) as live, httpx.Client(timeout=60) as client:
        answer = client.post(f"{live.model}/infer", **infer(images[:16], "cam"))
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == labels[:16].tolist()

        def learned() -> bool:
            return client.get(f"{live.model}/streams/cam").json()["version"] >= 1

        until(learned, 30, "the stream has learned")
        answer = client.post(f"{live.model}/infer", **infer(images[:16], "cam"))
        assert int(answer.headers["x-state-version"].partition("+")[0]) >= 1

        assert client.get(f"{live.url}/v2/health/ready").json() == {"ready": True, "models": {"digits": True}}
        assert 'tta_images_total{model="digits"' in client.get(f"{live.url}/metrics").text

        said = tta_serve("status", folder=tmp_path).stdout
        assert f"{live.url} " in said
        assert str(live.pid) in said

        assert live.processes()
        stopped = tta_serve("down", "--port", str(live.port), folder=tmp_path, seconds=STOP_S)
        assert (stopped.returncode, stopped.stdout) == (0, f"Stopped {live.url}.\n")
    assert not live.folder.alive()
    assert not live.folder.path.exists()
    until(lambda: not live.processes(), 15, f"the session is empty: {live.processes()}")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{live.url}/v2/health/live")
