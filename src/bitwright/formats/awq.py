"""Reader of AWQ checkpoints in AutoAWQ's GEMM layout (`quant_method: awq`, `version: gemm`), 4 bits.

qweight int32 [K, N/8]  4-bit codes, those of eight outputs in a word, lowest bits first, in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros  int32 [G, N/8]  zero points, packed likewise
scales  [G, N]          float16; w = (code − zero) · scale

N outputs, K inputs, G groups along K.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.formats.format import Read, recovered
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output (of eight) that is in each 4-bit field of a word, lowest field first


class Awq:
    """Reader of AWQ: asymmetric 4-bit integers, in groups or per channel."""

    name = "awq"
    method = "awq"
    parts = frozenset(("qweight", "qzeros", "scales"))

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "qweight" in dtypes

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        length = _group(config, name, tensors)
        codes, zeros = _numbers(tensors["qweight"]), _numbers(tensors["qzeros"])  # [K, N], [G, N]
        group = np.arange(len(codes)) // length
        scale = tensors["scales"].float().numpy()
        w = (codes - zeros[group]).astype(np.float32) * scale[group]
        return torch.from_numpy(np.ascontiguousarray(w.T))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Reader.quantized`."""
        length, K = _group(config, name, tensors), len(tensors["qweight"])
        scheme = Scheme("int4", "channel" if length == K else length, "asym")
        zero = torch.from_numpy(_numbers(tensors["qzeros"]).T - 8).float()
        scales = Scales(tensors["scales"].float().T.contiguous(), zero.contiguous())
        return recovered(self.decode(config, name, tensors), scheme, scales, name)


def _group(config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> int:
    """The group size (K where it is per channel). FormatError for another layout than GEMM with 4 bits."""
    versions = {str(config[key]).lower() for key in ("version", "format", "checkpoint_format") if config.get(key)}
    version = " and ".join(sorted(versions)) or "gemm"
    if version != "gemm" or config.get("bits", config.get("w_bit")) != 4:
        found = f"version {version!r} with {config.get('bits', config.get('w_bit'))} bits"
        raise FormatError(f"AWQ's {found} is not read here", where=name, remedy="gemm with 4 bits")
    K, G = len(tensors["qweight"]), len(tensors["scales"])
    length = config.get("group_size", config.get("q_group_size", -1))
    length = K if length == -1 else length
    if type(length) is not int or length < 1 or -(-K // length) != G or len(tensors["qzeros"]) != G:
        raise FormatError(
            f"{G} groups of {length!r} do not make {K} inputs", where=name, remedy="get a good copy of the file"
        )
    return length


def _numbers(words: Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Unpack int32 words [R, C] -> unsigned 4-bit numbers [R, 8 C], in the order of the outputs."""
    parts = words.numpy()[:, :, None] >> (4 * np.arange(8, dtype=np.int32)) & 15
    numbers = np.empty_like(parts)
    numbers[:, :, ORDER] = parts
    return numbers.reshape(len(parts), -1)
