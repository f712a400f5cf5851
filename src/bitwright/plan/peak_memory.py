"""An estimate of the memory that a run takes, from its plan alone."""

from collections import Counter
from dataclasses import replace

from bitwright.calibration.observe import KEPT_BYTES
from bitwright.files.checkpoint import count, spec_bytes
from bitwright.formats import Layer
from bitwright.methods.gptq import AT_ONCE
from bitwright.models.file_names import EXPERT
from bitwright.models.skeleton import TOKENS_PER_BATCH
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.run_plan import Plan

PROCESS_BYTES = 400 << 20  # Python, torch and transformers, before any weight
TOKENIZER = 6.5  # times tokenizer.json: what a loaded one takes, measured on vocabularies of 49,000 and 262,000


def peak_memory(plan: Plan) -> int:
    """Estimate of the largest resident set, in bytes.

    The largest of three phases (the first hidden states, the blocks, the embedding and the head), and beside it the block
    before, which is written and read back meanwhile.
    """
    if not plan.calibrated:
        return _uncalibrated_peak(plan)
    outside = [t for t in plan.tensors if t.block is None]
    stored, loaded = outside_bytes(plan)
    states = hidden_states(plan)
    rounded = [_rounding_bytes(t.layer, gram=plan.calibrates_embeddings) for t in outside if t.layer is not None]
    embeddings = stored + max(loaded, *rounded) if rounded else stored
    return (
        process_bytes(plan)
        + max(states + stored + loaded, states + _kept_bytes(plan) + block_bytes(plan), states + embeddings)
        + _in_writing(plan, plan.shard(_largest_block(plan)))
    )


def outside_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of the tensors outside the blocks as they are stored, and of those that are converted to be computed with."""
    outside, dtype = [t for t in plan.tensors if t.block is None], plan.skeleton.dtype
    stored = sum(t.dtype.itemsize * count(t.shape) for t in outside)
    return stored, sum(dtype.itemsize * count(t.shape) for t in outside if t.dtype != dtype)


def process_bytes(plan: Plan) -> int:
    """Bytes of the process without weights, the tokenizer included where the run needs it."""
    file = plan.source / "tokenizer.json"
    loaded = file.is_file() and (plan.calibrated or plan.format.one_file)
    return PROCESS_BYTES + int(TOKENIZER * file.stat().st_size if loaded else 0)


def hidden_states(plan: Plan) -> int:
    """Bytes of the hidden states: of each model's, what a block is given, what it gives, and what is being saved."""
    models = 2 if plan.recipe.needs_original else 1
    return 3 * models * plan.samples * plan.seqlen * hidden_bytes(plan)


def hidden_bytes(plan: Plan) -> int:
    """Bytes of a token's hidden state."""
    return plan.skeleton.config.get_text_config().hidden_size * plan.skeleton.dtype.itemsize


def _kept_bytes(plan: Plan) -> int:
    """Bytes of a block's activations that are kept, so that they are not computed anew for each of its inputs."""
    layers = [t.layer for t in plan.shard(_largest_block(plan)) if t.layer is not None]
    tokens, size = plan.samples * plan.seqlen, plan.skeleton.dtype.itemsize
    hidden = plan.skeleton.config.get_text_config().hidden_size
    widths = {layer.K for layer in layers}
    # the inputs of attention, of the MLP, and of the matrices that end them
    activations = tokens * size * (2 * hidden + sum(widths))
    known = min(KEPT_BYTES, tokens * size * (2 * hidden + max(widths, default=0)))  # see known_outputs.py
    kept = 0 if plan.recipe.kv_cache is not None else known
    if plan.recipe.needs_original:
        kept += activations if activations <= KEPT_BYTES else known  # see FloatStream
    if any(_expert(layer.name) for layer in layers):
        kept += tokens * size * hidden * (2 if plan.recipe.needs_original else 1)  # see observe_experts.py
    return kept


