"""Rotary position embeddings (RoPE): convert transformers' rope_parameters to llama.cpp's keys and tensors, and back.

Llama 3 and longrope (Phi-3) divide each frequency by a factor of its own; llama.cpp stores these factors as tensors. Gemma 3
has another base in its sliding-window layers. Source: llama.cpp's converter, and transformers' modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf.layer_values import of_layer

Keys = dict[str, Any]

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
COMPUTED = (FACTORS, LONG, SHORT)
SCALED = (
    "linear",
    "yarn",
    "longrope",
)  # rope types that have a key, in both libraries' words; "llama3" has only a tensor
# The parameters of each rope type that can be expressed by llama.cpp's keys or tensors.
KNOWN = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}
# Architectures for which llama.cpp has the tensors of factors: one for all lengths, and two for short and long texts.
FACTORED = frozenset(
    {"llama", "mistral3", "llama4", "falcon-h1", "granite", "granitemoe", "arcee", "exaone4", "apertus"}
)
BY_LENGTH = frozenset({"llama", "mistral3", "granite", "granitemoe", "phi3"})
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what llama.cpp takes if a file does not say otherwise
MSCALE = "mscale_all_dim"  # of DeepSeek's YaRN: scores are divided by more, as the context grows
ATTENTION = "scaling.attn_factor"  # queries and keys are multiplied by it
LOG_MULTIPLIER = "scaling.yarn_log_multiplier"
# Architectures that have this key, and times what it is written.
TIMES = {"deepseek2": 0.1, "mistral3": 1.0}
TEMPERATURE, TEMPERATURE_KEY = (
    "llama_4_scaling_beta",
    "mistral3.attention.temperature_scale",
)  # of queries, far from the start
ALPHA = (
    "hunyuan-dense",
    "hunyuan-moe",
)  # architectures whose "dynamic" type is a larger base: NTK-aware scaling by alpha
# What all checkpoints of an architecture have, and llama.cpp nevertheless computes as by YARN.
OWN = {"gpt-oss": {"truncate": False}}
# Positions in sections, of which a text has one position in all (M-RoPE): their sizes in Qwen 3.5, if the config is silent.
SECTIONED = {"qwen35": [11, 11, 10], "qwen35moe": [11, 11, 10]}
SECTIONS, SECTIONS_KEY, INTERLEAVED = "mrope_section", "dimension_sections", "mrope_interleaved"
# Architectures of which transformers rotates a part of each head, unless the config says how much.
PARTLY = ("glm4", "glm4moe", "stablelm", "phi2", "nemotron", "gptneox", "qwen3next", *SECTIONED)
GLOBAL, LOCAL = "full_attention", "sliding_attention"
LOCAL_BASES = {
    "gemma3": 10000.0,
    "gemma-embedding": 10000.0,
    "gemma3n": 10000.0,
    "modern-bert": 10000.0,
}  # default base of sliding-window layers, for architectures in which it differs
# Gemma 4: heads of another size where there is no window, whose last frequencies are none: divided by this.
PROPORTIONAL, NO_FREQUENCY = "proportional", 1e30
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def head_dim_of(config: PretrainedConfig, kind: str = "") -> int:
    """Channels of one attention head; kind: of layers of this kind, else of the first."""
    layer = config.layer_types.index(kind) if kind else 0
    return int(of_layer(config, "head_dim", layer) or config.hidden_size // config.num_attention_heads)


def keys_of(name: str, config: PretrainedConfig) -> Keys:
    """The RoPE keys of llama.cpp's architecture `name`. FormatError for parameters that they cannot express."""
    both = config.rope_parameters or {}
    if PROPORTIONAL in (both.get(kind, {}).get("rope_type") for kind in (GLOBAL, LOCAL)):
        return _two_sizes(name, config)
    rope = _plain(name, both.get(GLOBAL, both), head_dim_of(config))
    kind = rope.get("rope_type", "default")
    if kind in ("llama3", "longrope") and name not in (FACTORED if _is_even(rope) else BY_LENGTH):
        raise _unknown(f"{kind!r} in {name}")
    keys: Keys = {
        "freq_base": float(rope.get("rope_theta", 10000.0)),
        "dimension_count": int(head_dim_of(config) * _share(rope, config)),
    }
    if MSCALE in rope and name in TIMES:
        keys[LOG_MULTIPLIER] = TIMES[name] * rope.pop(MSCALE)
    if name in SECTIONED:
        keys[SECTIONS_KEY] = _sections(rope, name, head_dim_of(config))
    warm = {TEMPERATURE_KEY: float(rope.pop(TEMPERATURE))} if name == "mistral3" and TEMPERATURE in rope else {}
    keys |= _scaling(rope, config)
    if LOCAL in both:
        if both[LOCAL].get("rope_type", "default") != "default":
            raise _unknown(f"{both[LOCAL]['rope_type']!r} in sliding layers")
        keys["freq_base_swa"] = float(both[LOCAL]["rope_theta"])
    return {f"{name}.rope.{key}": value for key, value in keys.items()} | warm


