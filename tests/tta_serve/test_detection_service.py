"""The service around a real engine with a detector of bright spots; events say when a thread may go on."""

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import spots
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from adapters import tree
from tta_serve import modalities
from tta_serve.box_lessons import Shown, Taught
from tta_serve.box_service import LESSONS_MAX
from tta_serve.config import ModTrSettings
from tta_serve.detection import DetectionEngine
from tta_serve.detection_service import DetectionService, Prediction
from tta_serve.detectors import Detector
from tta_serve.errors import InvalidInput, NotFound, Overloaded, TooLarge, Unavailable
from tta_serve.feedback import Feedback
from tta_serve.learner import Pools
from tta_serve.metrics import Metrics
from tta_serve.model_service import Limits
from tta_serve.remembered import Remembered

WAIT_S = 20.0  # for what happens at once, unless it never does
IR = spots.tensor(spots.infrared())
RED = spots.tensor(spots.scene())
Make = Callable[..., DetectionService]


@pytest.fixture
def service() -> Make:
    """`service("ir", …, mode="async", remember=10, routed=True, **settings of modtr)`: not started."""

    def make(
        *names: str,
        mode: str = "async",
        remember: int = 10,
        age_max_s: float = 600,
        routed: bool = True,
        queue_rows: int = 100,
        streams_max: int = 10,
        **others: Any,
    ) -> DetectionService:
        detector = Detector(spots.build()).freeze()
        settings = ModTrSettings.model_validate({"stream_learning_rate": 1e-2, **others})
        known = {
            name: modalities.begin(spots.translator_file(name, routed=routed), detector, settings) for name in names
        }
        engine = DetectionEngine(detector, known, settings, "0" * 16, streams_max=streams_max)
        return DetectionService(
            engine,
            spots.LABELS,
            Metrics("m", "r"),
            mode=mode,
            limits=Limits(image_pixels=1000, images_per_request=100),
            batch_rows_max=64,
            queue_rows=queue_rows,
            remembered=Remembered(remember, 10**6, age_max_s),
            pools=Pools(step_rows=4, step_wait_s=0.05, queue_rows=64),
            budget=1.0,
        )

    return make


def hold_lessons(
    service: DetectionService, learn: Callable[[Shown], Taught] | None = None
) -> tuple[threading.Event, threading.Event]:
    """From now on a lesson sets the first event, and waits for the second before it learns."""
    began, go_on = threading.Event(), threading.Event()
    then = learn or service.engine.boxes.learn

    def held(shown: Shown) -> Taught:
        began.set()
        assert go_on.wait(WAIT_S)
        return then(shown)

    service.engine.boxes.learn = held  # type: ignore[method-assign]
    return began, go_on


