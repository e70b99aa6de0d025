"""What the demo measures of each phase, and what it concludes from all of them."""

from dataclasses import dataclass

CLEAN_TOLERANCE = 0.02  # of accuracy: how far the adapting model may end below the frozen one on clean images


@dataclass(frozen=True)
class PhaseFigures:
    """What one phase came to, so far."""

    name: str
    shifted: bool
    draws: int  # images answered
    frozen_accuracy: float  # 0 … 1
    adapting_accuracy: float
    entropy: float | None  # mean of the last step's rows, nats; None where no step was taken
    selected_share: float | None  # of the rows that the learner saw, 0 … 1; None where it saw none
    steps: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float

    @property
    def good(self) -> bool:
        """Ahead of the frozen model where images are shifted, not far behind it where they are not."""
        if self.shifted:
            return self.adapting_accuracy > self.frozen_accuracy
        return self.adapting_accuracy >= self.frozen_accuracy - CLEAN_TOLERANCE


@dataclass(frozen=True)
class Summary:
    """All phases, in their order."""

    phases: tuple[PhaseFigures, ...]

    @property
    def passed(self) -> bool:
        """Whether the adapting model was ahead on every shift, and at most 2 points behind on the last clean phase."""
        return not self.failures

    @property
    def failures(self) -> tuple[PhaseFigures, ...]:
        """The phases that contradict the promise. (The first clean one promises nothing: nothing was learned yet.)"""
        return tuple(phase for i, phase in enumerate(self.phases) if i > 0 and not phase.good)

    def sentence(self) -> str:
        """What happened, in plain words."""
        shifted = [phase for phase in self.phases if phase.shifted]
        frozen = sum(phase.frozen_accuracy for phase in shifted) / len(shifted)
        adapting = sum(phase.adapting_accuracy for phase in shifted) / len(shifted)
        last = self.phases[-1]
        averages = (
            f"Over {len(shifted)} shifts the frozen model got {frozen:.1%} right and the adapting one {adapting:.1%}"
        )
        back = f"{last.adapting_accuracy:.1%} against {last.frozen_accuracy:.1%}"
        if self.passed:
            return (
                f"{averages}, ahead in each of them, without a single label; "
                f"back on clean images it has forgotten nothing that shows ({back})."
            )
        wrong = ", ".join(
            f"{p.name} ({p.adapting_accuracy:.1%} against {p.frozen_accuracy:.1%})" for p in self.failures
        )
        return f"{averages}, but it should have done better here: {wrong}."
