"""Checkpoints to test on: small random ones of several families made here, trained ones where they are present."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: as the command line does
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from bitwright.gguf.reader import GgufFile
from bitwright.kernels import native
from bitwright.nn import native as layers_in_native_code

ISAS = [] if native is None else native.names()
SHARED = Path(__file__).parents[2] / "shared"
TEXT = "".join(
    f"{i}. The quick brown fox jumps over {i * i} lazy dogs; then {1 / (i + 1):.9f} (again)!\n" for i in range(60)
)
SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None,
}  # fmt: skip
GPT2 = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": True},
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "phi": SIZES,
    "phi3": {**SIZES, "pad_token_id": 256},
    "gemma": {**SIZES, "head_dim": 16},
    "gemma2": {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {
        **SIZES,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 4,
    },
    "gpt2": GPT2,
    "gpt_neox": {**SIZES, "num_key_value_heads": None},
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "starcoder2": SIZES,
}
BERT = {
    key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
}
PADDED = {**BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 66}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**PADDED, "vocab_size": 262},
    "xlm-roberta": PADDED,
    "distilbert": {
        "vocab_size": 257, "dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64,
    },
}  # fmt: skip


def save_tokenizer(folder: Path, **options: Any) -> None:
    """A tokenizer of single bytes and an end-of-text token, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<eos>": 256}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<eos>", eos_token="<eos>", **options)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def save_wordpiece(folder: Path) -> None:
    """BERT's kind of tokenizer, of single letters, digits and signs, and a few pieces."""
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters if letter.isalnum()), "the", "##own", "fox"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    around = [("[CLS]", 2), ("[SEP]", 3)]
    pieces.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", around)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)


