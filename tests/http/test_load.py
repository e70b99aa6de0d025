"""A server that is full, that fails, and whose clients leave."""

import threading
from collections.abc import Callable

import anyio
import numpy as np
import pytest
from payloads import as_binary, tensor

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/digits"
INFER = f"{MODEL}/infer"


class Gate:
    """Holds every forward until it is let through."""

    def __init__(self, engine, monkeypatch) -> None:
        self.batches: list[list[str]] = []  # streams of each forward that has begun
        self._entered = threading.Semaphore(0)
        self._open = threading.Semaphore(0)
        predict = engine.predict

        def held(queries):
            self.batches.append([query.stream for query in queries])
            self._entered.release()
            assert self._open.acquire(timeout=60)
            return predict(queries)

        monkeypatch.setattr(engine, "predict", held)

    async def entered(self) -> None:
        """Wait until one more forward has begun."""
        assert await anyio.to_thread.run_sync(lambda: self._entered.acquire(timeout=60))

    def let_through(self, forwards: int = 1) -> None:
        self._open.release(forwards)


def asked(held_out, stream: str, rows: int = 1):
    return as_binary(tensor(held_out[0][:rows]), {"x-session-id": stream, "x-adapt": "off"})


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not true():
            await anyio.sleep(0)


async def waiting_rows(client) -> str:
    lines = (await client.get("/metrics")).text.splitlines()
    return next(line.rpartition(" ")[2] for line in lines if line.startswith("tta_waiting_rows{"))


async def until_waiting(client, rows: int) -> None:
    with anyio.fail_after(60):
        while await waiting_rows(client) != f"{rows}.0":
            await anyio.sleep(0)


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_full_queue_says_when_to_come_back(serving, held_out, monkeypatch, mode):
    async with serving(adaptation={"mode": mode}, batching={"rows_max": 1, "queue_rows": 3}) as server:
        gate = Gate(server.service.engine, monkeypatch)
        statuses = []

        async def ask(stream: str, rows: int) -> None:
            statuses.append((await server.client.post(INFER, **asked(held_out, stream, rows))).status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "a", 1)
            await gate.entered()
            tasks.start_soon(ask, "b", 2)
            await until_waiting(server.client, 2)
            refused = await server.client.post(INFER, **asked(held_out, "b", 2))
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert list(refused.json()) == ["error"]
            assert "2 rows are waiting" in refused.json()["error"]
            assert "the limit of 3 (batching.queue_rows)" in refused.json()["error"]
            tasks.start_soon(ask, "c", 1)  # what fits is taken
            await until_waiting(server.client, 3)
            gate.let_through(3)
        assert statuses == [200, 200, 200]


async def test_too_many_streams(serving, held_out):
    async with serving(streams={"max": 2}, admin_token="boss") as server:
        for stream in ("a", "b", "a"):
            assert (await server.client.post(INFER, **asked(held_out, stream))).status_code == 200
        refused = await server.client.post(INFER, **asked(held_out, "c"))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "there are 2 streams, the limit (streams.max)" in refused.json()["error"]
        assert "'c'" in refused.json()["error"]
        assert server.service.engine.streams.names() == ["a", "b"]
        await server.client.delete(f"{MODEL}/streams/a", headers={"authorization": "Bearer boss"})
        assert (await server.client.post(INFER, **asked(held_out, "c"))).status_code == 200


async def test_too_many_new_streams_in_a_minute(serving, held_out):
    async with serving(streams={"new_per_minute": 2}, admin_token="boss") as server:
        for stream in ("a", "b", "a"):
            assert (await server.client.post(INFER, **asked(held_out, stream))).status_code == 200
        refused = await server.client.post(INFER, **asked(held_out, "c"))
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30  # there is room for one every 30 s
        assert list(refused.json()) == ["error"]
        assert "2 streams have begun within a minute, the limit (streams.new_per_minute)" in refused.json()["error"]
        assert server.service.engine.streams.names() == ["a", "b"]
        # an end makes no room for a beginning
        await server.client.delete(f"{MODEL}/streams/a", headers={"authorization": "Bearer boss"})
        assert (await server.client.post(INFER, **asked(held_out, "c"))).status_code == 429
        assert (await server.client.post(INFER, **asked(held_out, "b"))).status_code == 200


