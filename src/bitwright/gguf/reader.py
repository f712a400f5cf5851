"""GGUF files: their keys, and tensors read by rows and dequantized. See header.py for how a file is checked, block_types.py for
what is in a block."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.gguf.block_types import FLOATS, decoded
from bitwright.gguf.header import Stored, Typed, damaged, read_header
from bitwright.gguf.key_kinds import of_wrong_kind
from bitwright.gguf.parts import check_part, other_parts

ENTRIES = tuple(f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps"))  # parameters of Apertus' activation
WEIGHTS_AT_ONCE = 1 << 22  # weights decoded in one step; bounds the memory


class GgufFile:
    """A GGUF file, or all parts of a split one.

    keys     name -> value
    kinds    name -> (GGUF type, type of an array's entries or None)
    tensors  name -> where it is stored
    entries  the same of parameters that are entries of a key's array, one of each block: blk.N.KEY
    """

    def __init__(self, path: Path) -> None:
        """Reads the headers only. CheckpointError for a file that is damaged, incomplete or no GGUF file."""
        header = read_header(path)
        self.path, self.keys, self.kinds, self.tensors = path, header.keys, header.kinds, header.tensors
        self.entries = _entries(header.arrays)
        wrong = of_wrong_kind(self.keys)
        if wrong is not None:
            name, kind = wrong
            raise damaged(path, f"key {name!r} is {str(self.keys[name])[:40]!r}, not {kind}")
        parts = self.keys.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            for index, part in enumerate(other_parts(path, parts), 1):
                header = read_header(part)
                check_part(self.keys, header.keys, index, str(part))
                tensors = header.tensors
                twice = next((name for name in tensors if name in self.tensors), None)
                if twice is not None:
                    raise damaged(part, f"tensor {twice!r} is in two parts")
                self.tensors |= tensors
            promised = self.keys.get("split.tensors.count", len(self.tensors))
            if promised != len(self.tensors):
                raise damaged(path, f"{promised} tensors are promised, the parts hold {len(self.tensors)}")

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors: this one, or all parts."""
        return sorted({t.file for t in self.tensors.values()})

    def check_vocabulary(self) -> None:
        """CheckpointError if the tokenizer's number of tokens is not the embedding's number of rows."""
        tokens, table = self.keys.get("tokenizer.ggml.tokens"), self.tensors.get("token_embd.weight")
        if isinstance(tokens, list) and table is not None and len(tokens) != table.shape[0]:
            message = f"its vocabulary has {len(tokens)} tokens, its embedding {table.shape[0]} rows"
            raise CheckpointError(message, where=str(self.path), remedy="tokenizer and weights must belong together")

    def key(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a required key. CheckpointError if it is missing or of another Python type."""
        if name not in self.keys:
            raise damaged(self.path, f"key {name!r} is missing")
        found = self.keys[name]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise damaged(self.path, f"key {name!r} is {str(found)[:40]!r}, which is of the wrong kind")
        return found

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, or of its rows [first, last): uint8 [N, bytes]. All dimensions but the last count as rows."""
        t = self.tensors[name]
        size = t.row_bytes
        found = np.empty(((t.nbytes // size if last is None else last) - first, size), np.uint8)
        with t.file.open("rb", buffering=0) as stream:
            stream.seek(t.offset + first * size)
            left = found.data.cast("B")
            while len(left) and (count := stream.readinto(left)):
                left = left[count:]
        if len(left):
            raise damaged(t.file, f"tensor {name!r} is cut short")
        return found

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, uint8 [bytes]."""
        return self.rows(name).reshape(-1)

    def read(self, name: str) -> Tensor:
        """A tensor's values, in its own float type, or dequantized to float32."""
        return self.read_rows(name).view(self.tensors[name].shape)

    def read_rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a tensor, [N, K], in its own float type, or dequantized to float32."""
        if self.tensors[name].type in FLOATS:
            return self.floats(name, first, last)
        return self.decode(name, self.rows(name, first, last))

    def floats(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a float tensor, [N, K], in its own type."""
        return torch.from_numpy(self.rows(name, first, last)).view(FLOATS[self.tensors[name].type])

    def decode(self, name: str, rows: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """Dequantize rows of a tensor, as `rows` gives them, to float32 [N, K]."""
        t = self.tensors[name]
        out = np.empty((len(rows), t.shape[-1]), np.float32)
        step = max(1, WEIGHTS_AT_ONCE // t.shape[-1])
        for at in range(0, len(rows), step):
            out[at : at + step] = decoded(rows[at : at + step], t.type, name)
        return torch.from_numpy(out)


def carried_keys(file: GgufFile, file_type: int | None) -> dict[str, Any]:
    """The keys of a requantized file: those of the original, with the new file_type, without those of splitting."""
    kept = {n: Typed(v, *file.kinds[n]) for n, v in file.keys.items() if not n.startswith("split.")}
    kept.pop("general.file_type", None)
    changed = {"general.architecture": file.keys["general.architecture"], "general.quantization_version": 2}
    return {**kept, **changed, **({} if file_type is None else {"general.file_type": file_type})}


def _entries(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """The parameters that are entries of arrays, where the arrays have such keys."""
    return {
        f"blk.{i}.{name}": replace(array, offset=array.offset + 4 * i, nbytes=4, shape=(1,))
        for name, array in arrays.items()
        if name in ENTRIES
        for i in range(array.shape[0])
    }
