"""What one label does at once, and what forgetting takes back, over HTTP, on a stream that was taught all."""

import time

import numpy as np

from loadtests.incremental_images import Labels
from loadtests.incremental_play import Served

LIMIT_S = 0.005  # of server time for one label
NEW_CLASS = "a class of one image"


def single_labels(learner: Served, count: int) -> dict[str, float]:
    """Teach images one at a time, see that the very next request is answered with each, and have all forgotten.

    The first is of a class that there was not. The stream ends as it began.

    Args:
        learner: that was taught.
        count: of images, from the rest; 2 or more.

    Returns:
        `next_request`: the share of labels that the next request was answered with. `teach_ms`: mean time in the
        server's stage `teach`: encoding, log on disk, learning, reading. `teach_within_limit`: the share that took at
        most `LIMIT_S`. `feedback_ms_p50`, `feedback_ms_p99`: of the whole request, as the client sees it.
        `forget_ids_verified`: 1 where the server found the state equal to one that never saw these labels.
    """
    client, stream, rest = learner.client, learner.stream, learner.material.rest
    version = client.reads(rest.images[0], stream=stream).version
    ids, took_s, in_effect = [], [], 0
    before = client.stage("teach")
    for place in range(count):
        image, name = rest.images[place], NEW_CLASS if place == 0 else learner.material.names[rest.labels[place]]
        ids.append(f"single-{place}")
        client.infer(image[np.newaxis], stream=stream, id=ids[-1])
        began_s = time.perf_counter()
        client.teach(ids[-1], [name], stream=stream)
        took_s.append(time.perf_counter() - began_s)
        now = client.reads(image, stream=stream)
        in_effect += now.version > version and name in now.added
        version = now.version
    stage = client.stage("teach").since(before)
    receipt = client.forget(stream, ids=ids)
    return {
        "next_request": in_effect / count,
        "teach_ms": 1000 * stage.seconds / stage.runs,
        "teach_within_limit": stage.within[LIMIT_S] / stage.runs,
        "feedback_ms_p50": 1000 * float(np.quantile(took_s, 0.5)),
        "feedback_ms_p99": 1000 * float(np.quantile(took_s, 0.99)),
        "forget_ids_verified": float(receipt.verified and receipt.removed == count),
    }


def forgotten_class(learner: Served, number: int, answers: Labels) -> dict[str, float]:
    """Have one class forgotten, and ask the test again.

    Args:
        learner: that was taught.
        number: of the class.
        answers: to the test before.

    Returns:
        `forget_recall_before`, `forget_recall_after`: of the class, in %. `forget_others_change`: of the others'
        accuracy, in points; `forget_others_lost`: the part of it that was right before and is wrong now.
        `forget_verified`: 1 where the server found the state equal to one that never saw the class. `forget_removed`:
        labels.
    """
    receipt = learner.client.forget(learner.stream, label=learner.material.names[number])
    labels = learner.material.test.labels
    after = learner.answer(np.arange(len(labels)))
    was_right, is_right = answers == labels, after == labels
    its, others = labels == number, labels != number
    return {
        "forget_recall_before": 100 * float(was_right[its].mean()),
        "forget_recall_after": 100 * float(is_right[its].mean()),
        "forget_others_change": 100 * float(is_right[others].mean() - was_right[others].mean()),
        "forget_others_lost": 100 * float((was_right & ~is_right)[others].mean()),
        "forget_verified": float(receipt.verified),
        "forget_removed": float(receipt.removed),
    }
