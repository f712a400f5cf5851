"""n-gram look-ahead: what followed the last tokens earlier in the text is tried as what follows them now.

A decoder reads several tokens for little more than the time of one, since it reads every weight once. So tokens are proposed
without a second model (prompt lookup decoding; speculation in general: Leviathan et al. 2022, arXiv:2211.17192), read together,
and each is kept as long as it is the very token that sampling chooses there. What is generated is therefore what would have
been generated one by one, whatever the temperature.
"""

LENGTHS = (3, 2)  # n-grams looked up, the longest first
REST = 16  # tokens without a proposal after one that took longer than what it gave; four times as many after each further one
LONGEST_REST = 1024
SMOOTH = 0.2  # weight of the newest time among those of reading one token


class NgramIndex:
    """The tokens of a sequence, and where each of their n-grams last ended.

    most: tokens proposed at a time at most; 0: never any. Proposals grow while they are kept, and rest while reading them takes
    longer than reading what was kept one by one would have.
    """

    def __init__(self, most: int) -> None:
        self.most, self.reach, self.rest, self.waiting = most, min(2, most), REST, 0
        self.alone: float | None = None  # seconds of a reading without a proposal
        self.ids: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind it, the last but for the sequence's end

    def extend(self, ids: list[int]) -> None:
        """Add tokens at the end."""
        for token in ids if self.most else ():
            for n in LENGTHS:
                if len(self.ids) >= n:
                    self.ends[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next: those behind the last place where the sequence's last tokens stand too."""
        wanted = min(most, self.reach)
        if self.waiting > 0:
            self.waiting -= 1
            return []
        found = (self.ends.get(tuple(self.ids[-n:])) for n in LENGTHS if len(self.ids) > n)
        place = next((end for end in found if end is not None), None)
        return [] if place is None or wanted < 1 else self.ids[place : place + wanted]

    def judged(self, proposed: int, kept: int, seconds: float) -> None:
        """Learn how many of the proposed tokens were kept, and how long the reading took."""
        if not proposed:
            self.alone = seconds if self.alone is None else self.alone + SMOOTH * (seconds - self.alone)
        elif kept == 0 or (self.alone is not None and (kept + 1) * self.alone < seconds):
            self.reach = max(min(2, self.most), self.reach // 2)
            self.waiting, self.rest = self.rest, min(LONGEST_REST, 4 * self.rest)
        elif kept == proposed:
            self.reach, self.rest = min(self.most, 2 * self.reach), REST
