"""Advise: what of a model fits this machine, how fast it will be, and which scheme, method, format and engine to take."""

import platform
from dataclasses import asdict, dataclass
from typing import Any

from bitwright.advice.engines import ENGINES, TABLE, Support, runs
from bitwright.advice.machine import Gpu, Machine
from bitwright.advice.model_shape import FLOATS, ModelShape, head_type
from bitwright.errors import InputError, one_of
from bitwright.numerics.scheme import Scheme

CPU_SCHEMES = ("q8_0", "int8-channel", "q6_k", "int4-g128", "q4_k", "int3-g128", "q3_k", "q2_k")
SCHEMES = ("float32", "bfloat16", *CPU_SCHEMES)
USABLE = 0.9  # share of the memory that a model may take: the rest is the engine's and the system's
PROCESS = 400 << 20  # an engine without a model
SMALL = 50_000_000  # parameters below which 16 bits are left alone, where they fit
QUICK = 20.0  # tokens a second beyond which nobody waits
MEASURED_TOKENS = (64, 32)  # of the short run: prompt, and tokens after it
# What to prefer, best first: scheme, its name for `quantize`, what inputs are rounded to. On a CPU and on a GPU.
ON_CPU = (
    ("q8_0", "q8_0", ""), ("int8-channel", "int8-channel", "int8-token"), ("q6_k", "q6_k", ""), ("q4_k", "q4_k_m", ""),
    ("int4-g128", "int4-g128", ""), ("q3_k", "q3_k_m", ""), ("q2_k", "q2_k", ""),
)  # fmt: skip
ON_GPU = (
    ("fp8-channel", "fp8-channel", "fp8-token"), ("int8-channel", "int8-channel", "int8-token"),
    ("int4-g128", "int4-g128", ""), ("q4_k", "q4_k_m", ""), ("q3_k", "q3_k_m", ""), ("q2_k", "q2_k", ""),
)  # fmt: skip
GROUPS = (128, 64, 32)
FOUR_BITS = ("q4_k", "int4-g128")
CONTEXT = 4096  # tokens, where the model knows as many
# Seconds that a product takes beside its weights: threads meet, and norms, rotations and attention go between. Float models are
# run by torch's modules. By measurement (SmolLM2, two threads), and alike on other processors
BESIDE, BESIDE_IN_MODULES = 5e-6, 1e-4


@dataclass(frozen=True)
class Fit:
    """A scheme's row. Bytes of the weights, of the KV cache at the context, and with activations and the engine in all.

    tokens_per_second  after the prompt, one sequence; None: the machine was not measured
    """

    scheme: str
    bits_per_weight: float
    weights: int
    cache: int
    whole: int
    fits: bool
    tokens_per_second: float | None


