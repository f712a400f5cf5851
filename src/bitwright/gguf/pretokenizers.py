r"""llama.cpp's pre-tokenizers: their names, the regular expressions by which each splits a text, and what else a name decides.

Each expression splits the pieces of the one before it into matches and what lies between them. They are written for Oniguruma,
which the tokenizers package uses, and say what llama.cpp computes, which is not always what its source spells: `[sS]` instead
of `(?i:s)`; its \p{Lu}, \p{Ll}, \p{Lt}, \p{Lm} and \p{Lo} match all letters; \d is ASCII only; `$` matches at the end of a
piece. Source: llama-vocab.cpp (`llm_tokenizer_bpe`, `llama_vocab::impl::load`) and unicode.cpp.
"""

from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"  # English contractions
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CHINESE = "[一-龥぀-ゟ゠-ヿ]+"
_MARKED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK = rf"{_MARKED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_LINES = r"[^\n]+|\n+"
_SENTENCES = " ?[^(\\s|.,!?…。，、।۔،)]+"
# Groups of three digits, counted from the right; the first group includes the text before the number.
_THREES = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b820-\U0002ebef"
    "\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_OLD_LETTERS = (  # deepseek-llm's own
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdb"
    "ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)


def _words(numbers: str, *, letters: str = r"\p{L}", start: str = f"(?:{_SHORT})|") -> str:
    """The expression of Llama 3 and Qwen: words with one leading sign, numbers, signs, spaces."""
    inside = letters.replace("[", "").replace("]", "")
    signs = rf" ?[^\s{inside}\p{{N}}]+[\r\n]*"
    return rf"{start}[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}|{signs}|{_SPACES}"


def _cased(numbers: str, *, letter: str = r"\p{L}", short: str = f"(?:{_SHORT})?") -> str:
    """llama.cpp's expression for GPT-4o and Mistral's Tekken: also splits a word where the case of ASCII letters changes."""
    upper, lower = (f"(?:(?={letter})[^{case}])" for case in ("a-z", "A-Z"))
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{short}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{short}"
    return rf"{word}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


def _anycase(numbers: str) -> str:
    """As `_cased`, but every letter counts as upper and lower case, so that case never splits a word."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_SHORT})?"
    return rf"{word}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


def _published(numbers: str, *, short: bool = True) -> str:
    """GPT-4o's published expression (o200k_base), which llama.cpp approximates."""
    end = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?" if short else ""
    before, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return rf"{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


LLAMA3 = _words(r"\p{N}{1,3}")
QWEN2 = _words(r"\p{N}")
THREE = r"\p{N}{1,3}"


@dataclass(frozen=True)
class PreTokenizer:
    """One pre-tokenizer, and the names (tokenizer.ggml.pre) that select it.

    names     the first is the one that is written
    cuts      regular expressions, applied one after the other
    whole     whether a word that is a token becomes that token without merging (ignore_merges)
    begins    whether BOS is added where no key says
    bytes     whether BPE is byte-level (GPT-2's letters for bytes); otherwise it is over characters, as in sentencepiece
    pair_end  whether a separator is added between two texts (RoBERTa)
    lstrip    whether the mask token strips the spaces before it
    published the expressions of the original tokenizers, where llama.cpp's only approximate them
    """

    names: tuple[str, ...]
    cuts: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    bytes: bool = True
    pair_end: bool = False
    lstrip: bool = False
    published: tuple[str, ...] = ()

    @property
    def steps(self) -> list[Step]:
        """The steps of the equivalent pre-tokenizer in a tokenizer.json."""
        return [split(cut) for cut in self.cuts] + ([BYTES] if self.bytes else [])


BYTES: Step = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False, "trim_offsets": True}


