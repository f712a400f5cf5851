"""Test strings on which a checkpoint's tokenizer and the one in a GGUF file must agree before the file is written.

ORDINARY strings are of all kinds found in texts; a difference on one of them is an error. RARE strings are those on which
llama.cpp's pre-tokenizers are known to only approximate some published expressions: letters with combining marks, words in
which the case of non-ASCII letters changes, text that is not in NFC.
"""

from collections.abc import Iterable

_NUMBERS = [
    "0", "7", "42", "123", "1234", "12345", "123456", "1234567", "12345678", "1234567890123", "3.14159", "1,000,000", "-17",
    "2026-11-29", "12:34:56", "50%", "x2", "2x", "a1b22c333d4444", "0x1F4", "1e-5", "v1.2.3", "²", "½ cup", "Ⅳ", "٣٤٥",
    "१२३४", "1234abcd5678", " 12", "  1234", "12 ", "1 22 333 4444", "$1,234.56", "No. 5", "007", "10th", "iPhone12",
]  # fmt: skip
_SHORTENED = [
    "I'm", "don't", "he'll we've they're I'd it's", "I'M", "DON'T", "HE'LL WE'VE THEY'RE I'D IT'S", "'tis", "rock'n'roll",
    "o'clock", "l'été", "d'accord", "'s", "''s", "'S 'T 'RE", "can’t won’t", "Turkey'nin", "'hello' 'world'", "y'all'd've",
    "x's2",
]  # fmt: skip
_SPACES = [
    " ", "  ", "   ", "    ", "\t", "\t\t", " \t ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", " \n", "\n ", "  \n  ",
    "a b", "a  b", "a   b", "a    b", " a", "  a", "   a", "a ", "a  ", "a\nb", "a\n\nb", "a \n b", "a\n  b", "a\n\tb",
    "a\t\tb", "a \n\n\n b", "a\r\nb", "\ta", " \ta", "end.\n\nNext", "x\n    y\n        z", "a\u00a0b", "a\u2003b",
    "a\u3000b", "a\u200bb", " \n \n ", "a  \n", "!\n\n", "! \n", "a" + " " * 17 + "b", " " * 40, "\n" * 9, "\t" * 5 + "x",
]  # fmt: skip
_SIGNS = [
    "!", "?!", "...", "…", "--", "—", "a-b", "a - b", "(a)", "[x]", "{y}", "<z>", "a/b", "C:\\path", "user@example.com",
    "https://example.com/a?b=c&d=1", "#tag", "@name", "a_b", "__init__", "a*b", "**bold**", "`code`", "~", "^", "|", "a|b",
    "\"quoted\"", "“quoted”", "«q»", "‘q’", "a;b", "a:b", "a,b", "$x", "€5", "£3", "¥", "©", "°C", "±", "×", "→", "≤", "∑",
    "!!!", "???", " !", " ,", ". .", "a.b.c", "Mr. X", "U.S.A.", "e.g.", "a&b", "==", "!=", "+=", "=>", "->", "::", "//",
    "/*", "*/", "<!--", "-->", "\\n", "%d", "a=1", ")]}", "~~~", "$$", "<|", "|>", "</", "<unk", "[IN", "▁", "▁a", "##x",
    "Ġ",
]  # fmt: skip
_WORDS = [
    "a", "A", "the", "The", "THE", "hello", "Hello world", "HELLO WORLD", "helloWorld", "HelloWorld", "HTTPServer",
    "getHTTPResponse2", "snake_case_name", "kebab-case", "The quick brown fox jumps over the lazy dog.",
    "internationalization", "antidisestablishmentarianism", "a" * 30, "ab" * 20, "iOS macOS", "LaTeX", "McDonald", "eBay",
    "x", "Q&A", "Ph.D.", "naïve café", "résumé", "Ærø", "straße", "Österreich", "ñandú", "façade", "Łódź", "İstanbul ılık",
    "Ångström", "mañana", "Århus", "coöperate", "über", "ÀÉÎÕÜ", "ÇA VA",
]  # fmt: skip
_SCRIPTS = [
    "Привет, мир!", "Москва 2026", "Καλημέρα κόσμε", "Ελλάδα", "שלום עולם", "مرحبا بالعالم", "你好，世界！",
    "中文测试123", "我今天很高兴。", "日本語のテスト", "こんにちは", "カタカナ", "ｶﾀｶﾅ",
    "한국어 테스트", "안녕하세요", "გამარჯობა", "Հայերեն", "ⴰⵣⵓⵍ", "中a文b", "hello世界",
    "русский english", "，。！？", "「引用」", "Ａｂｃ１２", "ﬁn", "①②", "ㄅㄆㄇ", "㍿", "々", "ー", "𝔘𝔫𝔦", "𐍈", "ℕ", "ª º",
]  # fmt: skip
_EMOJI = [
    "😀", "😀😀", "a😀b", " 😀", "👍🏽", "👩\u200d👩\u200d👧", "🇩🇪", "❤️", "☃", "✓ done",
    "🤖 beep 12", "🧑\u200d🚀", "⌘", "★★", "1️⃣",
]  # fmt: skip
_CODE = [
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < 10; ++i) {\n\tsum += a[i];\n}", "if x == 1 and y != 2:",
    "print(f\"{name!r}: {value:>10.3f}\")", "const x = async () => await y?.z ?? 1;", "SELECT * FROM t WHERE a = 'b';",
    "#include <stdio.h>", "git commit -m \"msg\" && git push", "/* c */ // d", "<div class=\"a\">b</div>",
    "{\"k\": [1, 2.5, null, true]}", "\\frac{a}{b} $x^2$", "x = [i for i in range(10)]",
    "\t\tself.x = None\n\n\n    def g():", "import os\r\nimport sys\r\n", "| a | b |\n|---|---|\n| 1 | 2 |",
    "- item\n- item 2\n  - nested", "# Title\n\nText\n\n## Sub", "a = b;  // c\n\n", "0b1010 | 0o17",
]  # fmt: skip
ORDINARY = tuple(
    dict.fromkeys([*_NUMBERS, *_SHORTENED, *_SPACES, *_SIGNS, *_WORDS, *_SCRIPTS, *_EMOJI, *_CODE, *(f" {w}" for w in _WORDS)])
)  # fmt: skip
RARE = (
    "नमस्ते दुनिया", "ภาษาไทย", "বাংলা ভাষা", "தமிழ் மொழி", "తెలుగు", "ខ្មែរ", "မြန်မာ", "ລາວ", "עִבְרִית", "مُحَمَّد",
    "e\u0301te\u0301", "A\u030angstro\u0308m", "한국", "straßeÄpfel", "ÉcoleÉcole", "приветМир", "ПриветМИР", "ΕλλάδαΚόσμε",
    "naïveÉTÉx", "ДОМа", "ÄÖÜäöü", "\u0301a", "a\u0301\u0302b",
)  # fmt: skip
MOST_TOKENS = 600  # added tokens that are tested; of more, a sample


def around(token: str) -> list[str]:
    """Test strings with an added token at the beginning, at the end and inside."""
    return [token, f"a{token}b", f"x {token} y", f"{token} Hi", f"Hi\n{token}\nHi", f"{token}{token}", f"1{token}2"]


def beside(tokens: Iterable[str]) -> list[str]:
    """Test strings for added tokens, or for a sample if there are many."""
    known = list(tokens)
    some = known[:: max(1, len(known) // MOST_TOKENS)] if len(known) > MOST_TOKENS else known
    return [text for token in some for text in around(token)]
