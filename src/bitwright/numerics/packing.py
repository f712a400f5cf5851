"""Integer codes <-> 32-bit words, 1 to 8 bits a code.

One layout serves compressed-tensors and GPTQ: code i of a row occupies the bits i·b … i·b + b − 1 of a little-endian bit
stream, so codes of 3, 5, 6 or 7 bits may straddle two words; a row is padded with zero bits to a whole word.
"""

import torch
from torch import Tensor

from bitwright.errors import SchemeError

WORD = 32


def words(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` codes of `bits` bits."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [R, C], each below 2**bits -> int32 words [R, ceil(C·bits / 32)].

    >>> pack(torch.tensor([[1, 2, 3, 15]]), 4)
    tensor([[62241]], dtype=torch.int32)
    """
    _check_bits(bits)
    rows, count = codes.shape
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        found, top = f"codes from {int(codes.min())} to {int(codes.max())}", (1 << bits) - 1
        raise SchemeError(f"{found} do not fit into {bits} bits", remedy=f"codes from 0 to {top}, or more bits")
    if not codes.numel():
        return torch.zeros(rows, words(count, bits), dtype=torch.int32, device=codes.device)
    padded = torch.nn.functional.pad(codes, (0, -count % WORD)).view(rows, -1, 8)
    lanes = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):  # eight codes make `bits` whole bytes: build them in one 64-bit lane
        lanes |= padded[..., i].to(torch.int64) << (i * bits)
    octets = lanes.view(torch.uint8).view(rows, -1, 8)[..., :bits].flatten(1).contiguous()
    return octets.view(torch.int32)[:, : words(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> the first `count` unsigned codes of each row, uint8 [R, count]. Undoes `pack`."""
    _check_bits(bits)
    if packed.shape[1] < words(count, bits):
        message = f"{packed.shape[1]} words a row, where {count} codes of {bits} bits take {words(count, bits)}"
        raise SchemeError(message, remedy="give the bits and the columns that the file was written with")
    rows, lanes_per_row = packed.shape[0], -(-count // 8)
    octets = packed.contiguous().view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, max(0, lanes_per_row * bits - octets.shape[1])))
    octets = octets[:, : lanes_per_row * bits].reshape(rows, lanes_per_row, bits)
    lanes = torch.nn.functional.pad(octets, (0, 8 - bits)).view(torch.int64)  # [R, L, 1]
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    codes = (lanes >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise SchemeError(f"cannot pack codes of {bits} bits", remedy="1 to 8")
