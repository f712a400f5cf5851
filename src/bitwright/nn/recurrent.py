"""Dynamically quantized LSTM, GRU and RNN: integer products of all inputs at once, of the state at each step; float gates."""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bitwright.errors import SchemeError
from bitwright.nn.dropin import Replacement
from bitwright.nn.layers import DynamicProduct
from bitwright.nn.native import handles

Recurrent = nn.LSTM | nn.GRU | nn.RNN
Cell = nn.LSTMCell | nn.GRUCell | nn.RNNCell
States = tuple[Tensor, ...]  # of one layer, each [B, H]: (h, c) for LSTM, (h,) for the others
Make = Callable[[nn.Linear, str], DynamicProduct]


def lstm_step(x: Tensor, h: Tensor, states: States) -> States:
    """One LSTM step. x, h [B, 4H]: contributions of input and state to the gates (input, forget, cell, output)."""
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(x: Tensor, h: Tensor, states: States) -> States:
    """One GRU step. x, h [B, 3H]: contributions of input and state to the gates (reset, update, new)."""
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (torch.lerp(n, states[0], z),)


def tanh_step(x: Tensor, h: Tensor, states: States) -> States:
    """One step of an RNN with tanh. x, h [B, H]: contributions of input and state."""
    return (torch.tanh(x + h),)


def relu_step(x: Tensor, h: Tensor, states: States) -> States:
    """One step of an RNN with ReLU. x, h [B, H]: contributions of input and state."""
    return (torch.relu(x + h),)


STEPS: dict[str, Callable[[Tensor, Tensor, States], States]] = {
    "LSTM": lstm_step, "GRU": gru_step, "RNN_TANH": tanh_step, "RNN_RELU": relu_step,
}  # fmt: skip
NATIVE = ("LSTM", "GRU")


class IntegerRecurrent(Replacement):
    """LSTM, GRU or RNN with any number of layers, bidirectional too, also on packed sequences; called as the float module.

    ofinput, ofstate: the dynamic products of input and state, one for each layer and direction
    """

    mode: str
    hidden_size: int
    num_layers: int
    batch_first: bool

    def __init__(self, source: Recurrent, make: Make, *, where: str) -> None:
        super().__init__()
        if source.proj_size:
            raise SchemeError("a projected LSTM has no integer form here", where=where, remedy="keep it in float")
        self.describe(source)
        self.where, self.directions = where, 2 if source.bidirectional else 1
        names = [f"l{i}{reverse}" for i in range(self.num_layers) for reverse in ("", "_reverse")[: self.directions]]
        self.ofinput = nn.ModuleList(make(_linear(source, "ih", name), name) for name in names)
        self.ofstate = nn.ModuleList(make(_linear(source, "hh", name), name) for name in names)

    def flatten_parameters(self) -> None:
        """Does nothing; for code that calls it on float modules."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, object]:
        """[T, B, K], [B, T, K] (batch_first), [T, K] or a packed sequence; hx as in torch -> (outputs, last state)."""
        if isinstance(input, PackedSequence):
            return self.packed(input, hx)
        single = input.ndim == 2
        x = input[:, None] if single else input.transpose(0, 1) if self.batch_first else input
        y, last = self.stacked(x, self.first_states(x, x.shape[1], hx, single=single), self.run)
        y = y[:, 0] if single else y.transpose(0, 1) if self.batch_first else y
        return y, self.ends([part[:, 0] for part in last] if single else last)

    def packed(self, input: PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None) -> tuple[PackedSequence, object]:
        """Run a packed sequence: consecutive steps with the same number of sequences are run together."""
        order, back = input.sorted_indices, input.unsorted_indices
        sizes: list[int] = input.batch_sizes.tolist()
        states = self.first_states(input.data, sizes[0], hx, single=False)
        states = states if order is None else tuple(part[:, order] for part in states)

        def run(x: Tensor, layer: int, way: int, first: States) -> tuple[Tensor, States]:
            return self.run_packed(x, sizes, layer, way, first)

        y, last = self.stacked(input.data, states, run)
        last = last if back is None else [part[:, back] for part in last]
        return PackedSequence(y, input.batch_sizes, order, back), self.ends(last)

    def stacked(
        self, x: Tensor, states: States, run: Callable[[Tensor, int, int, States], tuple[Tensor, States]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all layers: outputs of the last one, and final states [L, B, H] of all layers and directions."""
        last: list[States] = []
        for layer in range(self.num_layers):
            runs = [run(x, layer, way, states) for way in range(self.directions)]
            x = runs[0][0] if len(runs) == 1 else torch.cat([outputs for outputs, _ in runs], dim=-1)
            last += [end for _, end in runs]
        return x, [torch.stack(parts) for parts in zip(*last, strict=True)]

    def ends(self, last: list[Tensor]) -> object:
        """The final states in the float module's form: (h, c) for LSTM, else h."""
        return tuple(last) if self.mode == "LSTM" else last[0]

    def first_states(
        self, x: Tensor, batch: int, state: Tensor | tuple[Tensor, Tensor] | None, *, single: bool
    ) -> States:
        """The initial states of all layers and directions, each [L, B, H]; zeros if none are given."""
        count = 2 if self.mode == "LSTM" else 1
        if state is None:
            return (x.new_zeros(self.num_layers * self.directions, batch, self.hidden_size),) * count
        given = (state,) if isinstance(state, Tensor) else state
        return tuple(part[:, None] if single else part for part in given)

    def run_packed(self, x: Tensor, sizes: list[int], layer: int, way: int, first: States) -> tuple[Tensor, States]:
        """As `run`, for packed rows x [Σ sizes, K], of which sizes[t] belong to step t."""
        steps = list(x.split(sizes))
        places = [(size, len(list(same))) for size, same in groupby(sizes)]
        stretches, at = [], 0
        for size, length in places:
            stretches.append((size, torch.stack(steps[at : at + length])))
            at += length
        states = [part.clone() for part in first]
        outputs: list[Tensor] = []
        for size, stretch in reversed(stretches) if way else stretches:
            y, ends = self.run(stretch, layer, way, tuple(part[:, :size] for part in states))
            at = layer * self.directions + way
            for part, end in zip(states, ends, strict=True):
                part[at, :size] = end.to(part.dtype)
            outputs.append(y.flatten(0, 1))
        y = torch.cat(outputs[::-1] if way else outputs)
        return y, tuple(part[layer * self.directions + way] for part in states)

    def run(self, x: Tensor, layer: int, way: int, first: States) -> tuple[Tensor, States]:
        """Run one layer in one direction (way 1: backwards): outputs [T, B, H] and final states."""
        at = layer * self.directions + way
        ofinput, ofstate = self.ofinput[at], self.ofstate[at]
        assert isinstance(ofinput, DynamicProduct) and isinstance(ofstate, DynamicProduct)
        states = tuple(part[at] for part in first)
        ofinput.check(x)
        ofstate.check(states[0])
        if handles(x, torch.float32) and x.numel() and self.mode in NATIVE:
            return natively(x.contiguous(), ofinput, ofstate, states, backwards=bool(way))
        outputs = []
        for gates in ofinput(x.flip(0) if way else x):
            states = STEPS[self.mode](gates, ofstate(states[0]), states)
            outputs.append(states[0])
        y = torch.stack(outputs)
        return y.flip(0) if way else y, states

    def extra_repr(self) -> str:
        return self.mode


