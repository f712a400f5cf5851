"""Models whose blocks are given several hidden states and further inputs."""

from pathlib import Path

import torch
from bench.gguf_families import random_model

from bitwright.calibration.embedding_statistics import observe_embedding, observe_head
from bitwright.models.streamed import StreamedModel


def test_embedding_and_head_have_grams_of_their_own_width(tmp_path: Path) -> None:
    """Gemma 3n: four states of 64 and a layer's inputs arrive; the head gets one, the embedding is the first."""
    model = random_model("gemma3n_text", num_hidden_layers=4, vocab_size=257, bos_token_id=256, eos_token_id=256)
    model.save_pretrained(tmp_path)
    streamed, ids = StreamedModel(tmp_path), torch.arange(24)[None] * 7 % 256
    skeleton, hidden = streamed.skeleton, streamed.hidden(ids)
    inputs = list[torch.Tensor]()
    model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    model(ids)
    head = observe_head(skeleton, hidden).gram
    assert head is not None and torch.allclose(head, inputs[0].T @ inputs[0] / 24, rtol=1e-3, atol=1e-4)
    streamed.load(skeleton.state_names(0))
    embedding = observe_embedding(skeleton, [skeleton.embed(ids)]).gram
    assert embedding is not None and embedding.shape == (64, 64) and bool(embedding.diagonal().gt(0).all())
