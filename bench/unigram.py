"""Unigram tokenizers: whether llama.cpp cuts text as a checkpoint's tokenizer does, and as the one read back from the file.

    python -m bench.unigram [--pieces 2000]

sentencepiece trains pieces on ../shared/text/wiki.txt, with its own table of replacements (nmt_nfkc); they become an
XLM-RoBERTa with random weights and its GGUF file. Needs ../shared, `bench/peers/install.sh llamacpp`, and `pip install
sentencepiece protobuf`.
"""

import argparse
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from bench.gguf_vs_llamacpp import tokenized
from bench.measure import OUT, SHARED, table
from bitwright.models.gguf_source import read_tokenizer
from bitwright.pipeline.conversion import convert

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
NAMES = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
MOST = 1_500_000  # bytes of each text


def trained(pieces: int, work: Path) -> Any:
    """sentencepiece's model of so many pieces."""
    trainer = importlib.import_module("sentencepiece").SentencePieceTrainer
    trainer.train(
        input=str(SHARED / "text/wiki.txt"),
        model_prefix=str(work / "m"),
        vocab_size=pieces,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        input_sentence_size=20000,
        minloglevel=2,
    )
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString((work / "m.model").read_bytes())
    return model


def checkpoint(model: Any, folder: Path) -> None:
    """An XLM-RoBERTa with that tokenizer, as transformers saves both."""
    vocab = [(token, 0.0) for token in SPECIAL] + [(p.piece, p.score) for p in model.pieces[3:]] + [("<mask>", 0.0)]
    inner = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=False))
    inner.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    inner.decoder = decoders.Metaspace()
    around = [("<s>", 0), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", around)
    names = {f"{name}_token": token for name, token in NAMES.items()}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("xlm-roberta", vocab_size=len(vocab), max_position_embeddings=66, **shape)
    AutoModel.from_config(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=2000)
    args = parser.parse_args()
    work = OUT / "unigram"
    shutil.rmtree(work, ignore_errors=True)
    (work / "model").mkdir(parents=True)
    model = trained(args.pieces, work)
    checkpoint(model, work / "model")
    convert(work / "model", work / "a.gguf")
    first, back = AutoTokenizer.from_pretrained(work / "model"), read_tokenizer(work / "a.gguf")
    rows = []
    for name in ("wikitext2_raw_test.txt", "c4.txt", "code.txt"):
        raw = (SHARED / "text" / name).read_bytes()[:MOST]
        some = work / name
        some.write_bytes(raw[: raw.rindex(b"\n")])
        ids = first(some.read_bytes().decode())["input_ids"]
        alike = [
            ids == tokenized(work / "a.gguf", some, "--no-escape"),  # or it takes what looks like escapes for them
            ids == back(some.read_bytes().decode())["input_ids"],
        ]
        rows.append([name, f"{len(ids):,}", *(json.dumps(same) for same in alike)])
    print(f"table of replacements: {len(model.normalizer_spec.precompiled_charsmap):,} bytes")
    print(table(["text", "tokens", "llama.cpp's alike", "read back alike"], rows))


if __name__ == "__main__":
    main()