def _two_sizes(name: str, config: PretrainedConfig) -> Keys:
    """The keys of Gemma 4. The share that is rotated without a window is in the tensor of factors alone."""
    full, local = (config.rope_parameters[kind] for kind in (GLOBAL, LOCAL))
    if name != "gemma4" or local.get("rope_type", "default") != "default" or full.get("factor", 1.0) != 1:
        raise _unknown(f"{PROPORTIONAL!r} with {full} and {local}")
    keys = {
        "freq_base": float(full["rope_theta"]), "dimension_count": head_dim_of(config, GLOBAL),
        "freq_base_swa": float(local["rope_theta"]), "dimension_count_swa": head_dim_of(config, LOCAL),
    }  # fmt: skip
    return {f"{name}.rope.{key}": value for key, value in keys.items()}


def _sections(rope: Keys, name: str, dim: int) -> list[int]:
    """The sizes of the four sections; they are taken out of `rope`. FormatError for those that a head has no room for."""
    found, interleaved = rope.pop(SECTIONS, SECTIONED[name]), rope.pop(INTERLEAVED, True)
    if not interleaved or len(found) != 3 or sum(found) > dim:
        raise _unknown(f"with sections of {found} in heads of {dim}, interleaved {interleaved}")
    return [*found, 0]


def _share(rope: Mapping[str, Any], config: PretrainedConfig) -> float:
    """The fraction of a head's channels that is rotated."""
    return float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)


def _plain(name: str, rope: Mapping[str, Any], dim: int) -> Keys:
    """The parameters without those that llama.cpp's architecture takes for granted.

    Hunyuan's alpha becomes a larger base. FormatError for DeepSeek's two scales, if they differ.
    """
    left = dict(rope)
    kind = left.get("rope_type", "default")
    if kind == "yarn":
        meant, given = YARN | OWN.get(name, {}), YARN | left
        left = {key: value for key, value in given.items() if key not in meant or value not in (None, meant[key])}
    factor = left.get("attention_factor")
    if kind == "yarn" and factor and math.isclose(factor, _yarn_attention(left["factor"]), rel_tol=1e-6):
        del left["attention_factor"]  # as computed without it
    elif kind == "yarn" and factor and name in TIMES:
        raise _unknown(f"{kind!r} with an attention_factor of its own in {name}")
    if kind == "yarn" and name in TIMES and MSCALE in left and left.pop("mscale", 1.0) != left[MSCALE]:
        raise _unknown(f"{kind!r} with an mscale other than {MSCALE}")
    if kind == "dynamic" and name in ALPHA and left.get("alpha"):
        base = float(left.get("rope_theta", 10000.0)) * left["alpha"] ** (dim / (dim - 2))
        left = {"rope_type": "default", "rope_theta": base}
    return left


