"""Stop strings, found in a text that comes in pieces."""

from functools import lru_cache


class StopAutomaton:
    """Aho-Corasick over stop strings: one step a character, whatever the strings are.

    A state stands for the longest suffix of the text that begins a stop string; ``depth`` is its
    length, which is exactly what must be held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._matched: list[str | None] = [None]
        self.depth = [0]
        for stop in stops:
            self._insert(stop)
        # Breadth first: a state's fallback is shallower than the state.
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                self._fail[child], _ = self.step(self._fail[state], char)
                self._matched[child] = self._matched[child] or self._matched[self._fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> tuple[int, str | None]:
        """The state behind ``char``, and the longest stop string that ends there."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        state = self._next[state].get(char, 0)
        return state, self._matched[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._matched.append(None)
                self.depth.append(self.depth[state] + 1)
            state = self._next[state][char]
        self._matched[state] = stop


@lru_cache(maxsize=256)
def stop_automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """Shared by all streams that have the same ones."""
    return StopAutomaton(stops)