def block_bytes(plan: Plan, rows: int | None = None) -> int:
    """Bytes for the largest block: its weights, the statistics of an input, and its forward or the rounding of a matrix.

    rows: of a matrix that are rounded at a time; None: all
    """
    layers = [t.layer for t in plan.shard(_largest_block(plan)) if t.layer is not None]
    tokens, size = plan.samples * plan.seqlen, plan.skeleton.dtype.itemsize
    hidden = plan.skeleton.config.get_text_config().hidden_size
    widths = {layer.K for layer in layers}
    forward = min(tokens, TOKENS_PER_BATCH) * size * (10 * hidden + 5 * max(widths, default=0))  # as measured
    square = 4 * max((K * K for K in widths), default=0)
    statistics = square * (5 if plan.recipe.needs_original else 4)  # Gram, drift; H and its factor, a copy
    if plan.recipe.needs_folds or plan.recipe.kv_cache is not None:
        inputs = {(_expert(layer.name), layer.K) for layer in layers}  # folds hold the Grams of all at once
        statistics = max(statistics, sum(4 * K * K for _, K in inputs) + 2 * square)
    # As read, as run in float; decoded after rounding by the method and by the guard's search, and the codes of both.
    stored = max((t.dtype.itemsize for t in plan.shard(_largest_block(plan))), default=size)
    weights = sum(layer.N * layer.K for layer in layers) * (stored + 3 * size + 2)
    parts = [layer if rows is None else replace(layer, N=min(layer.N, rows)) for layer in layers]
    rounding = max((_rounding_bytes(part, gram=True) for part in parts), default=0)
    return weights + statistics + max(forward, rounding)


def _largest_block(plan: Plan) -> int:
    """The block with most weights to quantize: the first of a mixture of experts may have none."""
    sizes = Counter[int]()
    for t in plan.tensors:
        if t.layer is not None and t.block is not None:
            sizes[t.block] += t.layer.N * t.layer.K
    return max(sizes, key=lambda block: sizes[block], default=0)


def _uncalibrated_peak(plan: Plan) -> int:
    """As `peak_memory`, where nothing is run: a block or what is outside the blocks is read, rounded and written."""
    layers = [t.layer for t in plan.tensors if t.layer is not None]
    block = sum(t.layer.N * t.layer.K for t in plan.shard(_largest_block(plan)) if t.layer is not None)
    largest = max((layer.N * layer.K for layer in layers), default=0)
    largest_shards = [plan.shard(i) for i in (_largest_block(plan), len(plan.skeleton))]
    written = max(_in_writing(plan, members) for members in largest_shards)
    read = max(spec_bytes({t.source: (t.dtype, t.shape) for t in members}) for members in largest_shards)
    rowwise = all(layer.scheme.rowwise for layer in layers)  # slabs of rows: there are few float32 copies
    return process_bytes(plan) + read + written + (max(block, largest) if rowwise else block * 4 + largest * 24)


def _in_writing(plan: Plan, members: list[PlannedTensor]) -> int:
    """Codes of a shard, its bytes, and its bytes read back."""
    codes = sum(t.layer.N * t.layer.K for t in members if t.layer is not None)
    return codes + 2 * spec_bytes(plan.specs(members))


def _rounding_bytes(layer: Layer, *, gram: bool) -> int:
    """Bytes for rounding one matrix, beside its float weights as stored.

    Without a Gram, slabs of rows are rounded. With one, GPTQ has the whole matrix in float32 and rounds whole rows of
    gptq.AT_ONCE weights at a time, which takes some 30 bytes a weight: the columns, their targets and their errors, under
    fixed scales and under refitted ones; then coordinate descent has as many. All parts together are the quantized
    matrix (int8 codes, float32 scales and zeros), which is there twice while they are joined.
    """
    weights = layer.N * layer.K
    tables = 1 if layer.scheme.symmetric else 2
    quantized = weights + 4 * tables * layer.N * layer.scheme.groups(layer.K)
    working = 30 * min(weights, AT_ONCE)
    return (4 * weights if gram else 0) + quantized + max(quantized, working)


def _expert(name: str) -> str:
    """The number of the expert that a matrix belongs to, "" for any other."""
    found = EXPERT.search(f"{name}.")
    return found[1] if found else ""