def _scaling(rope: Mapping[str, Any], config: PretrainedConfig) -> Keys:
    """The keys of context extension: type, factor, original context length."""
    kind = rope.get("rope_type", "default")
    if kind not in KNOWN:
        raise _unknown(repr(kind))
    odd = sorted(key for key, value in rope.items() if value is not None and key not in (*KNOWN[kind], *ALWAYS))
    if odd:
        raise _unknown(f"{kind!r} with {', '.join(odd)}")
    if kind not in SCALED or _is_even(rope):
        return {}
    keys: Keys = {"scaling.type": kind}
    if kind == "longrope":
        keys[ATTENTION] = _attention_factor(rope, config)
    else:
        keys["scaling.factor"] = float(rope["factor"])
        if rope.get("attention_factor"):
            keys[ATTENTION] = rope["attention_factor"] / _yarn_attention(rope["factor"])
    if "original_max_position_embeddings" in rope:
        keys["scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return keys


def _is_even(rope: Mapping[str, Any]) -> bool:
    """Whether factors of frequencies are the same for texts of any length, and all that there is: one tensor of llama.cpp's."""
    kind = rope.get("rope_type")
    return kind == "llama3" or (
        kind == "longrope" and rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1
    )


def _attention_factor(rope: Mapping[str, Any], config: PretrainedConfig) -> float:
    """longrope's attention factor: the config's, or computed (Ding et al. 2024, arXiv:2402.13753)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _unknown(what: str) -> FormatError:
    message = f"positions of rope type {what} cannot be written as GGUF here"
    return FormatError(message, remedy=f"known: {', '.join(KNOWN)}; llama.cpp must have a key for each parameter")


def tensors_of(config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors of RoPE factors, by which frequencies are divided: [rotated channels / 2] float32; {} for other rope types.

    FormatError for a number of factors that does not fit the heads.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get(GLOBAL, {}).get("rope_type") == PROPORTIONAL:
        half = head_dim_of(config, GLOBAL) // 2
        turned = int(rope[GLOBAL].get("partial_rotary_factor", 1.0) * 2 * half // 2)
        return {FACTORS: torch.tensor([1.0] * turned + [NO_FREQUENCY] * (half - turned))}
    rope = rope.get(GLOBAL, rope)
    if rope.get("rope_type") == "llama3":
        return {FACTORS: _llama3(rope, head_dim_of(config))}
    if rope.get("rope_type") != "longrope":
        return {}
    found = {LONG: torch.tensor(rope["long_factor"]).float(), SHORT: torch.tensor(rope["short_factor"]).float()}
    wanted = int(head_dim_of(config) * _share(rope, config)) // 2
    for name, factors in found.items():
        if factors.shape != (wanted,):
            remedy = "config.json must belong to the weights"
            raise FormatError(f"{factors.numel()} factors for {wanted} frequencies", where=name, remedy=remedy)
    return {FACTORS: found[LONG]} if _is_even(rope) else found


def _llama3(rope: Mapping[str, Any], dim: int) -> Tensor:
    """Llama 3's factors of frequencies: 1 for short wavelengths, `factor` for long ones, interpolated between."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = smooth.clamp(0, 1)  # 0: the frequency is divided by the factor; 1: unchanged
    return (1 / ((1 - smooth) / factor + smooth)).float()


def parameters_of(name: str, keys: Mapping[str, Any], factors: Mapping[str, Tensor], dim: int, where: str) -> Keys:
    """transformers' rope_parameters for a file's keys and tensors of factors. dim: channels of a head.

    CheckpointError for what transformers has no parameters for.
    """
    own = {key.removeprefix(f"{name}.rope."): value for key, value in keys.items() if key.startswith(f"{name}.rope.")}
    rope: Keys = {"rope_type": "default", "rope_theta": own.get("freq_base", 10000.0)}
    if name == "gemma4":
        local = {"rope_type": "default", "rope_theta": own.get("freq_base_swa", 10000.0)}
        return {GLOBAL: rope | _read_proportional(factors, where), LOCAL: local}
    turned = own.get("dimension_count", dim)
    if turned != dim or name in PARTLY:
        rope["partial_rotary_factor"] = turned / dim
    if name in SECTIONED:
        rope |= {SECTIONS: [int(n) for n in own.get(SECTIONS_KEY, SECTIONED[name])[:3]], INTERLEAVED: True}
    kind, factor = _read_scaling(own)
    rope |= _read_scaled(name, own, kind, factor, factors, where)
    original = own.get("scaling.original_context_length")
    if name == "mistral3":  # far from the start counts in multiples of the original length
        rope[TEMPERATURE] = keys.get(TEMPERATURE_KEY, 0.0)
        original = original or keys.get(f"{name}.context_length")
    if original and (name == "mistral3" or rope["rope_type"] in ("yarn", "longrope")):
        rope["original_max_position_embeddings"] = original
    if FACTORS in factors:
        if kind == "yarn":
            message = f"factors of frequencies beside positions of type {kind!r}"
            raise CheckpointError(message, where=where, remedy="not read here yet")
        length = original or keys.get(f"{name}.context_length", dim)
        rope = _read_factors(rope, factors[FACTORS] * factor, dim, length)
    if name in LOCAL_BASES or (name == "olmo2" and keys.get("olmo2.attention.sliding_window")):
        base = own.get("freq_base_swa", LOCAL_BASES.get(name, rope["rope_theta"]))
        return {GLOBAL: rope, LOCAL: {"rope_type": "default", "rope_theta": base}}
    return rope


def _read_scaled(
    name: str, own: Mapping[str, Any], kind: str, factor: float, factors: Mapping[str, Tensor], where: str
) -> Keys:
    """What rope_parameters say of scaled positions; kind, factor: of `_read_scaling`. Errors as of `parameters_of`."""
    rope: Keys = {}
    if LONG in factors and SHORT in factors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": factors[LONG].tolist(),
            "short_factor": factors[SHORT].tolist(),
        }
        rope |= {"attention_factor": own.get(ATTENTION, 1.0)}
    elif own.get(ATTENTION, 1.0) != 1 and kind != "yarn":
        message = f"{name}.rope.{ATTENTION} = {own[ATTENTION]}, and positions of type {kind!r} have no such factor here"
        raise CheckpointError(message, where=where, remedy="not read here yet")
    elif kind != "default":
        rope |= {"rope_type": kind, "factor": factor}
        rope |= OWN.get(name, {}) if kind == "yarn" else {}
        rope |= {"attention_factor": own[ATTENTION] * _yarn_attention(factor)} if own.get(ATTENTION, 1.0) != 1 else {}
    if name == "deepseek2" and (kind == "yarn") != (LOG_MULTIPLIER in own):
        message = (
            f"positions of type {kind!r}, {'with' if LOG_MULTIPLIER in own else 'without'} {name}.rope.{LOG_MULTIPLIER}"
        )
        raise CheckpointError(message, where=where, remedy="not read here yet")
    if name in TIMES and kind == "yarn" and LOG_MULTIPLIER in own:
        rope |= dict.fromkeys(("mscale", MSCALE), own[LOG_MULTIPLIER] / TIMES[name])
    return rope


