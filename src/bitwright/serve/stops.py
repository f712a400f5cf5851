"""StopFilter: a text that grows is passed on but for what may be the beginning of a stop string."""

from collections.abc import Sequence

from bitwright.serve.job import Likely, Piece


class StopFilter:
    """Text and its tokens come in, and go out as soon as no stop string can begin in them any more.

    done: whether a stop string was found: the text ends before it, and so do the tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.done = tuple(stops), "", False
        self.tokens: list[tuple[int, Likely]] = []  # tokens not passed on, and where in `held` their text begins

    def push(self, text: str, token: Likely | None = None) -> Piece | None:
        """Add a token and the text it completes; what can be passed on, or None."""
        if token is not None:
            self.tokens.append((len(self.held), token))
        self.held += text
        places = [place for place in (self.held.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.done = True
            return self._cut(min(places))
        return self._cut(len(self.held) - self._unsure())

    def rest(self) -> Piece | None:
        """All that is left at the end."""
        return self._cut(len(self.held), last=True)

    def _unsure(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self.stops), default=0)
        for length in range(min(longest - 1, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stops):
                return length
        return 0

    def _cut(self, end: int, *, last: bool = False) -> Piece | None:
        """Pass on the text up to a place, and the tokens that begin before it; the last time those behind it too."""
        text, self.held = self.held[:end], self.held[end:]
        out = tuple(token for begin, token in self.tokens if begin < end or (last and begin <= end))
        self.tokens = [(begin - end, token) for begin, token in self.tokens[len(out) :]]
        return Piece(text, out) if text or out else None
