import re
from collections.abc import Callable

import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from tta_serve.metrics import TABLE, Metrics, merge

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family is described twice"
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(text: str, name: str, **labels: str) -> float:
    return read(text)[name, frozenset(labels.items())]


@pytest.fixture
def metrics() -> Callable[..., Metrics]:
    return lambda replica="r1", model="m": Metrics(model, replica)


def test_names_say_what_and_in_which_unit() -> None:
    for name, kind, labels, text in TABLE:
        assert re.fullmatch(r"tta_[a-z_]+", name)
        assert name.endswith("_total") == (kind is Counter), name
        if kind is Histogram:
            assert name.endswith(("_seconds", "_rows", "_streams")), name
        if kind is Gauge:
            is_flag = text.endswith(": 1 or 0.")
            assert is_flag or name.endswith(("_rows", "_streams", "_bytes", "_nats", "_seconds")), name
        assert not {"model", "replica"} & set(labels)
        assert text.endswith(".")


def test_names_differ() -> None:
    assert len({row[0] for row in TABLE}) == len(TABLE)


def test_every_series_carries_model_and_replica(metrics: Callable[..., Metrics]) -> None:
    mine = metrics("r7", "m7")
    mine.count("tta_requests_total", outcome="ok")
    mine.count("tta_images_total", 3)
    mine.set("tta_streams", 2)
    mine.observe("tta_stage_seconds", 0.004, stage="predict")
    own = {"model": "m7", "replica": "r7"}
    text = mine.text()
    assert value(text, "tta_requests_total", outcome="ok", **own) == 1
    assert value(text, "tta_images_total", **own) == 3
    assert value(text, "tta_streams", **own) == 2
    assert value(text, "tta_stage_seconds_count", stage="predict", **own) == 1
    assert value(text, "tta_stage_seconds_bucket", stage="predict", le="0.002", **own) == 0
    assert value(text, "tta_stage_seconds_bucket", stage="predict", le="0.005", **own) == 1


def test_counters_add_up_and_gauges_do_not(metrics: Callable[..., Metrics]) -> None:
    mine = metrics()
    own = {"model": "m", "replica": "r1"}
    for amount in (2, 5):
        mine.count("tta_images_total", amount)
        mine.set("tta_pending_rows", amount)
    assert value(mine.text(), "tta_images_total", **own) == 7
    assert value(mine.text(), "tta_pending_rows", **own) == 5


def test_rows_and_seconds_have_buckets_of_their_own(metrics: Callable[..., Metrics]) -> None:
    mine = metrics()
    mine.observe("tta_batch_rows", 64)
    own = {"model": "m", "replica": "r1"}
    assert value(mine.text(), "tta_batch_rows_bucket", le="32.0", **own) == 0
    assert value(mine.text(), "tta_batch_rows_bucket", le="64.0", **own) == 1


def test_two_replicas_in_one_process_do_not_meet(metrics: Callable[..., Metrics]) -> None:
    one, two = metrics("r1"), metrics("r2")
    one.count("tta_images_total")
    assert "r1" in one.text()
    assert "r1" not in two.text()


def test_no_series_tells_when_it_was_created(metrics: Callable[..., Metrics]) -> None:
    mine = metrics()
    mine.count("tta_images_total")
    assert "_created" not in mine.text()


def test_unknown_names_and_labels_raise(metrics: Callable[..., Metrics]) -> None:
    mine = metrics()
    with pytest.raises(KeyError):
        mine.count("tta_nothing_total")
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        mine.count("tta_requests_total", colour="red")
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        mine.count("tta_requests_total")
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        mine.observe("tta_stage_seconds", 1.0)


def test_a_metric_is_used_as_what_it_is(metrics: Callable[..., Metrics]) -> None:
    mine = metrics()
    with pytest.raises(AssertionError):
        mine.count("tta_streams")
    with pytest.raises(AssertionError):
        mine.set("tta_images_total", 1)
    with pytest.raises(AssertionError):
        mine.observe("tta_images_total", 1)


def test_merge_keeps_the_series_of_all_replicas(metrics: Callable[..., Metrics]) -> None:
    one, two = metrics("r1"), metrics("r2", "other")
    one.count("tta_images_total", 3)
    two.count("tta_images_total", 4)
    two.count("tta_requests_total", outcome="invalid")
    for each in (one, two):
        each.observe("tta_stage_seconds", 0.3, stage="learn")
    merged = merge([one.text(), two.text()])
    assert value(merged, "tta_images_total", model="m", replica="r1") == 3
    assert value(merged, "tta_images_total", model="other", replica="r2") == 4
    assert read(merged) == {**read(one.text()), **read(two.text())}
    assert merged.count("# TYPE tta_images_total ") == 1
    assert merged.count("# TYPE tta_stage_seconds histogram") == 1


def test_merge_of_one_or_none(metrics: Callable[..., Metrics]) -> None:
    mine = metrics()
    mine.count("tta_images_total")
    assert read(merge([mine.text()])) == read(mine.text())
    assert merge([]) == ""


def test_merge_keeps_odd_label_values() -> None:
    text = '# HELP a_total Odd.\n# TYPE a_total counter\na_total{x="b\\"c\\\\d\\ne"} 2.0\n'
    assert read(merge([text])) == {("a_total", frozenset({("x", 'b"c\\d\ne')})): 2.0}