def split(pattern: str) -> Step:
    """A tokenizer.json step that splits by a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


ROWS = (
    PreTokenizer(("gpt-2", "phi-2", "olmo", "mpt", "jais", "modern-bert", "exaone4", "granite-docling", "trillion", "gigachat",
                  "a.x-4.0", "mellum", "jina-es", "jina-de"), (GPT2,)),
    PreTokenizer(("jina-v2-es", "jina-v2-de"), (GPT2,), lstrip=True),
    PreTokenizer(("roberta-bpe", "jina-v1-en"), (GPT2,), pair_end=True),
    PreTokenizer(("jina-v2-code",), (GPT2,), pair_end=True, lstrip=True),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
                 (LLAMA3,), whole=True, begins=True),
    PreTokenizer(("smaug-bpe", "dbrx", "chatglm-bpe"), (LLAMA3,)),
    PreTokenizer(("glm4", "glm5"), (LLAMA3,), whole=True),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"),
                 (QWEN2,)),
    PreTokenizer(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
                 (r"\p{N}", GPT2)),
    PreTokenizer(("qwen35",), (_words(r"\p{N}", letters=r"[\p{L}\p{M}]"),)),
    PreTokenizer(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_cased(THREE),), published=(_published(THREE),)),
    PreTokenizer(("tekken",), (_cased(r"\p{N}", short=""),), whole=True, begins=True,
                 published=(_published(r"\p{N}", short=False),)),
    PreTokenizer(("granite-embed-multi-97m",), (_cased(THREE, letter=r"[\p{L}\p{M}]"),), whole=True,
                 published=(_published(THREE),)),
    PreTokenizer(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), (THREE, _CHINESE, _DEEPSEEK)),
    PreTokenizer(("deepseek-llm",), ("[\r\n]", r"\s?" + _OLD_LETTERS, "\\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+\z",
                                     "[一-龥ࠀ-一가-퟿]+", r"\p{N}+")),
    PreTokenizer(("deepseek-coder",), ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    PreTokenizer(("kimi-k2",), (
        rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_SHORT})?|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",)),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(("default",), (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (_SENTENCES,)),
    PreTokenizer(("viking",), (_SENTENCES, r"\p{N}")),
    PreTokenizer(("chameleon",), ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", "[\\t\\n]|    |  ", r"\p{N}",
                                  r"[\p{P}!-/:-@\[-`{-~]", GPT2),
                 begins=True),
    PreTokenizer(("jais-2",), (
        rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|"
        + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"|\s",)),
    PreTokenizer(("spark2_5",), (THREE, _CHINESE, rf"{_MARKED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    PreTokenizer(("youtu",), ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CHINESE, _anycase(r"\p{N}")), whole=True,
                 published=("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CHINESE, _published(r"\p{N}"))),
    PreTokenizer(("tiny_aya", "cohere2moe"), (_THREES, _anycase(THREE)), 
                 published=(r"\d{1,3}(?=(?:\d{3})*\b)", _published(THREE))),
    PreTokenizer(("afmoe",), (_THREES, "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+", _DEEPSEEK)),
    PreTokenizer(("superbpe",), (r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))")),
    PreTokenizer(("bailingmoe", "bailingmoe2", "llada-moe"), (
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    PreTokenizer(("seed-coder",), (
        rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    PreTokenizer(("ufakzeka",), (_words(r"\p{N}", start=""),)),
    PreTokenizer(("laguna",), (_LINES, QWEN2)),
    PreTokenizer(("exaone-moe",), (
        rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)),
    PreTokenizer(("minicpm5",), (THREE, _words(r"\p{N}+")), whole=True),
    PreTokenizer(("gemma4", "granite-embed-multi-311m"), (_LINES,), bytes=False, begins=True),
    PreTokenizer(("sarvam-moe",), (_LINES,), bytes=False),
    PreTokenizer(("whitespace",), (r"\S+",), bytes=False),
)  # fmt: skip
PRE_TOKENIZERS = {name: row for row in ROWS for name in row.names}
ESCAPED = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")  # pre-tokenizers before which spaces are replaced by ▁
