"""stand-in"""


class StopStrings:
    def __init__(self, stops, include):
        self._stops, self._include, self._held, self.found = stops, include, "", None

    def push(self, text):
        if self.found is not None:
            return ""
        held = self._held + text
        hits = [(held.find(s), s) for s in self._stops if s in held]
        if hits:
            at, self.found = min(hits)
            self._held = ""
            return held[: at + (len(self.found) if self._include else 0)]
        keep = max(
            (n for s in self._stops for n in range(len(s)) if n and held.endswith(s[:n])), default=0
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self):
        held, self._held = self._held, ""
        return held
