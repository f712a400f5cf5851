"""Train weights that are stored in 8 bits: decoded for the forward and the backward pass, written back by stochastic rounding.

A weight is int8 codes under a scale for each row. Forward decodes it to 16 bits (or float32), layer by layer; what autograd
would keep of it for the way back is decoded again there, so that no float copy stays. When its gradient has arrived, the
parameter `weight` is decoded for the optimizer, whichever that is; before it is needed next, what the optimizer changed is
added to the stored weight and rounded up or down with probabilities that keep the mean (Gupta et al. 2015,
arXiv:1502.02551): steps far smaller than a code add up. Rounded to nearest they would all be lost.

A row's scale changes only if its largest weight leaves the codes' range, or falls below half of it: under a scale that moved
every time, all weights of the row would be rounded anew, and their noise would add up instead.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._pytree import tree_map

from bitwright.errors import RecipeError
from bitwright.inference.lookup import moved
from bitwright.nn.tree import Around, off_the_fast_path
from bitwright.system.device import best_dtype

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
LARGEST = 127
ROOM = 1.05  # how far a new scale lets the largest weight grow


def store_in_8_bits(
    module: nn.Module, *, dtype: torch.dtype | None = None, stochastic: bool = True, seed: int = 0
) -> nn.Module:
    """Store the weights of Linear, Conv1d, Conv2d and Embedding layers in 8 bits, in place; returns the module.

    Then train as ever: parameters keep their places in `parameters()`, for any optimizer made after this call that takes one
    gradient a step. LBFGS takes several, at points of its own choice, and compares them: where rounding moves these points by
    more than it goes between them, it diverges. DistributedDataParallel needs init_sync=False and the same module in each
    process: it would begin by sending parameters, which have no memory.
    dtype       of decoded weights, products and gradients; None: bfloat16 where it is fast, else float32. Layers take inputs of
                any float type, and give results of that type
    stochastic  False rounds updates to nearest, by which training stalls: for comparison
    seed        of the rounding
    Raises RecipeError for a module without such layers, or where layers share a weight.
    """
    layers = [(name, child) for name, child in module.named_modules() if type(child) in KINDS]
    if not layers:
        raise RecipeError("no Linear, Conv1d, Conv2d or Embedding layers inside", remedy="give a module that has some")
    owners: dict[int, str] = {}
    for name, layer in layers:
        first = owners.setdefault(id(layer.weight), name)
        if first != name:
            remedy = "untie them first: layer.weight = nn.Parameter(layer.weight.clone())"
            raise RecipeError(f"{name} shares its weight with {first}", where=name, remedy=remedy)
    stored = {
        name: StoredLayer(layer, dtype or best_dtype(), stochastic=stochastic, seed=seed * 1_000_003 + i)
        for i, (name, layer) in enumerate(layers)
    }
    if "" in stored:
        return stored[""]
    for name, layer in stored.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, layer)
    return off_the_fast_path(module)


def decode_from_8_bits(module: nn.Module) -> nn.Module:
    """Undo `store_in_8_bits`, in place: plain layers with the decoded weights in float32, for `convert` and the like."""
    if isinstance(module, StoredLayer):
        return module.plain()
    for name, child in list(module.named_modules()):
        if isinstance(child, StoredLayer):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, child.plain())
    return module


class StoredLayer(Around):
    """A layer whose weight [N, ...] is stored as codes int8 under scales [N], float32.

    `weight` is a parameter without memory of its own, but for the time from its gradient's arrival to the next use. Else a
    single NaN stands for all of it, so that nobody computes with what is not there.
    """

    AROUND = "body"
    codes: Tensor
    scale: Tensor
    updates: Tensor

    def __init__(self, layer: nn.Module, dtype: torch.dtype, *, stochastic: bool, seed: int) -> None:
        super().__init__()
        original = layer.get_parameter("weight")
        weight = original.detach().float()
        self.dtype, self.given = dtype, original.dtype
        self.stochastic, self.seed = stochastic, seed
        scale = _scale(weight.flatten(1))
        self.register_buffer("scale", scale)
        self.register_buffer("codes", torch.round(weight / _along(scale, weight)).to(torch.int8))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))  # the rounding's place in its random numbers
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=weight.device))
        self.waiting = False  # whether the parameter is decoded, for an optimizer to change it
        self.body = layer
        layer.register_parameter("weight", None)
        self._leave()
        self.weight.register_post_accumulate_grad_hook(self._enter)
        self.weight.requires_grad_(original.requires_grad)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward, in `dtype`; the result has the input's type, or behind an index the original weight's."""
        self.settle(used=torch.is_grad_enabled())
        weight = _Decoded.apply(self.weight, self)  # type: ignore[no-untyped-call]
        place = weight.untyped_storage().data_ptr()

        def pack(kept: Tensor) -> Any:
            same = kept.untyped_storage().data_ptr() == place
            return (kept.shape, kept.stride(), kept.storage_offset()) if same else kept

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.decoded().as_strided(*kept)

        more = {name: p.to(self.dtype) for name, p in self.body.named_parameters()}
        floats = [x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        args, kwargs = tree_map(self._cast, (args, kwargs))
        with saved_tensors_hooks(pack, unpack):
            out: Tensor = functional_call(self.body, {"weight": weight, **more}, args, kwargs)
        return out.to(floats[0] if floats else self.given)

    def _cast(self, x: Any) -> Any:
        """A float tensor in `dtype`; anything else as it is."""
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def decoded(self) -> Tensor:
        """The stored weight, in `dtype`."""
        return (self.codes.float() * _along(self.scale, self.codes)).to(self.dtype)

    @torch.no_grad()
    def settle(self, *, used: bool = True) -> None:
        """Write back what an optimizer has changed, if there is anything.

        used: by a pass whose gradient is to come. Otherwise a parameter that nothing has changed goes on waiting: a module
        may be judged, copied or saved between its backward pass and the optimizer's step.
        """
        if not self.waiting:
            self._leave()  # a copy or a move of the module may have given the parameter memory
            return
        change = self.weight.detach().float() - self.decoded().float()
        if not change.any():
            if used:
                self._leave()
            return
        wanted = self.codes.float() * _along(self.scale, self.codes) + change
        rows = wanted.flatten(1).abs().amax(1) / self.scale
        moved = (rows > LARGEST) | (rows < LARGEST / 2)
        scale = torch.where(moved, _scale(wanted.flatten(1)) * ROOM, self.scale)
        self.codes.copy_(self._rounded(wanted / _along(scale, wanted)).clamp_(-LARGEST, LARGEST).to(torch.int8))
        self.scale.copy_(scale)
        self.updates += 1
        self._leave()

    def _rounded(self, x: Tensor) -> Tensor:
        """x rounded to one of its two neighbours, with probabilities that keep the mean; or to the nearer."""
        if not self.stochastic:
            return torch.round(x)
        seed = (self.seed << 24) + int(self.updates)
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.floor(x + torch.rand(x.shape, generator=generator, device=x.device))

    def _enter(self, _: Tensor) -> None:
        """Decode the parameter, for the optimizer's step."""
        if not self.waiting:
            self.weight.data, self.waiting = self.decoded(), True

    def _leave(self) -> None:
        """Free the parameter's memory."""
        nothing = torch.full((), float("nan"), dtype=self.dtype, device=self.codes.device)
        self.weight.data = nothing.expand(self.codes.shape)
        self.waiting = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredLayer":
        """Move the layer. Whatever type the module is given, scales stay in float32, and the parameter and its gradient in
        `dtype`: a weight that waits for an optimizer, or to be written back, would be rounded."""

        def moves(t: Tensor) -> Tensor:
            kept = t is self.scale or t is self.weight or t is self.weight.grad
            return moved(t, fn) if kept else fn(t)

        super()._apply(moves, recurse)  # type: ignore[no-untyped-call]
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; a parameter comes back without its hook."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight.register_post_accumulate_grad_hook(self._enter)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredLayer":
        """A copy whose parameter is decoded for its own optimizer."""
        self.settle(used=False)
        body = copy.deepcopy(self.body, memo)
        body.register_parameter("weight", nn.Parameter(self.decoded(), requires_grad=self.weight.requires_grad))
        made = StoredLayer(body, self.dtype, stochastic=self.stochastic, seed=self.seed)
        made.given = self.given
        for mine, own in zip(made.buffers(recurse=False), self.buffers(recurse=False), strict=True):
            mine.copy_(own)
        memo[id(self)] = made
        return made

    def plain(self) -> nn.Module:
        """The layer itself, with its weight in float32."""
        self.settle(used=False)
        weight = self.codes.float() * _along(self.scale, self.codes)
        self.body.register_parameter("weight", nn.Parameter(weight, requires_grad=self.weight.requires_grad))
        return self.body

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle(used=False)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._leave()
        super()._load_from_state_dict({**state_dict, f"{prefix}weight": self.weight.data}, prefix, *args)
        self._leave()


class _Decoded(torch.autograd.Function):
    """The decoded weight, whose gradient goes to the parameter."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: StoredLayer) -> Tensor:
        return layer.decoded()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _scale(rows: Tensor) -> Tensor:
    """A scale for each row [N, K]: its largest weight is the largest code. 1 for a row of zeros."""
    largest = rows.abs().amax(1) / LARGEST
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def _along(scale: Tensor, like: Tensor) -> Tensor:
    """Scales [N] in a shape that broadcasts to a weight [N, ...]."""
    return scale.view(-1, *[1] * (like.ndim - 1))
