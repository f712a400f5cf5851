"""Does the model know its calibration text? The float model's own perplexity on it, beside that on the general text.

Statistics of a text that a model hardly knows say little of what it is used for, and nothing else shows it: the losses on that
very text are as low as on any other. An encoded text, or words in no order, have a perplexity many times that of the general
text, which mixes languages, code and dialogue. Not so a script that the model never learnt: the bytes of one character
foretell each other (docs/log.md).
"""

from bitwright.calibration.general_text import mixed_documents
from bitwright.calibration.windows import Drawn, cut_windows, load_tokenizer
from bitwright.models.streamed import float_perplexities
from bitwright.plan.preflight import Plan

WINDOWS, LONGEST = 2, 2048  # of each text, and tokens in one: a factor is looked for, not a figure
DOCUMENTS = 40  # of the general text, of all kinds, are more than enough for them
FOREIGN = 10.0  # times the general text's perplexity: see docs/log.md


def unfamiliar(plan: Plan, tokens: Drawn) -> tuple[str, ...]:
    """A note, with the remedy, on calibration windows that the model hardly knows; encoders predict nothing, and get none."""
    if not plan.skeleton.predicts:
        return ()
    pieces = [document.plain() for document in mixed_documents()[:DOCUMENTS]]
    tokenizer, vocabulary = load_tokenizer(plan.source), plan.skeleton.config.get_text_config().vocab_size
    seqlen = min(plan.seqlen, LONGEST)
    general = cut_windows(tokenizer, pieces, WINDOWS, source="general", seqlen=seqlen, vocabulary=vocabulary)
    usual, here = float_perplexities(plan.source, [general, tokens.seen[:WINDOWS, :seqlen]])
    if here < FOREIGN * usual:
        return ()
    return (
        f"the model hardly knows this calibration text: its perplexity is {here:,.0f} there, {usual:,.0f} on the general text; "
        "give --calib a text like the model's use, in its chat template where it has one, or general",
    )
