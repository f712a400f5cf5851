"""Packed conversations: models that keep them apart, and those that would see one through another."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from bitwright.train import finetune as module
from bitwright.train.data import IGNORED
from bitwright.train.finetune import ONE_BY_ONE, finetune
from bitwright.train.settings import Training

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=259
)  # fmt: skip
BLOOM = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=259, hidden_dropout=0.5)
MAMBA = MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=259)
FAMILIES: list[tuple[type[PreTrainedModel], object, bool]] = [
    (LlamaForCausalLM, LLAMA, True), (BloomForCausalLM, BLOOM, False), (MambaForCausalLM, MAMBA, False)
]  # fmt: skip


@pytest.mark.parametrize(("family", "config", "apart"), FAMILIES, ids=["llama", "bloom", "mamba"])
def test_the_loss_is_that_of_conversations_that_stand_alone(
    family: type[PreTrainedModel],
    config: object,
    apart: bool,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = family(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # what is before a text must show in it
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    said = [("Who?", "I, number 1."), ("What is that?", "It is a fox."), ("Where?", "At the well."), ("Why?", "So.")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    lines = [json.dumps({"messages": messages}) for messages in [*chats * 8, *chats]]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(module, "best_dtype", lambda: torch.float32)
    how = Training(scheme="float", rank=2, steps=1, batch=1, seqlen=128, lr=1e-9)
    report = finetune(tmp_path / "model", tmp_path / "out", data=str(tmp_path / "chats.jsonl"), how=how)
    assert (ONE_BY_ONE in report.notes) is not apart
    lost, count = 0.0, 0
    for messages in chats[1:]:  # the last three of 36 are held out
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt").input_ids
        begin = len(tokenizer(tokenizer.apply_chat_template(messages[:1], tokenize=False) + "<assistant>").input_ids)
        labels = ids.clone()
        labels[:, :begin] = IGNORED
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        lost += float(nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"))
        count += int((labels[0, 1:] != IGNORED).sum())
    assert report.loss_before == pytest.approx(lost / count, rel=1e-3)