def play(service: DetectionService, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test while the service runs."""

    async def main() -> None:
        await service.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await test()
        finally:
            await service.stop()

    asyncio.run(main())


def value(service: DetectionService, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where there is none yet."""
    for family in text_string_to_metric_families(service.metrics_text()):
        for sample in family.samples:
            if sample.name == name and sample.labels == {"model": "m", "replica": "r", **labels}:
                return sample.value
    return 0.0


def boxes(*each: Sequence[float], labels: Sequence[Any] | None = None, **where: Any) -> Feedback:
    chosen = tuple(labels if labels is not None else ["red"] * len(each))
    place = {"id": None, "place": 0, "image": None, **where}
    return Feedback(np.array(each, dtype=np.float64).reshape(-1, 4), chosen, **place)


def spot(**where: Any) -> Feedback:
    return boxes([4, 2, 10, 8], **where)


def score(prediction: Prediction) -> float:
    assert prediction.detections is not None
    return float(prediction.detections[0].scores)


def everything(service: DetectionService, stream: str = "a") -> list[Tensor]:
    """Whatever feedback could change, as it is now."""
    engine = service.engine
    leaves = [leaf for _, leaf in tree.leaves(engine.streams.state(stream))]
    return [leaf.clone() for leaf in leaves] + [each.state.weights.clone() for each in engine.modalities.values()]


# -- predict ----------------------------------------------------------------------------------------------------------


def test_each_image_is_recognised_by_itself(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        found = await mine.predict([IR, RED, RED[:1]], "a", id="p")
        assert [(each.modality, each.decided) for each in found.routing] == [
            ("ir", "recognised"),
            ("rgb", "recognised"),
            ("ir", "recognised"),
        ]
        confidences = [each.confidence for each in found.routing]
        assert confidences == pytest.approx([0.993307, 1.0, 0.993307], abs=1e-4)
        assert found.sizes == ((12, 16),) * 3
        assert (found.adapted, found.version) == (True, "0")
        as_floats = await mine.predict([IR.float() / 255], "a", id="p")
        assert as_floats.routing[0].modality == "ir"

    play(mine, test)


def test_a_client_may_say_so(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        found = await mine.predict([IR, RED], "a", id="p", modality="ir")
        assert [tuple(each)[:3] for each in found.routing] == [("ir", "named", 1.0)] * 2
        grey = await mine.predict([IR], "a", id="q", modality="rgb")
        assert grey.routing[0].modality == "rgb"
        assert score(grey) == pytest.approx(200 / 255)
        assert value(mine, "tta_modality_images_total", modality="ir") == 2
        assert value(mine, "tta_modality_images_total", modality="rgb") == 1

    play(mine, test)


def test_a_router_that_is_unsure_leaves_the_image_alone(service: Make) -> None:
    mine = service("ir", router_confidence=0.995)

    async def test() -> None:
        found = await mine.predict([IR], "a", id="p")
        assert found.routing[0].modality == "rgb"
        assert found.routing[0].confidence == pytest.approx(1 - 0.993307, abs=1e-4)

    play(mine, test)


@pytest.mark.parametrize("names", [(), ("ir",)])
def test_without_routers_nothing_is_recognised(service: Make, names: tuple[str, ...]) -> None:
    mine = service(*names, routed=False)

    async def test() -> None:
        found = await mine.predict([IR], "a", id="p")
        assert tuple(found.routing[0])[:3] == ("rgb", "recognised", 1.0)

    play(mine, test)


def test_an_unknown_modality(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        with pytest.raises(
            InvalidInput, match=r"no translator for the modality 'uv'; there are rgb, ir \(leave it out"
        ):
            await mine.predict([IR], "a", id="p", modality="uv")
        assert mine.engine.streams.names() == []

    play(mine, test)


def test_requests_that_wait_together_are_answered_together(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        requests = [mine.predict([image], stream, id="p") for image, stream in ((IR, "a"), (RED, "b"), (IR, "c"))]
        answers = await asyncio.gather(*requests)
        assert [each.routing[0].modality for each in answers] == ["ir", "rgb", "ir"]
        assert value(mine, "tta_images_total") == 3

    play(mine, test)


def test_a_refused_request_leaves_no_stream(service: Make) -> None:
    mine = service("ir", queue_rows=2)

    async def test() -> None:
        with pytest.raises(Overloaded):
            await asyncio.gather(*(mine.predict([IR, IR], f"s{number}", id="p", modality="ir") for number in range(9)))
        while mine.waiting_rows:
            await asyncio.sleep(0)
        assert len(mine.engine.streams.names()) < 9

    play(mine, test)


# -- images -----------------------------------------------------------------------------------------------------------


def test_tensors_become_images(service: Make) -> None:
    mine = service()
    (image,) = mine.to_images(np.full((1, 1, 4, 5), 7, np.uint8))
    assert (image.shape, image.dtype) == ((1, 4, 5), torch.uint8)
    images = mine.to_images(np.full((2, 3, 4, 5), 0.5, np.float64))
    assert [(each.shape, each.dtype) for each in images] == [((3, 4, 5), torch.float32)] * 2


@pytest.mark.parametrize(
    ("shape", "kind", "said"),
    [
        ((3, 4, 4), InvalidInput, r"shape \[3, 4, 4\]; a detector reads \[n, 3, height, width\], or \[n, 1, height"),
        ((1, 2, 4, 4), InvalidInput, r"shape \[1, 2, 4, 4\]"),
        ((1, 4, 4, 4), InvalidInput, r"shape \[1, 4, 4, 4\]"),
        ((1, 4, 4, 3), InvalidInput, r"shape \[1, 4, 4, 3\]"),
        ((0, 3, 4, 4), InvalidInput, "no image"),
        ((101, 1, 4, 4), TooLarge, "101 images in one request; the limit is 100"),
        ((1, 3, 20, 51), TooLarge, r"51×20, 1020 pixels each; the limit is 1000 \(limits.image_pixels\)"),
    ],
)
def test_tensors_that_are_no_images(service: Make, shape: tuple[int, ...], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        service().to_images(np.zeros(shape, np.float32))


# -- feedback ---------------------------------------------------------------------------------------------------------


def test_feedback_is_in_effect_when_it_is_answered(service: Make) -> None:
    mine = service("ir", learns="stream")

    async def test() -> None:
        for number in range(3):
            before = await mine.predict([IR], "a", id="p")
            (done,) = await mine.teach([boxes(id="p")], "a", None)
            assert done.stream is not None
            assert done.stream.result == "applied"
            after = await mine.predict([IR], "a", id="q")
            assert (before.version, after.version) == (str(number), str(number + 1))
            assert score(after) < score(before)
        assert value(mine, "tta_steps_total", result="applied") == 3
        assert value(mine, "tta_learned_rows_total") == 3
        assert mine.pending_rows() == 0

    play(mine, test)


def test_feedback_with_the_picture(service: Make, picture: Callable[..., bytes]) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([RED], "a", id="p")
        grey = picture(spots.infrared()[..., 0])
        (done,) = await mine.teach([spot(image=grey)], "a", None)  # recognised
        assert done.modality is not None
        assert done.modality.applied
        (done,) = await mine.teach([spot(image=picture(spots.scene()))], "a", "ir")  # named
        assert done.modality is not None
        assert mine.engine.modalities["ir"].version == 2

    play(mine, test)


def test_the_same_feedback_again_changes_nothing(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([IR, IR], "a", id="p")
        assert (await mine.teach([spot(id="p")], "a", None))[0] != Taught(None, None)
        before = everything(mine)
        assert await mine.teach([spot(id="p"), boxes(id="p")], "a", None) == [Taught(None, None)] * 2
        assert all(map(torch.equal, everything(mine), before))
        (other,) = await mine.teach([spot(id="p", place=1)], "a", None)  # another image of it
        assert other.stream is not None
        assert mine.engine.streams.record("a").steps == 2

    play(mine, test)


def test_twice_in_one_request_is_once(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        done = await mine.teach([spot(id="p"), spot(id="p")], "a", None)
        assert done[1] == Taught(None, None)
        assert mine.engine.streams.record("a").steps == 1

    play(mine, test)


@pytest.mark.parametrize(
    ("item", "kind", "said"),
    [
        (spot(id="nobody"), NotFound, "no prediction 'nobody' of stream 'a' is remembered"),
        (spot(id="theirs"), NotFound, "no prediction 'theirs' of stream 'a' is remembered"),
        (spot(id="p", place=2), InvalidInput, "the index is 2, and that prediction has 2 images"),
        (spot(id="p", place=-1), InvalidInput, "the index is -1, and that prediction has 2 images"),
        (spot(id="p", place=1), InvalidInput, "this image is not translated .* name the modality if it is one of ir"),
        (spot(image=b"no picture"), InvalidInput, "10 bytes that are no JPEG, PNG, WEBP image"),
        (boxes([4, 2, 17, 8], id="p"), InvalidInput, "not within the image, 16×12 pixels"),
        (boxes([4, 2, 10, 8], id="p", labels=["pink"]), InvalidInput, "there is no class 'pink'"),
    ],
)
def test_wrong_feedback_changes_nothing_of_any_item(service: Make, item: Feedback, kind: Any, said: str) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([IR, RED], "a", id="p")
        await mine.predict([IR], "b", id="theirs")
        before, records = everything(mine), mine.engine.streams.record("a")
        with pytest.raises(kind, match=said):
            await mine.teach([spot(id="p"), item], "a", None)
        assert all(map(torch.equal, everything(mine), before))
        assert mine.engine.streams.record("a") == records
        assert mine.engine.modalities["ir"].version == 0
        (done,) = await mine.teach([spot(id="p")], "a", None)  # and the good one still counts as new
        assert done.stream is not None

    play(mine, test)


def test_feedback_for_a_stream_that_does_not_exist(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        with pytest.raises(NotFound, match="no stream named 'a'"):
            await mine.teach([spot(id="p")], "a", None)
        assert mine.engine.streams.names() == []

    play(mine, test)


def test_a_frozen_model_takes_none(service: Make) -> None:
    mine = service("ir", mode="frozen", learns="nothing")

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        with pytest.raises(InvalidInput, match="this model learns from no feedback"):
            await mine.teach([spot(id="p")], "a", None)
        assert mine._remembered.images == 0  # it would be for nothing

    play(mine, test)


def test_what_is_not_to_be_learned_from_is_not_remembered(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([IR], "a", id="p", adapt=False)
        with pytest.raises(NotFound, match="remembered"):
            await mine.teach([spot(id="p")], "a", None)

    play(mine, test)


@pytest.mark.parametrize("command", ["reset", "delete", "freeze", "resume"])
def test_commands_drop_what_is_remembered_of_a_stream(service: Make, command: str) -> None:
    mine = service("ir")

    async def test() -> None:
        for stream in "ab":
            await mine.predict([IR], stream, id="p")
        await getattr(mine, command)("a")
        assert mine._remembered.images == 1
        with pytest.raises(NotFound):
            await mine.teach([spot(id="p")], "a", None)
        assert (await mine.teach([spot(id="p")], "b", None))[0].stream is not None

    play(mine, test)


def test_a_lesson_that_waits_while_its_stream_is_reset_is_stale(service: Make) -> None:
    mine = service("ir")
    began, go_on = hold_lessons(mine)

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        lesson = asyncio.create_task(mine.teach([spot(id="p")], "a", None))
        assert await asyncio.to_thread(began.wait, WAIT_S)
        assert (mine.pending_rows(), mine.pending_rows("a"), mine.pending_rows("b")) == (1, 1, 0)
        assert (await mine.predict([IR], "b", id="q")).adapted  # nobody waits for a lesson
        await mine.reset("a")
        go_on.set()
        (done,) = await lesson
        assert done.stream is not None
        assert (done.stream.result, done.modality) == ("stale", None)
        assert mine.engine.modalities["ir"].version == 0
        assert value(mine, "tta_steps_total", result="stale") == 1

    play(mine, test)


def test_so_much_feedback_may_wait_and_no_more(service: Make) -> None:
    mine = service("ir", remember=2 * LESSONS_MAX)
    began, go_on = hold_lessons(mine, lambda _: Taught(None, None))

    async def test() -> None:
        await mine.predict([IR] * (LESSONS_MAX + 1), "a", id="p")
        items = [spot(id="p", place=place) for place in range(LESSONS_MAX)]
        waiting = asyncio.create_task(mine.teach(items, "a", None))
        assert await asyncio.to_thread(began.wait, WAIT_S)
        with pytest.raises(Overloaded, match=f"feedback for {LESSONS_MAX} images waits; the limit is {LESSONS_MAX}"):
            await mine.teach([spot(id="p", place=LESSONS_MAX)], "a", None)
        go_on.set()
        assert len(await waiting) == LESSONS_MAX
        assert mine.pending_rows() == 0

    play(mine, test)


def test_the_limit_counts_feedback_whose_pictures_are_still_decoded(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        file = io.BytesIO()
        Image.fromarray(spots.infrared()[..., 0]).save(file, "PNG")
        picture = file.getvalue()
        items = [spot(image=picture) for _ in range(40)]
        both = await asyncio.gather(*(mine.teach(items, "a", "ir") for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in both] == [list, Overloaded]
        assert mine.pending_rows() == 0

    play(mine, test)


def test_feedback_whose_client_has_left_is_learned_once(service: Make) -> None:
    mine = service("ir")
    began, go_on = hold_lessons(mine)

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        leaving = asyncio.create_task(mine.teach([spot(id="p")], "a", None))
        assert await asyncio.to_thread(began.wait, WAIT_S)
        leaving.cancel()
        await asyncio.wait([leaving])
        go_on.set()
        (again,) = await mine.teach([spot(id="p")], "a", None)
        assert again == Taught(None, None)  # repeated
        await asyncio.to_thread(mine._teacher.submit(lambda: None).result)  # the step of the one that left
        assert mine.engine.modalities["ir"].version == 1

    play(mine, test)


def test_feedback_that_taught_nothing_may_come_again(service: Make) -> None:
    mine = service("ir")

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        mine.engine.streams.freeze("a")
        (done,) = await mine.teach([spot(id="p")], "a", None)
        assert done.stream is not None
        assert done.stream.result == "frozen"
        assert value(mine, "tta_learned_rows_total") == 0
        assert value(mine, "tta_skipped_rows_total", reason="frozen") == 1
        mine.engine.streams.resume("a")
        (done,) = await mine.teach([spot(id="p")], "a", None)
        assert done.stream is not None
        assert done.stream.result == "applied"

    play(mine, test)


def test_what_is_answered_after_a_stream_was_deleted_is_not_remembered(service: Make) -> None:
    mine = service("ir")
    predict = mine.engine.predict

    def deleting(sights: Any) -> Any:
        found = predict(sights)
        mine.engine.streams.delete("a")
        return found

    mine.engine.predict = deleting  # type: ignore[method-assign]

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        assert mine._remembered.images == 0

    play(mine, test)


def test_what_is_too_old_is_not_remembered(service: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = service("ir", age_max_s=60)

    async def test() -> None:
        await mine.predict([IR], "a", id="p")
        now_s = time.monotonic()
        monkeypatch.setattr("tta_serve.detection_service.time.monotonic", lambda: now_s + 61)
        with pytest.raises(NotFound, match="remember_s"):
            await mine.teach([spot(id="p")], "a", None)
        monkeypatch.undo()

    play(mine, test)


def test_nothing_is_taken_before_it_runs_or_after(service: Make) -> None:
    mine = service("ir")

    async def refused() -> None:
        for call in (
            mine.teach([spot(id="p")], "a", None),
            mine.decode([b""]),
            mine.predict([IR], "a", id="p"),
            mine.predict([IR], "a", id="p", modality="ir"),
        ):
            with pytest.raises(Unavailable):
                await call

    asyncio.run(refused())
    assert not mine.ready

    async def test() -> None:
        assert mine.ready
        await mine.predict([IR], "a", id="p")

    play(mine, test)
    asyncio.run(refused())


def test_translators_are_described(service: Make) -> None:
    mine = service("ir", "uv")
    assert [(name, each["version"], each["recognised"]) for name, each in mine.translators().items()] == [
        ("ir", 0, True),
        ("uv", 0, True),
    ]
