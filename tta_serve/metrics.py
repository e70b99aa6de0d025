"""One table of metrics: name, type, labels, help. Every series of a replica carries its `model` and `replica`."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each series, which nothing here reads

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# name, type, labels beside model and replica, help
TABLE: tuple[tuple[str, type[Counter] | type[Gauge] | type[Histogram], tuple[str, ...], str], ...] = (
    (
        "tta_requests_total",
        Counter,
        ("outcome",),
        "Requests for a prediction, by outcome: ok, invalid, refused, failed, gone.",
    ),
    ("tta_images_total", Counter, (), "Images answered."),
    ("tta_modality_images_total", Counter, ("modality",), "Images answered, by the translator used; rgb: none."),
    (
        "tta_stage_seconds",
        Histogram,
        ("stage",),
        "Time in a stage: decode, route, queue, predict, learn, teach, forget.",
    ),
    ("tta_batch_rows", Histogram, (), "Rows of one forward."),
    ("tta_batch_streams", Histogram, (), "Streams in one forward."),
    (
        "tta_steps_total",
        Counter,
        ("result",),
        "Learning steps, by result: applied, filtered, refused, stale, frozen, gated.",
    ),
    ("tta_guard_trips_total", Counter, ("guard",), "Trips of guards, by guard."),
    ("tta_learned_rows_total", Counter, (), "Rows given to the adapter."),
    ("tta_selected_rows_total", Counter, (), "Rows that the adapter learned from."),
    (
        "tta_skipped_rows_total",
        Counter,
        ("reason",),
        "Rows not learned from, by reason: queue_full, forgotten, failed, off, frozen, stale, gated, unknown.",
    ),
    ("tta_labels_total", Counter, ("result",), "Labels told, by result: applied, repeated, frozen, stale."),
    (
        "tta_prequential_labels_total",
        Counter,
        ("right",),
        "Labels learned, by whether the prediction before said so: true, false. The share of true: online accuracy.",
    ),
    ("tta_forgotten_labels_total", Counter, (), "Labels taken out of heads on request."),
    ("tta_entropy_nats", Gauge, (), "Mean entropy of the rows last learned from."),
    ("tta_waiting_rows", Gauge, (), "Rows waiting for a forward."),
    ("tta_pending_rows", Gauge, (), "Rows waiting to be learned from."),
    ("tta_streams", Gauge, (), "Streams in this replica's memory."),
    ("tta_store_ok", Gauge, (), "Whether what is learned can be saved: 1 or 0."),
    ("tta_cut_off", Gauge, (), "Whether the store could not be reached for longer than the lease: 1 or 0."),
    ("tta_snapshot_lag_seconds", Gauge, (), "Time since all that was learned before was in the store."),
    ("tta_sync_seconds", Histogram, (), "Time that a sync with the store took."),
    ("tta_store_failures_total", Counter, (), "Attempts to reach the store that failed."),
    ("tta_snapshots_refused_total", Counter, (), "Snapshots that were not what was written, or belonged elsewhere."),
    ("tta_state_bytes", Gauge, (), "Bytes of all resident states."),
)


class Metrics:
    """The metrics of one replica, in a registry of its own.

    Args:
        model: the model's name.
        replica: the replica's id.
    """

    def __init__(self, model: str, replica: str) -> None:
        self.replica = replica
        self._registry = CollectorRegistry()
        self._own = {"model": model, "replica": replica}
        self._children: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}
        self._by_name: dict[str, Counter | Gauge | Histogram] = {}
        for name, kind, labels, text in TABLE:
            all_labels = ("model", "replica", *labels)
            if kind is Histogram:
                buckets = _SECONDS if name.endswith("_seconds") else _ROWS
                self._by_name[name] = Histogram(name, text, all_labels, registry=self._registry, buckets=buckets)
            else:
                self._by_name[name] = kind(name, text, all_labels, registry=self._registry)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        metric = self._child(name, labels)
        assert isinstance(metric, Counter)
        metric.inc(amount)

    def set(self, name: str, value: float) -> None:
        metric = self._child(name, {})
        assert isinstance(metric, Gauge)
        metric.set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        metric = self._child(name, labels)
        assert isinstance(metric, Histogram)
        metric.observe(value)

    def _child(self, name: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        key = (name, *labels.values())  # the names of the labels are the caller's, and the same at every call
        if key not in self._children:
            self._children[key] = self._by_name[name].labels(**self._own, **labels)
        return self._children[key]

    def text(self) -> str:
        """The Prometheus exposition of this replica."""
        return generate_latest(self._registry).decode()


def merge(texts: Iterable[str]) -> str:
    """Join the expositions of several replicas: every family is described once, as the format demands."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            if family.name in families:
                families[family.name].samples.extend(family.samples)
            else:
                families[family.name] = family

    class Joined:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Joined())
    return generate_latest(registry).decode()
