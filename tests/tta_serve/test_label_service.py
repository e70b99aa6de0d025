"""The service around a real engine with a counting head; events say when the thread that teaches may go on."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn

from adapters import Network, Pipeline
from adapters.fusion import Fusion
from adapters.keys import Keys, KeysConfig, fit_keys
from adapters.kv_bottleneck import Counts
from tta_serve import label_service
from tta_serve.engine import Engine, Query
from tta_serve.errors import InvalidInput, NotFound, Overloaded, TooLarge, Unavailable
from tta_serve.feedback_log import FeedbackLog
from tta_serve.heads import Heads
from tta_serve.label_service import Label, Taken, label_of
from tta_serve.learner import Pools
from tta_serve.metrics import Metrics
from tta_serve.model_service import Commanded, Deleted, Limits
from tta_serve.models import InputSpec
from tta_serve.remembered import Key, Memory, Remembered
from tta_serve.service import Service

LABELS = ("a", "b", "c")
WAIT_S = 20.0  # for what happens at once, unless it never does
TINY = KeysConfig(codebooks=4, branches=(2, 2), key_dim=2, components=4)
Rows = Callable[..., Tensor]
Make = Callable[..., Service]


@pytest.fixture
def service(tmp_path: Path, tiny: Callable[..., nn.Module], rows: Rows) -> Make:
    """`service(remember=10, classes_max=5, learns=True, …)`: not started; all that are made share one store."""

    def make(
        remember: int = 10,
        age_max_s: float = 600,
        classes_max: int = 5,
        images_per_request: int = 8,
        learns: bool = True,
        streams_max: int = 10,
        queue_rows: int = 100,
    ) -> Service:
        network = Network(tiny())
        with torch.no_grad():
            features = network(rows(40)).features
        assert features is not None
        head = Counts(Keys(fit_keys(features, TINY), TINY))
        log = FeedbackLog(tmp_path / "feedback.db", "m", "00ff", len(LABELS))
        heads = Heads(head, LABELS, log, classes_max=classes_max) if learns else None
        pipeline = Pipeline(network, head=Fusion(head, len(LABELS)) if learns else None)
        return Service(
            Engine(pipeline, torch.device("cpu"), streams_max, heads=heads),
            InputSpec(4, 4, None),
            LABELS,
            Metrics("m", "r"),
            mode="labels" if learns else "frozen",
            limits=Limits(image_pixels=1000, images_per_request=images_per_request),
            batch_rows_max=64,
            queue_rows=queue_rows,
            pools=Pools(2, 1000.0, 100),
            budget=1.0,
            remembered=Remembered(remember, 10**6, age_max_s),
        )

    return make


def play(service: Service, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test while the service runs."""

    async def main() -> None:
        await service.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await test()
        finally:
            await service.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def value(service: Service, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where there is none yet."""
    for family in text_string_to_metric_families(service.metrics_text()):
        for sample in family.samples:
            if sample.name == name and sample.labels == {"model": "m", "replica": "r", **labels}:
                return sample.value
    return 0.0


def heads_of(service: Service) -> Heads:
    assert service.engine.heads is not None
    return service.engine.heads


def hold(service: Service) -> threading.Event:
    """From now on the thread that teaches does nothing, until the event is set."""
    began, go_on = threading.Event(), threading.Event()

    def held() -> None:
        began.set()
        go_on.wait(WAIT_S)

    service._teacher.submit(held)
    assert began.wait(WAIT_S)
    return go_on


def queued(service: Service) -> int:
    """What the thread that teaches has not begun yet."""
    return service._teacher._work_queue.qsize()


def everything(service: Service, stream: str = "s") -> Any:
    """Whatever labels could change."""
    heads = heads_of(service)
    return id(heads.view(stream)), heads.feedback.entries(), heads.feedback.names(""), service.engine.streams.names()


def by_id(id: str, label: str | int = "glyph", place: int = 0) -> Label:
    return Label(label, id, place)


def recall(service: Service, stream: str, id: str) -> Memory:
    memory = service._remembered.find(Key(stream, id), time.monotonic())
    assert memory is not None
    return memory


def outcomes(taken: Sequence[Taken]) -> list[str]:
    return [each.outcome for each in taken]


# -- tell -------------------------------------------------------------------------------------------------------------


def test_a_label_is_in_effect_when_it_is_answered(service: Make, rows: Rows) -> None:
    mine, x = service(), rows(1)

    async def test() -> None:
        before = await mine.predict(x, "s", id="p")
        assert before.logits is not None
        said = LABELS[int(before.logits.argmax())]
        assert (before.added, before.head_version) == ((), 0)
        taken = await mine.teach([by_id("p")], "s", "stream")
        assert taken == [Taken("applied", "p", 0, "glyph", said, False)]
        after = await mine.predict(x, "s", id="q")
        assert after.logits is not None
        assert after.logits.shape == (1, 4)
        assert (int(after.logits.argmax()), after.added, after.head_version) == (3, ("glyph",), 1)
        assert mine.labels_of("s") == (*LABELS, "glyph")
        other = await mine.predict(x, "t")
        np.testing.assert_array_equal(other.logits, before.logits)
        assert await mine.teach([by_id("q")], "s", "stream") == [Taken("applied", "q", 0, "glyph", "glyph", True)]

    play(mine, test)
    assert value(mine, "tta_labels_total", result="applied") == 2
    assert value(mine, "tta_prequential_labels_total", right="false") == 1
    assert value(mine, "tta_prequential_labels_total", right="true") == 1
    assert value(mine, "tta_stage_seconds_count", stage="teach") == 2


def test_a_label_may_be_an_index(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(2), "s", id="p")
        assert [each.label for each in await mine.teach([by_id("p", 1), by_id("p", "new", 1)], "s", "stream")] == [
            "b",
            "new",
        ]
        await mine.predict(rows(1), "s", id="q")
        (added,) = await mine.teach([by_id("q", 3)], "s", "stream")
        assert added.label == "new"
        assert heads_of(mine).view("s").table.images == (1, 2)

    play(mine, test)


def test_pictures_without_a_name_get_one(service: Make, picture: Callable[..., bytes]) -> None:
    mine = service()
    dark, light = picture(np.zeros((4, 4, 3), np.uint8)), picture(np.full((4, 4, 3), 255, np.uint8))

    async def test() -> None:
        taken = await mine.teach([Label("a", None, 0, dark), Label("a", None, 0, light)], "s", "stream")
        assert outcomes(taken) == ["applied", "applied"]
        assert len({each.id for each in taken}) == 2
        assert all(each.id.startswith("r-") for each in taken)
        named = Label("b", "mine", 0, dark)
        assert outcomes(await mine.teach([named, named], "s", "stream")) == ["applied", "repeated"]
        assert outcomes(await mine.teach([by_id("mine")], "s", "stream")) == ["repeated"]

    play(mine, test)
    assert value(mine, "tta_images_total") == 0  # nobody asked for an answer


def test_pictures_and_predictions_go_together(service: Make, rows: Rows, picture: Callable[..., bytes]) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(2), "s", id="p")
        taken = await mine.teach(
            [by_id("p", "x", 1), Label("y", "mine", 0, picture()), by_id("p", "z", 0)], "s", "stream"
        )
        assert [(each.id, each.place, each.label) for each in taken] == [("p", 1, "x"), ("mine", 0, "y"), ("p", 0, "z")]
        head, first = heads_of(mine).head, await mine.predict(rows(1), "s", id="q")
        (memory,) = recall(mine, "s", "q").images
        (kept,) = [entry.code for entry in heads_of(mine).feedback.entries() if entry.place == 0 and entry.id == "p"]
        assert kept == head.encode(memory[None])[0].numpy().tobytes()
        assert first.added == ("x", "y", "z")

    play(mine, test)


def test_what_was_predicted_is_that_of_before_for_all_of_a_request(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1).expand(3, -1, -1, -1), "s", id="p")
        taken = await mine.teach([by_id("p", "glyph", place) for place in range(3)], "s", "stream")
        assert [each.right for each in taken] == [False] * 3

    play(mine, test)


def test_told_twice_is_told_once(service: Make, rows: Rows) -> None:
    mine = service(age_max_s=1000)

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        assert outcomes(await mine.teach([by_id("p"), by_id("p", "other")], "s", "stream")) == ["applied", "repeated"]
        before = everything(mine)
        for scope in ("stream", "shared"):
            assert outcomes(await mine.teach([by_id("p")], "s", scope)) == ["repeated"]
        await mine.freeze("s")  # drops what is remembered
        assert outcomes(await mine.teach([by_id("p", "b")], "s", "stream")) == ["repeated"]
        assert everything(mine) == before

    play(mine, test)
    assert value(mine, "tta_labels_total", result="repeated") == 4
    assert value(mine, "tta_prequential_labels_total", right="false") == 1


def test_what_was_told_stays_told_when_its_stream_freezes(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        await mine.teach([by_id("p")], "s", "stream")
        mine.engine.streams.freeze("s", "guards")  # as a guard does it: what is remembered stays
        assert outcomes(await mine.teach([by_id("p")], "s", "stream")) == ["repeated"]

    play(mine, test)


def test_a_frozen_stream_learns_no_labels(service: Make, rows: Rows, picture: Callable[..., bytes]) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s")
        await mine.freeze("s")
        await mine.predict(rows(1), "s", id="p")
        before = everything(mine)
        taken = await mine.teach([by_id("p"), Label("a", "mine", 0, picture())], "s", "stream")
        assert outcomes(taken) == ["frozen", "frozen"]
        assert everything(mine) == before
        await mine.resume("s")
        await mine.predict(rows(1), "s", id="p")
        assert outcomes(await mine.teach([by_id("p")], "s", "stream")) == ["applied"]

    play(mine, test)
    assert value(mine, "tta_labels_total", result="frozen") == 2


def test_wrong_labels_change_nothing_of_any_item(service: Make, rows: Rows, picture: Callable[..., bytes]) -> None:
    mine = service(classes_max=2)
    image = picture()

    async def test() -> None:
        await mine.predict(rows(2), "s", id="p")
        await mine.predict(rows(1), "t", id="theirs")
        before = everything(mine)
        for items, kind, said in (
            ([by_id("p"), by_id("nobody")], NotFound, "no prediction 'nobody' of stream 's' is remembered"),
            ([by_id("p"), by_id("theirs")], NotFound, "no prediction 'theirs' of stream 's'"),
            ([by_id("p"), by_id("p", "b", 2)], InvalidInput, "the index is 2, and the prediction 'p' has 2 images"),
            ([by_id("p"), by_id("p", "b", -1)], InvalidInput, "the index is -1"),
            ([by_id("p"), by_id("p", 3, 1)], InvalidInput, "there is no class 3"),
            ([by_id("p"), Label("b", None, 0, b"no picture")], InvalidInput, "10 bytes that are no"),
            ([by_id("p"), by_id("p", "2", 1), Label("3", None, 0, image)], TooLarge, "which may have 2"),
            ([by_id("p")] * 9, TooLarge, "9 images in one request; the limit is 8"),
            ([], InvalidInput, "no image"),
        ):
            with pytest.raises(kind, match=said):
                await mine.teach(items, "s", "stream")
            assert everything(mine) == before
        recall(mine, "s", "p").at_s -= 601
        with pytest.raises(NotFound, match="remember_s"):
            await mine.teach([by_id("p")], "s", "stream")
        assert everything(mine) == before
        assert mine._waiting_labels == 0

    play(mine, test)
    assert value(mine, "tta_labels_total", result="applied") == 0


def test_a_wrong_id_begins_no_stream(service: Make, picture: Callable[..., bytes]) -> None:
    mine = service()

    async def test() -> None:
        for items in ([by_id("p")], [Label("a", None, 0, picture()), by_id("p")]):
            with pytest.raises(NotFound, match="'new'"):
                await mine.teach(items, "new", "stream")
        with pytest.raises(InvalidInput, match="cannot name a class"):
            await mine.teach([Label("", None, 0, picture())], "new", "stream")
        assert mine.engine.streams.names() == []
        await mine.teach([Label("a", None, 0, picture())], "new", "stream")
        assert mine.engine.streams.names() == ["new"]

    play(mine, test)


@pytest.mark.parametrize("asked", [{"adapt": False}, {"answer": "frozen"}])
def test_what_is_not_remembered(service: Make, rows: Rows, asked: dict[str, Any]) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p", **asked)
        assert mine._remembered.images == 0
        with pytest.raises(NotFound, match="send the image with its label"):
            await mine.teach([by_id("p")], "s", "stream")

    play(mine, test)


@pytest.mark.parametrize("remember", [0, 1])
def test_predictions_are_remembered_while_there_is_room(service: Make, rows: Rows, remember: int) -> None:
    mine = service(remember=remember)

    async def test() -> None:
        for id in ("p", "q"):
            await mine.predict(rows(1), "s", id=id)
        assert mine._remembered.images == remember
        with pytest.raises(NotFound):
            await mine.teach([by_id("p")], "s", "stream")

    play(mine, test)


def test_features_are_remembered_and_no_images(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(2), "s", id="p")
        assert [image.shape for image in recall(mine, "s", "p").images] == [
            (16,)
        ] * 2  # what the last linear layer reads

    play(mine, test)


def test_numbers_that_are_not_finite_teach_nothing(service: Make, rows: Rows, picture: Callable[..., bytes]) -> None:
    mine = service()
    predict = mine.engine.predict

    def broken(queries: Sequence[Query]) -> Any:
        return [(answer._replace(logits=answer.logits * np.nan), lesson) for answer, lesson in predict(queries)]

    async def test() -> None:
        await mine.predict(rows(1), "s")
        before = everything(mine)
        mine.engine.predict = broken  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="not finite"):
            await mine.teach([Label("a", None, 0, picture())], "s", "stream")
        with pytest.raises(Unavailable, match="not finite"):
            await mine.predict(rows(1), "s", id="p")
        mine.engine.predict = predict  # type: ignore[method-assign]
        assert everything(mine) == before
        assert mine._remembered.images == 0

    play(mine, test)


def test_a_store_that_fails_changes_nothing(service: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = service()

    def full(*_: Any, **__: Any) -> Any:
        raise Unavailable("the disk is full")

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        before = everything(mine)
        with monkeypatch.context() as failing:
            failing.setattr(heads_of(mine).feedback, "append", full)
            with pytest.raises(Unavailable, match="disk is full"):
                await mine.teach([by_id("p")], "s", "stream")
        assert everything(mine) == before
        assert outcomes(await mine.teach([by_id("p")], "s", "stream")) == ["applied"]
        incarnation, before = mine.view("s").incarnation, everything(mine)
        for command in (mine.reset, mine.delete, lambda stream: mine.forget(stream, ids=["p"])):
            with monkeypatch.context() as failing:
                failing.setattr(heads_of(mine).feedback, "remove", full)
                with pytest.raises(Unavailable, match="disk is full"):
                    await command("s")
            assert everything(mine) == before
            assert mine.view("s").incarnation == incarnation

    play(mine, test)


def test_a_model_that_learns_from_no_labels(service: Make, rows: Rows) -> None:
    mine = service(learns=False)

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        assert mine._remembered.images == 0
        for call in (mine.teach([by_id("p")], "s", "stream"), mine.forget("s", ids=["p"])):
            with pytest.raises(InvalidInput, match="this model learns from no labels; give it the adapter kv_bottle"):
                await call
        await mine.reset("s")
        assert (await mine.delete("s")).receipt is None

    play(mine, test)


# -- forget -----------------------------------------------------------------------------------------------------------


def test_what_is_forgotten_is_gone_from_the_next_answer(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        before = await mine.predict(rows(2), "s", id="p")
        await mine.teach([by_id("p", "x"), by_id("p", "y", 1)], "s", "stream")
        receipt = (await mine.forget("s", label="x")).receipt
        assert (receipt.removed, receipt.classes, receipt.verified) == (1, ("x",), True)
        assert (await mine.predict(rows(1), "s")).added == ("y",)
        receipt = (await mine.forget("s", ids=["p"])).receipt
        assert (receipt.removed, receipt.classes) == (1, ("y",))
        after = await mine.predict(rows(2), "s")
        np.testing.assert_array_equal(after.logits, before.logits)
        assert after.added == ()
        assert after.head_version > 1
        with pytest.raises(NotFound, match="stream 's' told nothing of the class 'x'"):
            await mine.forget("s", label="x")
        with pytest.raises(NotFound, match=r"told nothing of the predictions \['p', 'q'\]"):
            await mine.forget("s", ids=["p", "q"])
        assert outcomes(await mine.teach([by_id("p")], "s", "stream")) == ["applied"]  # what was forgotten may be told

    play(mine, test)
    assert value(mine, "tta_forgotten_labels_total") == 2
    assert value(mine, "tta_stage_seconds_count", stage="forget") == 4


@pytest.mark.parametrize("command", ["reset", "delete"])
def test_commands_that_end_a_life_take_its_labels(service: Make, rows: Rows, command: str) -> None:
    mine = service()

    async def test() -> None:
        before = await mine.predict(rows(2), "s", id="p")
        await mine.teach([by_id("p")], "s", "stream")
        await mine.teach([by_id("p", "b", 1)], "s", "shared")
        await mine.predict(rows(1), "t", id="q")
        done: Any = await getattr(mine, command)("s")
        assert isinstance(done, Deleted if command == "delete" else Commanded)
        assert mine._remembered.images == 1  # of t
        after = await mine.predict(rows(2), "t")
        if command == "delete":
            assert done.receipt.removed == 2
            np.testing.assert_array_equal(after.logits, before.logits)
        else:
            assert heads_of(mine).view("s").table.classes == (1,)
        with pytest.raises(NotFound):
            await mine.teach([by_id("p", "b", 1), by_id("p")], "s", "stream")
        with pytest.raises(NotFound, match="no stream named 'nobody'"):
            await getattr(mine, command)("nobody")

    play(mine, test)


def test_rollback_leaves_what_was_told(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        await mine.teach([by_id("p")], "s", "stream")
        before = everything(mine)
        await mine.rollback("s", 0)
        assert everything(mine) == before

    play(mine, test)


# -- at once ----------------------------------------------------------------------------------------------------------


def test_two_that_tell_the_same_at_once(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        go_on = hold(mine)
        both = [asyncio.ensure_future(mine.teach([by_id("p", label)], "s", "stream")) for label in ("x", "y")]
        await until(lambda: queued(mine) == 2)
        go_on.set()
        assert [outcomes(each) for each in await asyncio.gather(*both)] == [["applied"], ["repeated"]]
        assert mine.labels_of("s") == (*LABELS, "x")

    play(mine, test)


def test_a_client_that_leaves_while_its_label_is_written(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        go_on = hold(mine)
        leaving = asyncio.ensure_future(mine.teach([by_id("p")], "s", "stream"))
        await until(lambda: queued(mine) == 1)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert mine._waiting_labels == 1
        go_on.set()
        assert outcomes(await mine.teach([by_id("p")], "s", "stream")) == ["repeated"]
        assert (await mine.predict(rows(1), "s")).added == ("glyph",)
        assert mine._waiting_labels == 0

    play(mine, test)
    assert value(mine, "tta_labels_total", result="applied") == 1


def test_a_client_that_leaves_while_its_stream_is_deleted(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        await mine.teach([by_id("p")], "s", "stream")
        go_on = hold(mine)
        leaving = asyncio.ensure_future(mine.delete("s"))
        await until(lambda: queued(mine) == 1)
        leaving.cancel()
        await asyncio.wait([leaving])
        go_on.set()
        await until(lambda: not mine._remembered.images)
        assert mine.engine.streams.names() == []
        assert heads_of(mine).feedback.entries() == []

    play(mine, test)


@pytest.mark.parametrize("command", ["reset", "delete"])
def test_labels_that_wait_while_their_streams_life_ends_are_stale(service: Make, rows: Rows, command: str) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        go_on = hold(mine)
        ending = asyncio.ensure_future(getattr(mine, command)("s"))
        await until(lambda: queued(mine) == 1)
        telling = asyncio.ensure_future(mine.teach([by_id("p")], "s", "shared"))
        await until(lambda: queued(mine) == 2)
        go_on.set()
        _, taken = await asyncio.gather(ending, telling)
        assert outcomes(taken) == ["stale"]
        assert heads_of(mine).feedback.entries() == []
        assert heads_of(mine).view("t") is heads_of(mine).untold

    play(mine, test)
    assert value(mine, "tta_labels_total", result="stale") == 1


def test_labels_told_before_their_stream_is_deleted_go_with_it(service: Make, rows: Rows) -> None:
    mine = service()

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        go_on = hold(mine)
        telling = asyncio.ensure_future(mine.teach([by_id("p")], "s", "shared"))
        await until(lambda: queued(mine) == 1)
        deleting = asyncio.ensure_future(mine.delete("s"))
        await until(lambda: queued(mine) == 2)
        go_on.set()
        taken, deleted = await asyncio.gather(telling, deleting)
        assert deleted.receipt is not None
        assert (outcomes(taken), deleted.receipt.removed) == (["applied"], 1)
        assert heads_of(mine).feedback.entries() == []

    play(mine, test)


@pytest.mark.parametrize("command", ["reset", "delete"])
def test_what_is_answered_after_its_streams_life_is_not_remembered(service: Make, rows: Rows, command: str) -> None:
    mine = service()
    predict = mine.engine.predict

    def deleting(queries: Sequence[Query]) -> Any:
        answers = predict(queries)
        getattr(mine.engine.streams, command)("s")
        return answers

    mine.engine.predict = deleting  # type: ignore[method-assign]

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")
        assert mine._remembered.images == 0

    play(mine, test)


def test_every_answer_is_that_of_one_version(service: Make, rows: Rows) -> None:
    mine = service(remember=100)
    x = rows(1)
    seen: dict[int, set[bytes]] = {}
    versions: list[int] = []

    async def ask(count: int) -> None:
        for _ in range(count):
            answer = await mine.predict(x, "s")
            assert answer.logits is not None
            seen.setdefault(answer.head_version, set()).add(answer.logits.tobytes() + "".join(answer.added).encode())
            versions.append(answer.head_version)

    async def tell(count: int) -> None:
        for number in range(count):
            await mine.teach([by_id("p", f"class {number % 3}", number)], "s", "stream")

    async def test() -> None:
        await mine.predict(rows(8), "s", id="p")
        telling = asyncio.ensure_future(tell(8))
        while not telling.done():
            await ask(1)
        await ask(1)

    play(mine, test)
    assert versions == sorted(versions)
    assert versions[-1] == 8
    assert all(len(answers) == 1 for answers in seen.values())
    assert len(seen) > 2


def test_too_many_labels_that_wait_are_refused(service: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_service, "LABELS_WAITING_MAX", 3)
    mine = service()

    async def test() -> None:
        await mine.predict(rows(8), "s", id="p")
        go_on = hold(mine)
        first = asyncio.ensure_future(mine.teach([by_id("p", "a", place) for place in (0, 1)], "s", "stream"))
        await until(lambda: queued(mine) == 1)
        second = [by_id("p", "a", place) for place in (2, 3)]
        with pytest.raises(Overloaded, match="2 labels wait; the limit is 3"):
            await mine.teach(second, "s", "stream")
        first.cancel()
        await asyncio.wait([first])
        with pytest.raises(Overloaded):  # they wait still
            await mine.teach(second, "s", "stream")
        go_on.set()
        await until(lambda: not mine._waiting_labels)
        more_than_may_wait = [by_id("p", "a", place) for place in range(8)]
        taken = await mine.teach(more_than_may_wait, "s", "stream")
        assert outcomes(taken) == ["repeated"] * 2 + ["applied"] * 6

    play(mine, test)


def test_refused_pictures_begin_no_stream(service: Make, picture: Callable[..., bytes]) -> None:
    mine = service(streams_max=1)

    async def test() -> None:
        await mine.teach([Label("a", None, 0, picture())], "s", "stream")
        with pytest.raises(Overloaded, match="1 streams, the limit"):
            await mine.teach([Label("a", None, 0, picture())], "t", "stream")
        assert mine.engine.streams.names() == ["s"]
        assert mine._waiting_labels == 0

    play(mine, test)


# -- lives ------------------------------------------------------------------------------------------------------------


def test_a_restart_knows_all_that_was_told(service: Make, rows: Rows) -> None:
    mine = service()
    found: list[Any] = []

    async def tell() -> None:
        await mine.predict(rows(2), "s", id="p")
        await mine.teach([by_id("p"), by_id("p", "b", 1)], "s", "stream")
        await mine.teach([by_id("p", "b", 1)], "s", "shared")
        found.append((await mine.predict(rows(2), "s")).logits)

    play(mine, tell)
    again = service(streams_max=1)

    async def ask() -> None:
        assert again.engine.streams.names() == ["s"]
        np.testing.assert_array_equal((await again.predict(rows(2), "s")).logits, found[0])
        assert again.labels_of("s") == (*LABELS, "glyph")
        assert outcomes(await again.teach([by_id("p", "c")], "s", "stream")) == ["repeated"]
        with pytest.raises(NotFound):
            await again.teach([by_id("q")], "s", "stream")
        receipt = (await again.delete("s")).receipt
        assert receipt is not None
        assert receipt.removed == 2

    play(again, ask)


def test_only_while_it_runs(service: Make, rows: Rows, picture: Callable[..., bytes]) -> None:
    mine = service()

    async def refused() -> None:
        for call in (
            mine.teach([by_id("p")], "s", "stream"),
            mine.teach([Label("a", None, 0, picture())], "s", "stream"),
            mine.forget("s", ids=["p"]),
        ):
            with pytest.raises(Unavailable, match="not running"):
                await call

    async def test() -> None:
        await mine.predict(rows(1), "s", id="p")

    asyncio.run(refused())
    play(mine, test)
    asyncio.run(refused())


def test_stop_settles_all_who_tell(service: Make, rows: Rows) -> None:
    mine = service()

    async def main() -> None:
        await mine.start()
        await mine.predict(rows(1), "s", id="p")
        go_on = hold(mine)
        telling = asyncio.ensure_future(mine.teach([by_id("p")], "s", "stream"))
        await until(lambda: queued(mine) == 1)
        stopping = asyncio.ensure_future(mine.stop())
        await until(lambda: telling.done())
        go_on.set()
        async with asyncio.timeout(WAIT_S):
            await stopping
            with pytest.raises(Unavailable, match="the server is stopping"):
                await telling
        await mine.stop()  # a second time changes nothing

    asyncio.run(main())
    again = service()
    assert heads_of(again).feedback.entries() == []
    heads_of(again).close()


@pytest.mark.parametrize("label", ["", " a", "a ", "x" * 101, "a\nb", "a\x00", "\x7f", "\ud800", "​", 3, -1, 10**30])
def test_what_cannot_name_a_class(label: str | int) -> None:
    with pytest.raises(InvalidInput, match=r"cannot name a class|there is no class") as caught:
        label_of(label, LABELS)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("label", ["x" * 100, "Übergröße", "雨", "a b", "-1", "3", "<b>"])
def test_what_can(label: str) -> None:
    assert label_of(label, LABELS) == label


def test_a_class_that_there_is_may_have_any_name() -> None:
    long = "hen of the woods, " * 10
    assert label_of(long, [*LABELS, long]) == long
    assert label_of(3, [*LABELS, long]) == long
