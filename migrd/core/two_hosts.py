"""Two plans of one VM, here and there: may it go, and could it come back?

Both are made by `tracking.decide`, each from its own host's facts, with the same QEMU ids. A VM
must not arrive where it would be less migratable without someone having agreed.
"""

from dataclasses import dataclass

from migrd.core.tracking import Plan, Reason


@dataclass(frozen=True)
class DestinationJudgement:
    """All refusals and warnings at once."""

    refusals: tuple[Reason, ...]
    warnings: tuple[Reason, ...]

    @property
    def passed(self) -> bool:
        return not self.refusals


def judge_destination(
    source_plan: Plan,
    destination_plan: Plan,
    downtime_limit_s: float | None,
    *,
    accept_lower: bool = False,
) -> DestinationJudgement:
    """`accept_lower`: someone has agreed that it may be less migratable there."""
    raise NotImplementedError
