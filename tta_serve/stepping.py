"""Around a step, whatever takes it: which lessons still count, what the guards want done, and publishing."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adapters import Groups, Moments, PipelineState, Report, optim, tree
from tta_serve.judging import Learned, counts_of, judge
from tta_serve.lessons import L, Observed
from tta_serve.monitor import Forgotten
from tta_serve.states import TEACHING_MAX, Held, States
from tta_serve.streams import Action, StreamRecord


def live_of(streams: States, lessons: Sequence[L]) -> tuple[dict[str, list[L]], list[Learned]]:
    """The lessons that can teach, by stream, and what is said of the others."""
    live: dict[str, list[L]] = {}
    done: list[Learned] = []
    records = {stream: streams.alive(stream) for stream in {lesson.stream for lesson in lessons}}
    for lesson in lessons:
        record = records[lesson.stream]
        if record is None or record.incarnation != lesson.incarnation:
            done.append(Learned(lesson.stream, lesson.rows, 0, 0.0, "stale"))
        elif record.frozen:
            done.append(Learned(lesson.stream, lesson.rows, 0, 0.0, "frozen"))
        else:
            live.setdefault(lesson.stream, []).append(lesson)
    return live, done


def absorb(
    streams: States,
    observed: Sequence[Observed],
    take: Callable[[PipelineState, Tensor, Groups, Moments], PipelineState],
    device: torch.device,
) -> None:
    """Take moments into the statistics of their streams; what is stale or of a frozen stream is left alone.

    Args:
        streams: whose states.
        observed: the moments.
        take: see `Pipeline.absorb`.
        device: where states are.
    """
    live, _ = live_of(streams, observed)
    lives = [(stream, given[0].incarnation) for stream, given in live.items()]
    for first in range(0, len(lives), TEACHING_MAX):
        with streams.teaching(lives[first : first + TEACHING_MAX]) as held:
            if not held.streams:
                continue
            given = [each for stream in held.streams for each in live[stream]]
            numbers = {stream: i for i, stream in enumerate(held.streams)}
            rows = torch.tensor([numbers[each.stream] for each in given]).to(device)
            groups = Groups.of(tuple(each.rows for each in given), device)
            moments = tree.apply(lambda *parts: torch.cat(parts), *(each.moments for each in given))
            new = take(streams.read(held.rows), rows, groups, moments)
            streams.publish(held, [record._replace(version=record.version + 1) for record in held.records], new)


def settle(
    streams: States,
    held: Held,
    old: PipelineState,
    new: PipelineState,
    report: Report,
    lost: Mapping[int, Forgotten],
    pull: Callable[[PipelineState, Tensor], PipelineState],
    is_good: Callable[[StreamRecord], bool],
) -> list[Learned]:
    """Judge a step, do what the guards want, and publish what is left of it.

    Args:
        streams: whose states.
        held: the streams that were taught.
        old: their states before the step, stacked.
        new: after it.
        report: of the step.
        lost: what the streams forgot that were probed, by their place among those held.
        pull: moves states toward the source where a mask [S] is true.
        is_good: whether a step that was applied, and its guards let pass, makes a version to roll back to.
    """
    counts = counts_of(report)
    records, judged, actions = judge(held.streams, held.records, counts, report.entropy.tolist(), lost)
    if "pull" in actions:
        new = pull(new, _where(actions, report, "pull"))
    if "roll_back" in actions or "freeze" in actions:
        # what a guard condemned answers nobody, not even until it is rolled back
        new = tree.where(_where(actions, report, "roll_back", "freeze"), old, new)
    out = streams.publish(held, records, new)
    for i, (stream, record, action) in enumerate(zip(held.streams, records, actions, strict=True)):
        if action:
            streams.act(stream, record, action)
        elif out[i] and judged[i].result == "applied" and is_good(record):
            streams.keep_good(stream, record, tree.row(optim.rest(new), i))
    return [
        learned if is_out else learned._replace(selected=0, result="stale")
        for learned, is_out in zip(judged, out, strict=True)
    ]


def _where(actions: Sequence[Action | None], report: Report, *wanted: Action) -> Tensor:
    """Which streams one of these actions is for, bool [S]."""
    return torch.tensor([action in wanted for action in actions], device=report.seen.device)