class IntegerCell(Replacement):
    """Dynamically quantized LSTMCell, GRUCell or RNNCell; called as the float module."""

    def __init__(self, source: Cell, make: Make, *, where: str) -> None:
        super().__init__()
        self.describe(source)
        self.input_size, self.hidden_size, self.where = source.input_size, source.hidden_size, where
        tanh = isinstance(source, nn.RNNCell) and source.nonlinearity == "tanh"
        named = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
        self.mode = named.get(type(source), "RNN_TANH" if tanh else "RNN_RELU")
        has_bias = isinstance(source.bias_ih, Tensor)
        self.ofinput = make(linear(source.weight_ih, source.bias_ih if has_bias else None), "ih")
        self.ofstate = make(linear(source.weight_hh, source.bias_hh if has_bias else None), "hh")

    def forward(self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None) -> object:
        """Input [B, K] or [K] and state -> next state."""
        single = input.ndim == 1
        x = input[None] if single else input
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)  # len() would fix the size in torch.export
            states: States = (zeros, zeros) if self.mode == "LSTM" else (zeros,)
        else:
            given = (hx,) if isinstance(hx, Tensor) else hx
            states = tuple(part[None] if single else part for part in given)
        states = STEPS[self.mode](self.ofinput(x), self.ofstate(states[0]), states)
        states = tuple(part[0] for part in states) if single else states
        return states if self.mode == "LSTM" else states[0]

    def extra_repr(self) -> str:
        return self.mode


def natively(
    x: Tensor, ofinput: DynamicProduct, ofstate: DynamicProduct, states: States, *, backwards: bool
) -> tuple[Tensor, States]:
    """All steps of one layer in one direction, in one call of the native extension: outputs [T, B, H] and final states."""
    product, rounding = ofinput.memory.of(ofinput, ofinput.prepared)
    state, _ = ofstate.memory.of(ofstate, ofstate.prepared)
    y = x.new_empty(*x.shape[:2], ofstate.channels)
    h, *cell = (each.float().clone(memory_format=torch.contiguous_format) for each in states)
    product.recur(state, x, h, cell[0] if cell else None, y, backwards, *rounding, torch.get_num_threads())
    return y, (y[0 if backwards else -1], *cell)


def _linear(source: Recurrent, part: str, name: str) -> nn.Linear:
    """The weights of one layer and direction as a Linear. part: "ih" for those of the input, "hh" for those of the state."""
    weight = getattr(source, f"weight_{part}_{name}")
    bias = getattr(source, f"bias_{part}_{name}") if source.bias else None
    return linear(weight, bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with this weight [N, K] and bias [N]."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module
