"""Check that the model knows its calibration text: the float model's perplexity on it, beside that on the text `general`.

Statistics of a text unlike the model's training text serve its real use badly, and losses do not show it: on that very text
they are as low as on any other. Encoded text or shuffled words have a perplexity many times that of `general`, which mixes
languages, code and dialogue. (A script that the model never learnt is not noticed: the bytes of one character predict each
other, see docs/log.md.)
"""

from bitwright.calibration.general_text import mixed_documents
from bitwright.calibration.windows import Drawn, cut_windows, load_tokenizer
from bitwright.models.streamed import float_perplexities
from bitwright.plan.run_plan import Plan

WINDOWS, LONGEST = 2, 2048  # windows of each text, tokens in one at most: a rough figure is enough
DOCUMENTS = 40  # documents of `general`, of all kinds: more than enough for them
FOREIGN = 10.0  # times the perplexity on `general`, from which on there is a note: see docs/log.md


def unfamiliar(plan: Plan, tokens: Drawn) -> tuple[str, ...]:
    """A note, with a remedy, if the model hardly knows its calibration text; none for encoders, which predict nothing."""
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
