"""LSTM and GRU with integer products: the inputs of all steps at once, the state at each step, gates in float."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitwright.errors import SchemeError
from bitwright.nn.layers import DynamicProduct
from bitwright.nn.native import handles

Recurrent = nn.LSTM | nn.GRU
States = tuple[Tensor, ...]  # of one layer, each [B, H]: (h, c) for LSTM, (h,) for GRU
Make = Callable[[nn.Linear, str], DynamicProduct]


def lstm_step(x: Tensor, h: Tensor, states: States) -> States:
    """x, h [B, 4H]: what the gates (in, forget, cell, out) get from the input and from the state."""
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(x: Tensor, h: Tensor, states: States) -> States:
    """x, h [B, 3H]: what the gates (reset, update, new) get from the input and from the state."""
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (torch.lerp(n, states[0], z),)


STEPS = {nn.LSTM: lstm_step, nn.GRU: gru_step}


class IntegerRecurrent(nn.Module):
    """LSTM or GRU, any number of layers, both directions; called as the float module is.

    ofinput, ofstate: a product for each layer and direction, whose inputs are rounded as they come.
    """

    def __init__(self, source: Recurrent, make: Make, *, where: str) -> None:
        super().__init__()
        if source.proj_size:
            raise SchemeError("a projected LSTM has no integer form here", where=where, remedy="keep it in float")
        self.kind, self.where = type(source), where
        self.hidden, self.layers, self.batch_first = source.hidden_size, source.num_layers, source.batch_first
        self.directions = 2 if source.bidirectional else 1
        names = [f"l{i}{reverse}" for i in range(self.layers) for reverse in ("", "_reverse")[: self.directions]]
        self.ofinput = nn.ModuleList(make(_linear(source, "ih", name), name) for name in names)
        self.ofstate = nn.ModuleList(make(_linear(source, "hh", name), name) for name in names)

    def forward(self, x: Tensor, state: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, object]:
        """x [T, B, K], [B, T, K] (batch_first) or [T, K]; state as the float module's -> (outputs, last state)."""
        if not isinstance(x, Tensor):
            remedy = "pad it with torch.nn.utils.rnn.pad_packed_sequence"
            raise SchemeError("a packed sequence has no integer form here", where=self.where, remedy=remedy)
        single = x.ndim == 2
        y = x[:, None] if single else x.transpose(0, 1) if self.batch_first else x
        states = self.first_states(y, state, single=single)
        last: list[States] = []
        for layer in range(self.layers):
            runs = [self.run(y, layer, way, states) for way in range(self.directions)]
            y = runs[0][0] if len(runs) == 1 else torch.cat([outputs for outputs, _ in runs], dim=-1)
            last += [end for _, end in runs]
        y = y[:, 0] if single else y.transpose(0, 1) if self.batch_first else y
        ends = tuple(torch.stack(parts)[:, 0] if single else torch.stack(parts) for parts in zip(*last, strict=True))
        return y, ends if self.kind is nn.LSTM else ends[0]

    def first_states(self, y: Tensor, state: Tensor | tuple[Tensor, Tensor] | None, *, single: bool) -> States:
        """The states of all layers and directions before the first step, each [L, B, H]."""
        count = 2 if self.kind is nn.LSTM else 1
        if state is None:
            return (y.new_zeros(self.layers * self.directions, y.shape[1], self.hidden),) * count
        given = (state,) if isinstance(state, Tensor) else state
        return tuple(part[:, None] if single else part for part in given)

    def run(self, x: Tensor, layer: int, way: int, first: States) -> tuple[Tensor, States]:
        """One layer in one direction: its outputs [T, B, H] and last states."""
        at = layer * self.directions + way
        ofinput, ofstate = self.ofinput[at], self.ofstate[at]
        assert isinstance(ofinput, DynamicProduct) and isinstance(ofstate, DynamicProduct)
        states = tuple(part[at] for part in first)
        ofinput.check(x)
        ofstate.check(states[0])
        if handles(x, torch.float32) and x.numel():
            return natively(x.contiguous(), ofinput, ofstate, states, backwards=bool(way))
        outputs = []
        for gates in ofinput(x.flip(0) if way else x):
            states = STEPS[self.kind](gates, ofstate(states[0]), states)
            outputs.append(states[0])
        y = torch.stack(outputs)
        return y.flip(0) if way else y, states

    def extra_repr(self) -> str:
        return self.kind.__name__


def natively(
    x: Tensor, ofinput: DynamicProduct, ofstate: DynamicProduct, states: States, *, backwards: bool
) -> tuple[Tensor, States]:
    """All steps of one layer in one direction in one call: outputs [T, B, H] and last states."""
    product, rounding = ofinput.memory.of(ofinput, ofinput.prepared)
    state, _ = ofstate.memory.of(ofstate, ofstate.prepared)
    y = x.new_empty(*x.shape[:2], ofstate.channels)
    h, *cell = (each.float().clone(memory_format=torch.contiguous_format) for each in states)
    product.recur(state, x, h, cell[0] if cell else None, y, backwards, *rounding, torch.get_num_threads())
    return y, (y[0 if backwards else -1], *cell)


def _linear(source: Recurrent, part: str, name: str) -> nn.Linear:
    """The weights of one layer, direction and part ("ih": of the input, "hh": of the state) as a Linear."""
    weight = getattr(source, f"weight_{part}_{name}")
    bias = getattr(source, f"bias_{part}_{name}") if source.bias else None
    return linear(weight, bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of this weight [N, K] and bias [N]."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module
