"""The rotation of a whole model (see methods/rotate.py): which parameters are multiplied by what.

It is exact where every block reads the residual stream through RMS norms and adds outputs of plain matrices to it. Norms
behind those matrices (Gemma 2 and 3), norms that subtract a mean, and learned positions added to the stream do not commute
with a rotation. Before anything is rounded, `check` runs the first block both ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import RecipeError
from bitwright.methods.rotate import Rotate, by_heads, undone_online
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.hadamard import block_of
from bitwright.numerics.input_quantization import InputQuantization

# Model type -> what its norms add to their weights.
ROTATABLE = {"llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "phi3": 0.0, "gemma": 1.0}
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
VALUES, VALUES_READER = ("self_attn.v_proj", "self_attn.qkv_proj"), "self_attn.o_proj"
ONLINE = "mlp.down_proj"
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
MOVED = 1e-3  # largest relative difference between the two ways, in float32


@dataclass(frozen=True)
class Rotation:
    """A model's rotation. rotate: options; offset: 1 where norms multiply by 1 + weight; groups, head: value heads, size."""

    rotate: Rotate
    offset: float
    groups: int
    head: int

    @classmethod
    def of(cls, rotate: Rotate, config: PretrainedConfig) -> "Rotation":
        """The rotation for a model of this config. RecipeError for an architecture that cannot be rotated exactly."""
        kind = config.model_type
        if kind not in ROTATABLE:
            message = f"models of type {kind!r} cannot be rotated exactly"
            raise RecipeError(message, where="rotate", remedy=f"leave out rotate; it serves {', '.join(ROTATABLE)}")
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(rotate, ROTATABLE[kind], getattr(config, "num_key_value_heads", None) or heads, head)

    def online_block(self, module: str, K: int) -> int:
        """Block length of the online rotation of a module's inputs; 0: none."""
        return block_of(K) if self.rotate.online and module.endswith(f".{ONLINE}") else 0

    def block(self, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The parameters of a block, whose names begin with `prefix`, rotated: norms in their own type, matrices float32."""
        now = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        for norm, readers in READERS.items():
            gamma = now[f"{norm}.weight"].float() + self.offset
            for name in (f"{reader}.weight" for reader in readers):
                if name in now:
                    now[name] = self.rotate.reading(now[name], gamma)
            now[f"{norm}.weight"] = torch.full_like(now[f"{norm}.weight"], 1 - self.offset)
        for name in (f"{writer}.{leaf}" for writer in WRITERS for leaf in ("weight", "bias")):
            if name in now:
                now[name] = self.rotate.writing(now[name])
        for name in (f"{values}.{leaf}" for values in VALUES for leaf in ("weight", "bias")):
            if name in now:
                now[name] = self._values(now[name])
        now[f"{VALUES_READER}.weight"] = by_heads(now[f"{VALUES_READER}.weight"], self.head, rows=False)
        if self.rotate.online:
            now[f"{ONLINE}.weight"] = undone_online(now[f"{ONLINE}.weight"])
        return {prefix + name: tensor for name, tensor in now.items()}

    def _values(self, made: Tensor) -> Tensor:
        """A matrix or bias whose last rows make the values (a fused one has queries and keys before): rotated by heads."""
        kept, rows = made[: len(made) - self.groups * self.head], made[len(made) - self.groups * self.head :]
        rotated = by_heads(rows, self.head, rows=True) if rows.ndim == 2 else by_heads(rows, self.head, rows=False)
        return torch.cat([kept.float(), rotated])

    def outer(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters outside the blocks, rotated, as far as they are given.

        The last norm's weights are folded into the head, so both must be given together.
        """
        now = dict(weights)
        if EMBEDDING in now:
            now[EMBEDDING] = self.rotate.embedding(now[EMBEDDING])
        if LAST_NORM in now:
            if HEAD in now:
                now[HEAD] = self.rotate.reading(now[HEAD], now[LAST_NORM].float() + self.offset)
            now[LAST_NORM] = torch.full_like(now[LAST_NORM], 1 - self.offset)
        return now

    @torch.no_grad()
    def check(self, skeleton: Skeleton, weights: Mapping[str, Tensor], hidden: Tensor) -> None:
        """RecipeError unless the rotated first block maps rotated inputs [B, T, H] to rotated outputs.

        weights: the block's float parameters by name, none of which remain loaded; `skeleton.embed` must have run on a batch
        of this shape.
        """
        prefix = f"{skeleton.block_prefix}.0."
        skeleton.load(dict(weights))
        plain = skeleton.run(0, hidden)
        skeleton.load(self.block(weights, prefix))
        shapes = {name: weights[f"{name}.weight"].shape for name in skeleton.linears(0)}
        blocks = {name: self.online_block(name, shape[1]) for name, shape in shapes.items()}
        with skeleton.quantizing_inputs({name: InputQuantization(rotate=block) for name, block in blocks.items()}):
            after = skeleton.run(0, self.rotate.embedding(hidden).to(hidden.dtype))
        skeleton.unload(0)
        meant = self.rotate.embedding(plain.float())
        moved = (after.float() - meant).norm() / (plain.float() - hidden.float()).norm().clamp(min=1e-30)
        if not bool(moved < MOVED):
            raise RecipeError(
                "the first block does not commute with a rotation", where="rotate", remedy="leave out rotate"
            )