@dataclass(frozen=True)
class Advice:
    """The answer. scheme "": not to be quantized, or nothing fits; `why` says which.

    memory  bytes that may be used, of the GPU if there is one, else of the machine
    """

    shape: ModelShape
    machine: Machine
    context: int
    memory: int
    fits: tuple[Fit, ...]
    scheme: str
    method: str
    format: str
    engine: str
    command: str
    why: tuple[str, ...]
    training: str
    engines: tuple[Support, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `bitwright advise`."""
        shape = self.shape
        return {
            "model": {
                "name": shape.name, "parameters": shape.parameters, "stored": shape.stored,
                "float32_bytes": 4 * shape.parameters, "positions": shape.positions,
            },
            "machine": asdict(self.machine),
            "context": self.context,
            "usable_bytes": self.memory,
            "fits": [asdict(fit) for fit in self.fits],
            "recommended": {
                "scheme": self.scheme, "method": self.method, "format": self.format, "engine": self.engine,
                "command": self.command, "why": list(self.why), "training": self.training,
            },
            "engines": [asdict(row) for row in self.engines],
        }  # fmt: skip


def advise(
    shape: ModelShape, machine: Machine, *, model: str, context: int | None = None, engine: str | None = None
) -> Advice:
    """What to do with a model on a machine.

    model    as commands name it
    context  tokens of the KV cache; None: 4096, or what the model knows

    InputError for an unknown engine, one that does not run on this hardware, or a context beyond the model's.
    """
    context = context_of(shape, context)
    rows = _rows(machine, engine)
    gpu = max(machine.gpus, key=lambda one: one.memory, default=None)
    memory = int(USABLE * (machine.memory if gpu is None else gpu.memory))
    tried = tuple(
        dict.fromkeys([*SCHEMES[:2], *(_FP8 if gpu is not None and gpu.capability >= (8, 9) else ()), *CPU_SCHEMES])
    )
    fits = tuple(_fit(shape, machine, gpu, scheme, context, memory) for scheme in tried)
    chosen, why = _chosen(shape, gpu, rows, {fit.scheme: fit for fit in fits}, memory)
    scheme, name, activations, row = chosen or ("", "", "", None)
    method, format_ = _method(scheme, activations), row.format if row else ""
    why += _cache_advice(shape, context, memory, format_)
    command = _command(model, name, activations, method, format_) if chosen else ""
    return Advice(
        shape, machine, context, memory, fits, name, method if chosen else "", format_, row.engine if row else "",
        command, tuple(why), _training(shape, scheme), rows,
    )  # fmt: skip


_FP8 = ("fp8-channel",)


def context_of(shape: ModelShape, context: int | None) -> int:
    """The context to reckon with. InputError for one beyond the model's."""
    if context is None:
        return min(CONTEXT, shape.positions or CONTEXT)
    if shape.positions is not None and context > shape.positions:
        message = f"{shape.name} knows {shape.positions} positions, not {context}"
        raise InputError(message, where="--context", remedy=f"--context {shape.positions}, or less")
    return context


def check_engine(engine: str | None) -> None:
    """InputError for an engine that is not in the table."""
    if engine is not None and engine.lower() not in [name.lower() for name in ENGINES]:
        raise InputError(f"unknown engine {engine!r}", where="--engine", remedy=one_of(engine, ENGINES))


def _rows(machine: Machine, engine: str | None) -> tuple[Support, ...]:
    """The rows of the table for this hardware, and this engine. InputError as of `advise`."""
    check_engine(engine)
    gpu = max(machine.gpus, key=lambda one: one.memory, default=None)
    cpu = "arm" if platform.machine() in ("aarch64", "arm64") else "x86"
    rows = [row for row in TABLE if runs(row, cpu, gpu.capability if gpu else None)]
    if engine is not None:
        rows = [row for row in rows if row.engine.lower() == engine.lower()]
    if not rows:
        here = (row for row in TABLE if row.format and runs(row, cpu, gpu.capability if gpu else None))
        others = sorted({row.engine for row in here})
        where = f"{gpu.name}, compute capability {gpu.capability}" if gpu else f"{machine.cpu}, no GPU"
        raise InputError(
            f"{engine} runs nothing quantized on {where}", where="--engine", remedy=f"--engine {others[0]}"
        )
    return tuple(rows)


def _fit(shape: ModelShape, machine: Machine, gpu: Gpu | None, scheme: str, context: int, memory: int) -> Fit:
    weights, cache = shape.weight_bytes(scheme), shape.cache_bytes(context)
    whole = weights + cache + shape.activation_bytes + PROCESS
    bits = 8 * weights / shape.parameters
    speed = expected_speed(shape, machine, scheme, context) if gpu is None else _gpu_speed(shape, gpu, scheme, context)
    return Fit(scheme, bits, weights, cache, whole, whole <= memory, speed if whole <= memory else None)


def expected_speed(shape: ModelShape, machine: Machine, scheme: str, context: int) -> float | None:
    """Tokens a second after a prompt of `context` tokens, on the CPU: the measured speed of products with one token, and of
    reading the head, where it stays float, and the KV cache; and `BESIDE` each product. None: not measured."""
    if not machine.bandwidth or not shape.predicts:
        return None
    beside = BESIDE_IN_MODULES if scheme in FLOATS else BESIDE
    rest = shape.cache_bytes(context) / machine.bandwidth + beside * sum(shape.active.values())
    if scheme in FLOATS:
        return 1 / (shape.read_bytes(scheme) / machine.bandwidth + rest)
    rate = machine.weights.get(scheme)
    if rate is None:
        return None
    in_blocks = sum(count * N * K for (N, K), count in shape.active.items())
    ends = head_type(scheme)
    head = shape.head / machine.weights.get(ends, rate) if ends else 2 * shape.head / machine.bandwidth
    return 1 / (in_blocks / rate + head + rest)


def _gpu_speed(shape: ModelShape, gpu: Gpu, scheme: str, context: int) -> float | None:
    """Tokens a second at most: what the GPU's memory allows."""
    if gpu.bandwidth is None or not shape.predicts:
        return None
    return gpu.bandwidth / (shape.read_bytes(scheme) + shape.cache_bytes(context))


Chosen = tuple[str, str, str, Support]  # scheme, its name for `quantize`, activations, the engine's row


def _chosen(
    shape: ModelShape, gpu: Gpu | None, rows: tuple[Support, ...], fits: dict[str, Fit], memory: int
) -> tuple[Chosen | None, list[str]]:
    """The scheme to take and the engine for it, and why; None: leave the model as it is, or nothing fits."""
    if shape.quantized:
        return None, [
            f"it is quantized already ({shape.stored}): rounding twice only loses. Run it, or take the original"
        ]
    if shape.parameters < SMALL and fits["bfloat16"].fits:
        size = f"{shape.weight_bytes('bfloat16') / 1e6:.0f} MB in 16 bits"
        return None, [f"it should not be quantized: {size} fit anywhere, and small models lose most by rounding"]
    possible = []
    for scheme, name, activations in ON_CPU if gpu is None else ON_GPU:
        row = next((r for r in rows if r.format and r.activations == activations and name.startswith(r.schemes)), None)
        if row is not None and scheme in fits:
            possible.append((scheme, _with_a_group_that_fits(shape, name), activations, row))
    fitting = [one for one in possible if fits[one[0]].fits]
    if not fitting:
        return None, [_nothing(gpu, rows, [fits[one[0]] for one in possible], memory)]
    best = _preferred(shape, gpu, fitting, fits)
    fit = fits[best[0]]
    why = [f"{fit.whole / 1e9:.1f} of {memory / 1e9:.1f} GB with the KV cache at this context"]
    if fit.tokens_per_second is not None:
        why.append(f"about {fit.tokens_per_second:.0f} tokens a second")
    if best[0] != possible[0][0]:
        why.append(_why_not(possible[0][0], fits))
    row = best[3]
    why.append(f"{row.engine} runs it here ({row.what}{f': {row.source}, {row.read}' if row.source else ''})")
    return best, why


def _with_a_group_that_fits(shape: ModelShape, name: str) -> str:
    """The scheme with shorter groups, where 128 does not divide every row."""
    least = GROUPS[-1]  # a matrix of fewer inputs stays in float
    widths = {width for _, width in shape.matrices if width >= least}
    group = next((g for g in GROUPS if all(width % g == 0 for width in widths)), least)
    return name.replace(f"-g{GROUPS[0]}", f"-g{group}")


def _nothing(gpu: Gpu | None, rows: tuple[Support, ...], possible: list[Fit], memory: int) -> str:
    """Why there is nothing to recommend, and what would help."""
    if not possible:
        engines = ", ".join(sorted({row.engine for row in rows}))
        return f"bitwright writes no language models for {engines} on this hardware: take another --engine"
    least = min(possible, key=lambda fit: fit.whole)
    needs = f"{least.scheme} needs {least.whole / 1e9:.1f} GB, {memory / 1e9:.1f} GB may be used"
    shared = "leave some layers on the CPU (llama.cpp), " if gpu is not None else ""
    return f"nothing fits: {needs}. Shorten --context, {shared}or take a smaller model"


def _preferred(shape: ModelShape, gpu: Gpu | None, fitting: list[Chosen], fits: dict[str, Fit]) -> Chosen:
    """The best that fits. On a CPU, where reading the weights is what takes the time: the widest that is quick, else four
    bits, below which quality falls fast."""
    if gpu is not None:
        return fitting[0]
    quick = [one for one in fitting if (fits[one[0]].tokens_per_second or 0.0) >= QUICK]
    four = [one for one in fitting if one[0] in FOUR_BITS]
    return (quick or four or fitting)[0]


def _why_not(wider: str, fits: dict[str, Fit]) -> str:
    fit = fits[wider]
    if not fit.fits:
        return f"{wider} would need {fit.whole / 1e9:.1f} GB"
    return f"{wider} fits too, at {fit.tokens_per_second or 0:.0f} tokens a second"


def _method(scheme: str, activations: str) -> str:
    """The rounding method: what pays at these bits."""
    bits = Scheme.parse(scheme).levels.bits if scheme else 0
    if bits >= 8:
        return "smooth+gptaq" if activations == "int8-token" else "rtn"
    return "gptaq" if bits >= 4 or scheme.startswith("q") else "autoround"


def _command(model: str, name: str, activations: str, method: str, format_: str) -> str:
    out = "OUT.gguf" if format_ == "gguf" else "OUT"
    parts = ["bitwright quantize", model, out, "--scheme", name, "--method", method]
    parts += ["--activations", activations] if activations else []
    parts += ["--format", format_] if format_ not in ("gguf", "compressed-tensors") else []
    return " ".join(parts)


def _cache_advice(shape: ModelShape, context: int, memory: int, format_: str) -> list[str]:
    """A word on the KV cache where it takes more than the weights, or a third of the memory."""
    cache = shape.cache_bytes(context)
    if cache < memory / 3 and cache < shape.weight_bytes("int4-g128"):
        return []
    half = "--kv-cache fp8-tensor halves it" if format_ == "compressed-tensors" else "a shorter --context is what helps"
    return [f"the KV cache takes {cache / 1e9:.1f} GB at {context} tokens: {half}"]


def _training(shape: ModelShape, scheme: str) -> str:
    """Whether quantization-aware training or fine-tuning is worth it."""
    if not scheme:
        return "no: nothing is rounded"
    bits = Scheme.parse(scheme).levels.bits
    if bits <= 3:
        return "yes, if you have text and a GPU: below 4 bits training repairs most of what rounding loses"
    if bits == 4 and shape.parameters < 1_000_000_000:
        return "measure first: below a billion parameters 4 bits cost; if bitwright eval says KL above 0.1, train"
    return "no: from 4 bits on, rounding with calibration loses less than training risks"