def save_roberta(folder: Path) -> None:
    """RoBERTa's kind of tokenizer, of single bytes and "th"."""
    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special.values(), *alphabet, "th"]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("t", "h")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {f"{name}_token": token for name, token in special.items()} | {"cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)


def charsmap(replacements: dict[str, str]) -> bytes:
    """A table of replacements as sentencepiece compiles it: a double array of UTF-8 prefixes, and the strings behind it.

    A node's children lie at (its place ^ its offset) ^ byte; a word's end is the child of byte 0, which holds where its
    replacement begins.
    """
    trie: dict[int, Any] = {}
    strings = b""
    for text, other in replacements.items():
        node = trie
        for byte in text.encode():
            node = node.setdefault(byte, {})
        node[0] = len(strings)
        strings += other.encode() + b"\0"
    units = np.zeros(4096, np.uint32)
    taken = {0}
    waiting = [(0, trie)]
    while waiting:
        place, node = waiting.pop()
        base = next(b for b in range(1, len(units) - 256) if not {b ^ byte for byte in node} & taken)
        taken |= {base ^ byte for byte in node}
        units[place] |= (place ^ base) << 10 | (0 in node) << 8
        for byte, child in node.items():
            units[base ^ byte] = byte if byte else 1 << 31 | child
            waiting += [(base ^ byte, child)] if byte else []
    return len(units.tobytes()).to_bytes(4, "little") + units.tobytes() + strings


def save_unigram(folder: Path, *, words: bool = True) -> None:
    """XLM-RoBERTa's kind of tokenizer: pieces with scores, some replacements before; words: cut at spaces, or these joined."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [chr(i) for i in range(33, 127)]
    pieces = ["▁", "▁the", "▁fox", "own", "br", "▁br", "ow", "og", "▁d", "s", "ö", "▁1", *letters]
    vocab = [(token, 0.0) for token in special] + [(p, -2.0 - i * 0.05) for i, p in enumerate(dict.fromkeys(pieces))]
    unigram = Tokenizer(models.Unigram([*vocab, ("<mask>", 0.0)], unk_id=3, byte_fallback=False))
    spaces = dict.fromkeys(
        "\n\r\t\x0b\x0c\x85\xa0\u2009\u2028\u200a\u202f\u2003\u2002\u3000", " "
    )  # as nmt_nfkc has them
    table = normalizers.Precompiled(charsmap({**spaces, "Ａ": "A", "ﬁ": "fi", "…": "..."}))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    joined = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    unigram.normalizer = table if words else normalizers.Sequence([table, *joined])
    unigram.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace]) if words else metaspace
    )
    unigram.decoder = decoders.Metaspace()
    around = [("<s>", 0), ("</s>", 2)]
    unigram.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", around)
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=unigram, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)


TOKENIZERS = {
    "bert": save_wordpiece,
    "roberta": save_roberta,
    "xlm-roberta": save_unigram,
    "distilbert": save_wordpiece,
}


def make_checkpoint(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **changes: Any
) -> Path:
    """A random model of a family, saved as transformers saves it."""
    torch.manual_seed(0)
    options = {k: v for k, v in {**(ENCODERS | FAMILIES)[family], **changes}.items() if v is not None}
    maker = AutoModel if family in ENCODERS else AutoModelForCausalLM
    model = maker.from_config(AutoConfig.for_model(family, **options), dtype=dtype)
    with torch.no_grad():  # biases and norms that are all 0 or 1 would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    TOKENIZERS.get(family, save_tokenizer)(folder)
    return folder


def random_blocks(kind: str, N: int, K: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows of blocks [N, bytes] of a type that is only read: any bytes, under scales that make weights of a usual size."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (N * K // block, size), dtype=np.uint8)
    outer = rng.uniform(5e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint16)
    if kind == "NVFP4":
        blocks[:, :4] = rng.choice([*range(20), 0x7F], (len(blocks), 4))
    elif kind == "IQ1_M":
        words = blocks[:, 48:].view(np.uint16)
        blocks[:, 48:] = (words & 0xFFF | (outer >> np.arange(0, 16, 4, dtype=np.uint16)) << 12).view(np.uint8)
    else:
        blocks[:, :2] = outer.view(np.uint8)
    return blocks.reshape(N, -1)


def carry_keys(writer: gguf.GGUFWriter, file: GgufFile) -> None:
    """All keys of a file, but its architecture, which the writer has, and what is empty."""
    for key, value in file.keys.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        if key != "general.architecture" and plain != []:
            kind, inner = file.kinds[key]
            types = gguf.GGUFValueType(kind), None if inner is None else gguf.GGUFValueType(inner)
            writer.add_key_value(key, plain, *types)


def in_blocks(source: Path, out: Path, kind: str) -> Path:
    """A float GGUF file with each of its matrices replaced by random blocks of a type that is only read."""
    file = GgufFile(source)
    writer = gguf.GGUFWriter(out, file.keys["general.architecture"])
    carry_keys(writer, file)
    for seed, (name, t) in enumerate(file.tensors.items()):
        if len(t.shape) == 1:
            writer.add_tensor(name, file.read(name).float().numpy())
        else:
            blocks = random_blocks(kind, *t.shape, seed=seed)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """BITWRIGHT_TEST_DTYPE=bfloat16: calibration computes as on a processor that has it. See `make processors`."""
    wanted = os.environ.get("BITWRIGHT_TEST_DTYPE")
    if wanted:
        monkeypatch.setattr("bitwright.plan.preflight.best_dtype", lambda _: getattr(torch, wanted))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has, in turn in force."""
    assert native is not None
    before = native.current()
    native.choose(request.param)
    yield request.param
    native.choose(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with tied embeddings, bfloat16; K divides by 64."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of some thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Trained checkpoints and texts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the shared checkpoints are not here")
    return SHARED


@pytest.fixture(params=["torch", *(["native"] if native else [])])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Integer layers in torch and in native code; which types torch is then seen to multiply."""
    if request.param == "native":
        return set()
    monkeypatch.setattr(layers_in_native_code, "native", None)
    return {torch.int8}
