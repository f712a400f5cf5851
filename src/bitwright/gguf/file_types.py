"""llama.cpp's quantization mixes (Q4_K_M and others): which block type each tensor of a model gets.

Source: llama-quant.cpp, `llama_tensor_get_type`. A mix is named after the type that most tensors get. Where rows are no
multiple of 256 weights, a type with blocks of 32 takes the place of one with 256 (`tensor_type_fallback` there).
"""

from dataclasses import dataclass

MIXES = {
    **{name: name for name in (
        "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
        "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    )},
    "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S",
    "MXFP4_MOE": "MXFP4",
}  # fmt: skip
# llama.cpp's numbers of the mixes (enum llama_ftype), for the key general.file_type.
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21,
    "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29,
    "IQ4_XS": 30, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41,
    "F32": 0, "F16": 1, "BF16": 32,
}  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16")  # targets that are not quantized
FALLBACKS = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
    "Q6_K": "Q8_0", "Q2_0": "Q4_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "IQ4_NL"),
}  # fmt: skip
VALUES = ("attn_v", "attn_qkv", "attn_kv_b")  # value projections; a fused matrix is treated as one
EXPERTS = ("_exps", "_shexp", "_chexps")  # suffixes of a block's tensors of experts, and of those that all tokens pass
EIGHT = 8  # experts of Mixtral, whose attention is small beside them
# Mixes of the fewest bits, which give other tensors another type than the blocks' matrices; and those of them with more bits.
LOWEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
UPPER = ("IQ2_S", "IQ2_M")
# Mixes in which attn_output beside eight experts is Q5_K.
RAISED = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What the rule knows of a tensor.

    part      its name within the block (attn_v, ffn_down, …), or token_embd, output
    index     number of its block, from 0; depth: number of blocks in the model
    heads     query heads for each key-value head
    tied      whether the embedding is the output head too
    weighted  whether there is an importance matrix
    """

    part: str
    index: int
    depth: int
    heads: int
    tied: bool
    weighted: bool
    fits: bool = True  # whether a row fills whole blocks of the mix's type
    experts: int = 0  # in a layer
    stacked: bool = False  # whether it holds the matrices of all experts

    @property
    def more(self) -> bool:
        """llama.cpp's `use_more_bits`: whether the block is in the first or last eighth, or every third between."""
        first = self.depth // 8
        return self.index < first or self.index >= 7 * self.depth // 8 or (self.index - first) % 3 == 2


def part_of(name: str, block: int | None) -> str:
    """The name of a tensor's kind within its block, experts' without the suffix; outside the blocks its own."""
    part = name.split(".")[0 if block is None else 2]
    for suffix in EXPERTS:
        part = part.removesuffix(suffix)
    return part


def type_in(mix: str, place: Place) -> str:
    """The block type that a mix gives to a tensor, by llama.cpp's names."""
    base = MIXES[mix]
    if place.part == "output" or (place.part == "token_embd" and place.tied):
        return _head(mix, place)
    if mix == "MXFP4_MOE":
        return base if place.stacked else "Q8_0"
    if place.part in ("token_embd", "per_layer_token_embd"):
        return _embedding(mix) or base
    if mix in LOWEST:
        return _in_lowest(mix, place) or base
    if place.experts == EIGHT and place.part in (*VALUES, "attn_k"):
        return "Q8_0"
    if place.part in VALUES:
        found = _values(mix, place) or base
        return "Q5_K" if place.depth == 80 and place.heads == 8 and found in ("Q3_K", "Q4_K") else found
    if place.part == "ffn_down":
        return _down(mix, place) or base
    if place.part == "attn_output" and place.experts == EIGHT:
        return "Q5_K" if mix in RAISED else base
    if place.part == "attn_output":
        return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(mix, base)
    if place.part in ("attn_q", "attn_k"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, base)
    between = place.depth // 8 <= place.index < 7 * place.depth // 8
    return "IQ3_XXS" if mix == "IQ3_XS" and place.part in ("ffn_gate", "ffn_up") and between else base


def _head(mix: str, place: Place) -> str:
    """For the output head, and an embedding that is the head too."""
    base = MIXES[mix]
    if mix == "MXFP4_MOE" or base == "Q8_0" or not place.fits:
        return "Q8_0"
    return "Q5_K" if mix in (*LOWEST, "IQ3_XXS") else "Q6_K"


def _embedding(mix: str) -> str | None:
    """For an embedding beside a head; None: the mix's own type."""
    if mix in (*UPPER, "IQ3_XXS"):
        return "IQ3_S"
    return "Q2_K" if mix in LOWEST else "Q4_K" if mix in ("TQ1_0", "TQ2_0", "Q2_0") else None


def _in_lowest(mix: str, place: Place) -> str | None:
    """For the blocks' matrices in mixes of the fewest bits; None: the mix's own type."""
    better = "IQ3_S" if mix in UPPER else "Q2_K"
    if place.part in VALUES:
        return "Q4_K" if place.heads >= 4 or place.experts >= 4 else better
    if place.part == "attn_k" and place.experts == EIGHT:
        return "Q4_K"
    if place.part == "ffn_down":
        return better if place.index < place.depth // 8 else None
    if place.part == "attn_output":
        return (
            "Q5_K"
            if place.experts == EIGHT
            else {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS"}.get(mix, "IQ3_S" if mix in UPPER else None)
        )
    return None


def _values(mix: str, place: Place) -> str | None:
    """For value projections, which are small and sensitive; None: the mix's own type."""
    if mix in ("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ4_NL", "IQ4_XS") and place.heads >= 4:
        return "Q5_K" if mix.startswith("IQ4") else "Q4_K"
    if mix == "IQ3_XXS":
        return None if place.weighted else "IQ3_S"
    early = {"Q3_K_M": ("Q5_K", "Q4_K", 2), "Q4_K_S": ("Q5_K", None, 4)}
    if mix in early:
        first, others, count = early[mix]
        return first if place.index < count else others
    if mix in ("Q4_K_M", "Q5_K_M") and place.more:
        return "Q6_K"
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(mix)


def _down(mix: str, place: Place) -> str | None:
    """For ffn_down, whose inputs have the largest outliers; None: the mix's own type."""
    first = place.index < place.depth // 8
    if mix == "Q3_K_M":
        return "Q5_K" if place.index < place.depth // 16 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if place.more else None
    if mix == "IQ3_XXS":
        return None if place.weighted else "Q4_K" if first else "Q3_K"
    if mix == "IQ3_M":
        return "Q4_K" if first or (place.experts == EIGHT and place.more) else None
    if mix in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if first and not place.weighted else None
    if mix in ("Q4_0", "Q5_0"):
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix] if first and place.weighted else None
    if mix in ("Q4_K_S", "Q2_K_S"):
        return {"Q4_K_S": "Q5_K", "Q2_K_S": "Q4_K"}[mix] if first else None
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mix)
