"""Texts that end a sequence, looked for in text that comes piece by piece.

The first stop text to be complete ends the sequence; where several become complete with the same
character, the longest of them. So the result does not depend on where pieces end. Characters are
compared as code points: nothing is normalised.

All texts are looked for at once (Aho and Corasick 1975, "Efficient string matching"): time grows
with the text alone, whatever the number of stop texts.
"""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Stop texts made ready to be looked for; continuations of a request share one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop text, which would end everything at once."""
        if "" in stops:
            raise ValueError("a stop text is empty; give one of 1 character or more")
        self.starts = frozenset(stop[0] for stop in stops)
        self._next: list[dict[str, int]] = [{}]
        self.depths = [0]
        """Characters that each state stands for: the longest end of the text that begins a stop."""
        self.longest = [0]
        """Length of the longest stop text that ends in each state; 0 where none does."""
        self._shorter = [0]
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state behind one more character."""
        while (found := self._next[state].get(character)) is None:
            if not state:
                return 0
            state = self._shorter[state]
        return found

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depths.append(self.depths[state] + 1)
                self.longest.append(0)
                self._shorter.append(0)
            state = self._next[state][character]
        self.longest[state] = len(stop)

    def _link(self) -> None:
        """Point every state to the longest shorter one that ends the same text."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            shorter = self._shorter[state]
            self.longest[state] = self.longest[state] or self.longest[shorter]
            for character, found in self._next[state].items():
                self._shorter[found] = self.step(shorter, character)
                waiting.append(found)


class StopMatcher:
    """Passes the text of one sequence on, up to a stop text; holds back what may become one."""

    def __init__(self, stops: StopStrings, include_stop: bool = False) -> None:
        """`include_stop` keeps the stop text at the end of what is passed on."""
        self._stops = stops
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop text that ended the sequence."""

    def push(self, text: str, may_end: bool = True) -> str:
        """What is certain now that `text` has come; nothing once a stop text was found. A stop
        text that becomes complete while the sequence may not end yet does not count; one that
        only begins there does.
        """
        if self.matched is not None:
            return ""
        if not self._state and self._stops.starts.isdisjoint(text):
            return text
        whole, num_before = self._held + text, len(self._held)
        state, step, longest = self._state, self._stops.step, self._stops.longest
        for place, character in enumerate(text, num_before + 1):
            state = step(state, character)
            if longest[state] and may_end:
                return self._end(whole[:place], longest[state])
        self._state = state
        certain = len(whole) - self._stops.depths[state]
        self._held = whole[certain:]
        return whole[:certain]

    def finish(self) -> str:
        """What was held back, when the sequence ends otherwise."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _end(self, text: str, length: int) -> str:
        self.matched, self._held = text[-length:], ""
        return text if self._include_stop else text[:-length]