def _read_scaling(own: Mapping[str, Any]) -> tuple[str, float]:
    """transformers' rope type for a file's keys, and by how much positions are divided. As in llama.cpp, a factor counts
    without a type too, and the first files have it under another name."""
    kind, factor = own.get("scaling.type", "linear"), own.get("scaling.factor", own.get("scale_linear", 0.0)) or 1.0
    if kind == "yarn":
        return kind, factor
    return ("default", 1.0) if kind == "none" or factor == 1 else ("linear", factor)


def _yarn_attention(factor: float) -> float:
    """YaRN's own factor of queries and keys (Peng et al. 2023, arXiv:2309.00071)."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0


def _read_proportional(factors: Mapping[str, Tensor], where: str) -> Keys:
    """What is Gemma 4's own of rope_parameters. CheckpointError for other factors than ones before those of no frequency."""
    if FACTORS not in factors:
        return {"rope_type": PROPORTIONAL, "partial_rotary_factor": 1.0}
    found = factors[FACTORS]
    turned = int((found == 1).sum())
    if not bool((found[:turned] == 1).all()) or not bool((found[turned:] >= NO_FREQUENCY / 2).all()):
        message = "its factors of frequencies are not Gemma 4's"
        raise CheckpointError(message, where=where, remedy="not read here yet")
    return {"rope_type": PROPORTIONAL, "partial_rotary_factor": turned / len(found)}


def _read_factors(rope: Keys, factors: Tensor, dim: int, length: int) -> Keys:
    """rope_parameters for factors of frequencies: Llama 3's, recovered from them; else longrope's, the same for any length."""
    llama3 = {**rope, "rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    known = _llama3(llama3, dim)
    if known.shape == factors.shape and torch.allclose(known, factors, rtol=1e-5):
        return llama3
    each = dict.fromkeys(("short_factor", "long_factor"), factors.tolist())
    same = {"rope_type": "longrope", "attention_factor": 1.0, "original_max_position_embeddings": length, **each}
    return {key: value for key, value in rope.items() if key != "factor"} | same
