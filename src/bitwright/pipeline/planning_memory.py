"""An estimate of the memory that making a plan takes: gradients, scores, and steps that are measured."""

from collections.abc import Sequence

from bitwright.pipeline.curvature import LOGITS_AT_ONCE, windows_measured
from bitwright.pipeline.scores import ENDS_ROWS, ROWS
from bitwright.pipeline.steps import room_for_copies
from bitwright.plan.peak_memory import block_bytes, hidden_bytes, outside_bytes, process_bytes
from bitwright.plan.run_plan import Plan
from bitwright.plan.units import Unit

LOGITS = 4  # of some tokens, their logarithms, the gradients of both; as well as
DRAWN = 8  # bytes of a logit, for its probability and what tokens are drawn by
UNRETURNED = 128 << 20  # bytes that a block's scores have freed and that are not yet given back, as measured
PILED = 3 * 2 * ROWS  # rows of query, key and value, which are rounded as one: a sample of less than 2 ROWS of each


def planning_memory(base: Plan, units: Sequence[Unit], measure: int) -> int:
    """Estimate of the largest resident set in bytes, beside what the run takes that the plan leads to.

    base, units: what is chosen from; measure: rounds of measuring. The largest of what the gradients, the blocks, the
    embedding and the head, and the copies of measured steps take.
    """
    phases = [_gradients(base), _scores(base), _ends(base) if base.format.embeddings else 0]
    if measure:
        phases.append(2 * _states(base) + block_bytes(base) + room_for_copies(base, len(units)))
    return process_bytes(base) + max(phases)


def _states(base: Plan) -> int:
    """Bytes of the hidden states of all calibration tokens."""
    return base.samples * base.seqlen * hidden_bytes(base)


def _judged_tokens(base: Plan) -> int:
    """How many tokens gradients and losses are taken on."""
    return windows_measured(base.seqlen) * base.seqlen


def _gradients(base: Plan) -> int:
    """Every block's input at the tokens that gradients are taken on, and the head's logits or one block's backward pass."""
    vocabulary, size = base.skeleton.config.get_text_config().vocab_size, base.skeleton.dtype.itemsize
    tokens = min(base.seqlen, max(1, LOGITS_AT_ONCE // vocabulary))
    stored, loaded = outside_bytes(base)
    head = (
        2 * stored + loaded + tokens * vocabulary * (LOGITS * size + DRAWN)
    )  # a copy in the order of the product's tiles
    return _judged_tokens(base) * hidden_bytes(base) * (len(base.skeleton) + 1) + max(head, block_bytes(base, PILED))


def _scores(base: Plan) -> int:
    """The hidden states before and behind a block, and as they are saved; its matrices' inputs at the tokens of the losses."""
    inputs = max(sum(t.layer.K for t in base.shard(i) if t.layer is not None) for i in range(len(base.skeleton)))
    judged = _judged_tokens(base) * (2 * hidden_bytes(base) + inputs * base.skeleton.dtype.itemsize)
    return 2 * _states(base) + judged + block_bytes(base, PILED) + UNRETURNED


def _ends(base: Plan) -> int:
    """The embedding and the head, where they are chosen for: as stored, as computed with, and a sample of their rows."""
    hidden = base.skeleton.config.get_text_config().hidden_size
    return _states(base) + sum(outside_bytes(base)) + max(block_bytes(base, PILED), 30 * 2 * ENDS_ROWS * hidden)