@pytest.mark.parametrize("when", ["while it waits", "in the forward"])
@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_client_that_leaves_does_not_disturb_the_others(serving, held_out, monkeypatch, mode, when):
    async with serving(adaptation={"mode": mode}, batching={"rows_max": 8}) as server:
        alone = (await server.client.post(INFER, **asked(held_out, "stays", 2))).json()["outputs"]
        gate = Gate(server.service.engine, monkeypatch)
        answers = []
        scopes: dict[str, anyio.CancelScope] = {}

        async def ask(stream: str, rows: int) -> None:
            with anyio.CancelScope() as scopes[stream]:
                answers.append(await server.client.post(INFER, **asked(held_out, stream, rows)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first", 1)
            await gate.entered()
            tasks.start_soon(ask, "leaves", 1)
            await until_waiting(server.client, 1)
            tasks.start_soon(ask, "stays", 2)
            await until_waiting(server.client, 3)
            if when == "in the forward":
                gate.let_through()
                await gate.entered()
            scopes["leaves"].cancel()
            gate.let_through(3)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[1].json()["parameters"]["stream"] == "stays"
        probabilities = [np.array(outputs[1]["data"]) for outputs in (answers[1].json()["outputs"], alone)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
        if mode == "async":
            together = ["leaves", "stays"] if when == "in the forward" else ["stays"]
            assert gate.batches[:2] == [["first"], together]
        assert (await server.client.post(INFER, **asked(held_out, "stays", 2))).status_code == 200


async def test_stopping_ends_with_the_batch_at_hand(serving, held_out, monkeypatch):
    async with serving(batching={"rows_max": 1}) as server:
        gate = Gate(server.service.engine, monkeypatch)
        answers = {}

        async def ask(stream: str) -> None:
            answers[stream] = await server.client.post(INFER, **asked(held_out, stream))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "at-hand")
            await gate.entered()
            tasks.start_soon(ask, "waiting")
            await until_waiting(server.client, 1)
            tasks.start_soon(server.service.stop)
            await until(lambda: not server.service.ready)
            assert (await server.client.get("/v2/health/ready")).status_code == 503
            assert (await server.client.get(f"{MODEL}/ready")).status_code == 503
            gate.let_through()
        assert answers["at-hand"].status_code == 200
        assert answers["waiting"].status_code == 503
        assert answers["waiting"].json() == {"error": "the server is stopping"}
        late = await server.client.post(INFER, **asked(held_out, "late"))
        assert late.status_code == 503
        assert late.json() == {"error": "the server is not running"}


async def test_a_failure_inside_is_500_without_a_traceback(serving, held_out, monkeypatch, caplog):
    async with serving() as server:

        def fail(_):
            raise RuntimeError("a secret of the engine")

        with monkeypatch.context() as patch:
            patch.setattr(server.service.engine, "predict", fail)
            answer = await server.client.post(INFER, **asked(held_out, "a"))
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == {"error": "an internal error; the server's log says more"}
        assert "a secret of the engine" in caplog.text
        assert (await server.client.post(INFER, **asked(held_out, "a"))).status_code == 200
        counted = (await server.client.get("/metrics")).text
        assert 'tta_requests_total{model="digits",outcome="failed",replica="r1"} 1.0' in counted


async def test_an_answer_that_is_not_finite_is_never_given(serving, held_out, monkeypatch):
    async with serving() as server:
        predict = server.service.engine.predict

        def spoil(queries):
            return [(answer._replace(logits=answer.logits * np.nan), lesson) for answer, lesson in predict(queries)]

        monkeypatch.setattr(server.service.engine, "predict", spoil)
        answer = await server.client.post(INFER, **asked(held_out, "a"))
        assert answer.status_code == 503
        assert "reset the stream 'a'" in answer.json()["error"]


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_learning_step_that_fails_costs_no_answer(serving, held_out, monkeypatch, mode, caplog):
    async with serving(adaptation={"mode": mode, "step_rows": 1, "budget": 1}) as server:

        def fail(_):
            raise RuntimeError("no step today")

        monkeypatch.setattr(server.service.engine, "learn", fail)
        for _ in range(3):
            body = as_binary(tensor(held_out[0][:16]), {"x-session-id": "a"})
            assert (await server.client.post(INFER, **body)).status_code == 200
        await until(lambda: caplog.text.count("no step today") >= 1)
        failed = ""
        with anyio.fail_after(60):
            while not failed.endswith(" 48.0"):
                lines = (await server.client.get("/metrics")).text.splitlines()
                failed = next((each for each in lines if 'reason="failed"' in each), "")
        assert (await server.client.get(f"{MODEL}/streams/a")).json()["version"] == 0


async def test_many_clients_of_many_streams_get_the_answers_that_they_would_get_alone(serving, held_out):
    images, labels = held_out
    async with serving(batching={"rows_max": 16}) as server:
        right = []

        async def ask(number: int) -> None:
            x = tensor(images[number : number + 1])
            headers = {"x-session-id": f"s{number % 5}", "x-adapt": "off"}
            answer = await server.client.post(INFER, **as_binary(x, headers))
            right.append(answer.json()["outputs"][0]["data"] == [labels[number]])

        async with anyio.create_task_group() as tasks:
            for number in range(64):
                tasks.start_soon(ask, number)
        assert right == [True] * 64
        assert server.service.engine.streams.names() == ["s0", "s1", "s2", "s3", "s4"]
