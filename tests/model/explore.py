"""Breadth-first search over a model: every reachable state, the shortest path to a violation, and
the states from which no end can be reached once faults have stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

LIMIT = 2_000_000
"""A model that grows past this has a mistake."""


TERMINAL = frozenset({"succeeded", "rolled_back", "cancelled", "guest_lost"})


class Modelled(Protocol):
    """A state of a model: hashable, with the phase of the migration."""

    @property
    def phase(self) -> str: ...

    def __hash__(self) -> int: ...


S = TypeVar("S", bound=Modelled)
S_co = TypeVar("S_co", bound=Modelled, covariant=True)


class Stepped(Protocol[S_co]):
    """One thing that happens; `fault: ...` are those that nobody needs."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> S_co: ...


@dataclass
class Explored(Generic[S]):
    """All reachable states and how each was first reached."""

    came_by: dict[S, tuple[S, str] | None]
    violations: list[tuple[S, str]] = field(default_factory=list)
    leads_to: dict[S, list[S]] = field(default_factory=dict)
    """Edges that are no faults, for the search of dead ends."""

    def path(self, state: S) -> list[str]:
        """The shortest way there."""
        names: list[str] = []
        link = self.came_by[state]
        while link is not None:
            state, name = link
            names.append(name)
            link = self.came_by[state]
        return names[::-1]

    def story(self) -> str:
        """The first violation, for whoever has to understand it."""
        if not self.violations:
            return "no violation"
        state, broken = self.violations[0]
        return "\n  ".join([broken, *self.path(state)])

    def dead_ends(self) -> list[S]:
        """States from which no terminal phase is reached without a further fault."""
        before: dict[S, list[S]] = {}
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
    first: S,
    steps: Callable[[S], Iterable[Stepped[S]]],
    violation: Callable[[S], str | None],
    *,
    stop_at_first: bool = False,
) -> Explored[S]:
    """Every state that can be reached."""
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
        for step in steps(state):
            if not step.name.startswith("fault:"):
                edges.append(step.state)
            if step.state not in found.came_by:
                found.came_by[step.state] = (state, step.name)
                queue.append(step.state)
        assert len(found.came_by) < LIMIT, "the model does not end"
    return found
