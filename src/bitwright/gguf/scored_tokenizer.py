"""sentencepiece's BPE, llama.cpp's family "llama": tokens with scores instead of merges.

Of all neighbours that make a token together, those are joined first whose token has the highest score, the leftmost of equal
ones. The tokenizers package ranks pairs instead, each with a rank of its own. Where no two tokens tie, pairs in the order of
scores do the same (`ranked_pairs`). Where some tie, or a token is made of a character that is none, texts are cut by
`ByScore` before the package sees them. Source: llama-vocab.cpp (llm_tokenizer_spm_session).
"""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

import numpy as np
from tokenizers import NormalizedString, PreTokenizedString

from bitwright.errors import CheckpointError
from bitwright.gguf.special_tokens import FOUND, id_of
from bitwright.gguf.unigram_tokenizer import SPACE, Keys

CUT = "cut"  # in a model's content: what cuts texts into whole tokens, such as `ByScore`; not of tokenizer.json


class ByScore:
    """A pre-tokenizer of the tokenizers package that cuts a text into tokens by their scores."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Cut a text in place."""
        text.split(lambda _, part: self._cut(part))

    def _cut(self, part: NormalizedString) -> list[NormalizedString]:
        ends = ends_of_tokens(part.normalized, self.scores)
        return [piece for begin, end in zip([0, *ends], ends, strict=False) if (piece := part[begin:end])]


def ends_of_tokens(text: str, scores: Mapping[str, float]) -> list[int]:
    """Where the tokens of a text end. scores: of each token; characters that make none are left alone."""
    ends, before = list(range(1, len(text) + 1)), list(range(-1, len(text) - 1))  # of the part that begins at an index

    def joined(left: int, right: int) -> tuple[float, int, int, int] | None:
        score = scores.get(text[left : ends[right]])
        return None if score is None else (-score, left, right, ends[right])

    waiting = [pair for left in range(len(text) - 1) if (pair := joined(left, left + 1))]
    heapify(waiting)
    while waiting:
        _, left, right, end = heappop(waiting)
        if ends[left] != right or ends[right] != end:
            continue  # one of the two has been joined to another since
        ends[left], ends[right] = end, 0
        if end < len(text):
            before[end] = left
        for one, other in ((before[left], left), (left, end)):
            if one >= 0 and other < len(text) and (found := joined(one, other)):
                heappush(waiting, found)
    return [end for end in ends if end]


def content_of(own: Keys, tokens: list[str], where: str) -> Keys:
    """tokenizer.json's parts for a file's keys (without prefix). CheckpointError for scores that are missing or damaged."""
    prefix = bool(own.get("add_space_prefix", True))
    spaces: Keys = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    start: list[Keys] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back: Keys = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip: list[Keys] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = id_of(own, "unknown_token_id")
    return {
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, **_joining(own, tokens, where),
            "byte_fallback": True, "fuse_unk": True, "unk_token": None if unknown is None else tokens[unknown],
        },
        "normalizer": {"type": "Sequence", "normalizers": [*start, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }  # fmt: skip


def _joining(own: Keys, tokens: list[str], where: str) -> Keys:
    """What a BPE joins parts by: ranked pairs, or the scores by which `ByScore` cuts texts into whole tokens."""
    scores = np.asarray(own.get("scores", np.zeros(len(tokens))))
    if scores.dtype.kind not in "fiu" or scores.shape != (len(tokens),) or np.isnan(scores).any():
        raise CheckpointError("not a score for each token", where=where, remedy="get a good copy")
    each = zip(tokens, own["token_type"], scores.astype(np.float32).tolist(), strict=True)
    # of tokens that are split off before, only those come again that spaces make
    joined = {token: score for token, kind, score in each if kind not in FOUND or SPACE in token}
    pairs = ranked_pairs(joined, frozenset(tokens))
    return {"merges": [], "ignore_merges": True, CUT: ByScore(joined)} if pairs is None else {"merges": pairs}


def ranked_pairs(scores: Mapping[str, float], known: frozenset[str]) -> list[tuple[str, str]] | None:
    """Every way to make a token that has a score of two known ones, of whatever type, the best score first.

    None where no ranks of pairs do what scores do: several tokens tie, or a part is a character that is no token.
    """
    strangers = {character for token in scores for character in token} - known
    if any(_has_stranger(token, known) for token in scores if not strangers.isdisjoint(token)):
        return None
    pairs: list[tuple[str, str]] = []
    last = None
    for token in sorted(scores, key=lambda token: -scores[token]):
        before, score = len(pairs), scores[token]
        for at in range(1, len(token)):  # a plain loop: a quarter of a million tokens, and most cuts end at the left
            if (left := token[:at]) in known and (right := token[at:]) in known:
                pairs.append((left, right))
        if len(pairs) > before:
            if score == last:
                return None
            last = score
    return pairs


def _has_stranger(token: str, known: frozenset[str]) -> bool:
    """Whether two parts make the token, at least one of them being a character that is no token."""
    cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
    return any(not known.issuperset(cut) and all(len(part) == 1 or part in known for part in cut) for cut in cuts)
