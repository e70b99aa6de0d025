"""Labels to a classifier over HTTP, and what it says of them. `docs/http.md` describes the routes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from loadtests.client import Client, encode
from loadtests.errors import RequestFailed

TIMEOUT_S = 600.0  # forgetting replays all labels where a head cannot subtract
STAGES = "tta_stage_seconds"


class Reads(NamedTuple):
    """What answers a stream."""

    version: int  # of what labels have taught; 0: nothing
    added: tuple[str, ...]  # names of the classes behind the model's own


class Receipt(NamedTuple):
    """What forgetting did."""

    removed: int
    verified: bool
    state_before: str  # digests
    state_after: str


class Stage(NamedTuple):
    """How often a stage of a request ran since the server started, and how long."""

    runs: float
    seconds: float
    within: Mapping[float, float]  # seconds → how many took no longer

    def since(self, before: "Stage") -> "Stage":
        """What came after."""
        within = {bound: number - before.within.get(bound, 0) for bound, number in self.within.items()}
        return Stage(self.runs - before.runs, self.seconds - before.seconds, within)


class LabelClient(Client):
    """One classifier of one server that learns from labels."""

    def __init__(self, url: str, model: str, **options: Any) -> None:
        super().__init__(url, model, timeout_s=TIMEOUT_S, **options)

    @property
    def _path(self) -> str:
        return f"/v2/models/{quote(self.model, safe='')}"

    def side(self) -> int:
        """Height of the images that the model reads."""
        return int(self._get(self._path)["inputs"][0]["shape"][2])

    def names(self, stream: str) -> tuple[str, ...]:
        """The classes that this stream can be answered with, by index."""
        return tuple(self._get(f"{self._path}?stream={quote(stream, safe='')}")["parameters"]["labels"])

    def reads(self, image: NDArray[np.uint8], *, stream: str) -> Reads:
        """What answers one image [3, H, W] of the stream now."""
        request = encode(image[np.newaxis], stream=stream, adapt=False, outputs=("labels",))
        response = self._call("POST", self.infer_path, headers=request.headers, content=request.body)
        parameters = response.json()["parameters"]
        return Reads(int(parameters.get("head_version", 0)), tuple(parameters.get("added_labels", ())))

    def teach(self, id: str, labels: Sequence[str], *, stream: str) -> int:
        """Say what is in the images of an earlier prediction.

        Args:
            id: of the prediction.
            labels: of each of its images.
            stream: whose it was, and that learns.

        Returns:
            How many the prediction had right.

        Raises:
            RequestFailed: not every label was learned.
        """
        items = [{"id": id, "index": place, "label": label} for place, label in enumerate(labels)]
        results = self._post(f"{self._path}/feedback", {"stream": stream, "items": items})["results"]
        if [result["result"] for result in results] != ["applied"] * len(labels):
            told = ", ".join(sorted({result["result"] for result in results}))
            raise RequestFailed(f"{self.model}: not every label of the prediction {id!r} was learned: {told}")
        return sum(result["right"] is True for result in results)

    def forget(self, stream: str, *, label: str | None = None, ids: Sequence[str] | None = None) -> Receipt:
        """Have the effect of a class's labels taken out, or of those of some predictions."""
        asked = {"stream": stream} | ({"label": label} if ids is None else {"ids": list(ids)})
        told = self._post(f"{self._path}/forget", asked)
        return Receipt(told["removed"], told["verified"], told["state_before"], told["state_after"])

    def stage(self, name: str) -> Stage:
        """How long a stage of this model's requests took, from `/metrics`."""
        text = self._call("GET", "/metrics").text
        runs, seconds, within = 0.0, 0.0, dict[float, float]()
        samples = [
            s for family in text_string_to_metric_families(text) if family.name == STAGES for s in family.samples
        ]
        for sample in samples:
            if sample.labels["model"] != self.model or sample.labels["stage"] != name:
                continue
            if sample.name == f"{STAGES}_count":
                runs += sample.value
            elif sample.name == f"{STAGES}_sum":
                seconds += sample.value
            elif sample.name == f"{STAGES}_bucket":
                bound = float(sample.labels["le"])
                within[bound] = within.get(bound, 0.0) + sample.value
        return Stage(runs, seconds, within)

    def _get(self, path: str) -> Any:
        return self._call("GET", path).json()

    def _post(self, path: str, asked: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._call("POST", path, headers=headers, content=json.dumps(asked).encode()).json()
