"""Breadth-first search over a model: every reachable state, the shortest path to a violation, and
the states from which no end can be reached once faults have stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.model.embedded import TERMINAL, Rules, State, Step, is_fault, steps

LIMIT = 2_000_000
"""A model that grows past this has a mistake."""


@dataclass
class Explored:
    """All reachable states and how each was first reached."""

    came_by: dict[State, tuple[State, str] | None]
    violations: list[tuple[State, str]] = field(default_factory=list)
    leads_to: dict[State, list[State]] = field(default_factory=dict)
    """Edges that are no faults, for the search of dead ends."""

    def path(self, state: State) -> list[str]:
        """The shortest way there."""
        names: list[str] = []
        link = self.came_by[state]
        while link is not None:
            state, name = link
            names.append(name)
            link = self.came_by[state]
        return names[::-1]

    def dead_ends(self) -> list[State]:
        """States from which no terminal phase is reached without a further fault."""
        before: dict[State, list[State]] = {}
        for state, nexts in self.leads_to.items():
            for following in nexts:
                before.setdefault(following, []).append(state)
        good = {state for state in self.came_by if state.phase in TERMINAL}
        queue = deque(good)
        while queue:
            for state in before.get(queue.popleft(), ()):
                if state not in good:
                    good.add(state)
                    queue.append(state)
        return [state for state in self.came_by if state not in good]


def explore(
    first: State,
    rules: Rules,
    violation: Callable[[State], str | None],
    *,
    allowed: Callable[[Step], bool] = lambda _: True,
    stop_at_first: bool = False,
) -> Explored:
    """Every state that can be reached by allowed steps."""
    found = Explored({first: None})
    queue = deque([first])
    while queue:
        state = queue.popleft()
        broken = violation(state)
        if broken is not None:
            found.violations.append((state, broken))
            if stop_at_first:
                return found
            continue
        edges = found.leads_to[state] = []
        for step in _allowed(state, rules, allowed):
            if not is_fault(step.name):
                edges.append(step.state)
            if step.state not in found.came_by:
                found.came_by[step.state] = (state, step.name)
                queue.append(step.state)
        assert len(found.came_by) < LIMIT, "the model does not end"
    return found


def _allowed(state: State, rules: Rules, allowed: Callable[[Step], bool]) -> Iterator[Step]:
    return (step for step in steps(state, rules) if allowed(step))
