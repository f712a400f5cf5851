"""Base class of quantized layers that replace float ones: they have the same attributes (in_features, kernel_size, …)."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitwright.errors import RecipeError

# Attributes that are copied from a float layer, by its class.
DESCRIBED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
         "groups", "padding_mode"),
    ),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
                      "sparse", "mode", "include_last_offset"),
    **dict.fromkeys(
        (nn.LSTM, nn.GRU, nn.RNN),
        ("mode", "input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size"),
    ),
    nn.MultiheadAttention: ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "batch_first", "dropout"),
}  # fmt: skip


class Replacement(nn.Module):
    """A quantized layer that replaces a float one.

    dtype  dtype of the output, that of the float layer. `.half()` and the like change only this, not codes and scales
    """

    dtype: torch.dtype

    def describe(self, source: nn.Module) -> None:
        """Copy dtype and descriptive attributes from the float layer."""
        parameter = next(source.parameters(), None)
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        for kind, names in DESCRIBED.items():
            if isinstance(source, kind):
                vars(self).update({name: getattr(source, name) for name in names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but the dtypes of buffers (codes, scales) do not change."""

        def apply(x: Tensor) -> Tensor:
            moved = fn(x)
            if x.is_floating_point() and moved.dtype != x.dtype:
                return x.to(moved.device)
            return moved

        self.dtype = fn(torch.zeros(0, dtype=self.dtype)).dtype
        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            remedy = "change the float module's and quantize it again"
            raise RecipeError(
                "the weight is stored as codes and cannot be set", where=type(self).__name__, remedy=remedy
            )
        super().__setattr__(name, value)
