"""What `tta-serve demo --detection` measures of each phase, and what it concludes from all of them."""

from dataclasses import dataclass

RGB_TOLERANCE = 0.02  # of AP50: how far answers to RGB may end below the frozen detector's, where some were mistaken


@dataclass(frozen=True)
class DetectionFigures:
    """What one phase came to, so far."""

    name: str
    infrared: bool  # whether there are infrared scenes in it
    draws: int  # scenes answered
    frozen_ap50: float  # 0 … 1; of the detector alone
    translated_ap50: float  # of the same detector behind the translators that the server chose
    recognised: int  # scenes whose modality the server recognised; it was never told
    images_per_s: float  # of one client that waits for each answer
    p50_ms: float
    p99_ms: float

    @property
    def good(self) -> bool:
        """Ahead of the detector alone where scenes are infrared, not far behind it where none is."""
        if self.infrared:
            return self.translated_ap50 > self.frozen_ap50
        return self.translated_ap50 >= self.frozen_ap50 - RGB_TOLERANCE


@dataclass(frozen=True)
class DetectionSummary:
    """All phases, in their order: first RGB, then infrared, last RGB again."""

    phases: tuple[DetectionFigures, ...]
    same_answers: int  # scenes that got the very answer in the last phase that they got in the first

    @property
    def passed(self) -> bool:
        """Whether the translator won wherever there was infrared, and cost at most 2 points of AP50 on RGB."""
        return not self.failures

    @property
    def failures(self) -> tuple[DetectionFigures, ...]:
        """The phases that contradict the promise."""
        return tuple(phase for phase in self.phases if not phase.good)

    def sentence(self) -> str:
        """What happened, in plain words."""
        rgb, infrared, *_, last = self.phases
        scenes, recognised = sum(phase.draws for phase in self.phases), sum(phase.recognised for phase in self.phases)
        told = (
            f"On infrared scenes the frozen detector alone has AP50 {infrared.frozen_ap50:.3f}, with its translator "
            f"{infrared.translated_ap50:.3f}; on RGB it has {rgb.frozen_ap50:.3f}. Nobody named a modality: the server "
            f"recognised {recognised:,} of {scenes:,}."
        )
        if self.passed:
            same = "all" if self.same_answers == last.draws else f"{self.same_answers:,} of"
            return f"{told} Back on RGB, {same} {last.draws:,} scenes got the very boxes that they got at first."
        wrong = ", ".join(f"{p.name} ({p.translated_ap50:.3f} against {p.frozen_ap50:.3f})" for p in self.failures)
        return f"{told} It should have done better here: {wrong}."
