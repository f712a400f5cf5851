"""Checkpoints to test on: small random ones of several families made here, trained ones where they are present."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: as the command line does

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

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


def make_checkpoint(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **changes: Any
) -> Path:
    """A random model of a family, saved as transformers saves it."""
    torch.manual_seed(0)
    encoder = family == "bert"
    options = {k: v for k, v in {**(BERT if encoder else FAMILIES[family]), **changes}.items() if v is not None}
    maker = AutoModel if encoder else AutoModelForCausalLM
    model = maker.from_config(AutoConfig.for_model(family, **options), dtype=dtype)
    with torch.no_grad():  # biases and norms that are all 0 or 1 would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    (save_wordpiece if encoder else save_tokenizer)(folder)
    return folder


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
