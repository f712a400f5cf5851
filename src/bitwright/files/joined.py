"""Many shards joined into one safetensors file, or a few of up to 5 GB: which tensor goes where, and copying its bytes.

File names and sizes are those of transformers: model.safetensors, or model-00001-of-00003.safetensors and an index.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Spec, TensorInfo, spec_bytes

MAX_BYTES = 5_000_000_000  # of the tensors in one file
PIECE = 1 << 20  # bytes copied at a time


def joined(shards: Iterable[Mapping[str, Spec]]) -> dict[str, dict[str, Spec]]:
    """File name -> its tensors: shard after shard, by name within one; a new file begins before `MAX_BYTES` are exceeded."""
    files: list[dict[str, Spec]] = [{}]
    size = 0
    for shard in shards:
        for name, spec in sorted(shard.items()):
            more = spec_bytes({name: spec})
            if files[-1] and size + more > MAX_BYTES:
                files.append({})
                size = 0
            files[-1][name] = spec
            size += more
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": own for i, own in enumerate(files, 1)}


def copy_tensor(source: TensorInfo, stream: BinaryIO, to: TensorInfo) -> int:
    """Copy a tensor's bytes to its place in another file, open as `stream`; their CRC-32."""
    stream.seek(to.offset)
    found = 0
    for piece in _pieces(source):
        stream.write(piece)
        found = zlib.crc32(piece, found)
    return found


def checksum(info: TensorInfo) -> int:
    """CRC-32 of a tensor's bytes in its file."""
    found = 0
    for piece in _pieces(info):
        found = zlib.crc32(piece, found)
    return found


def _pieces(info: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes, `PIECE` at a time. CheckpointError if the file is too short."""
    left = info.nbytes
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        while left:
            piece = stream.read(min(left, PIECE))
            if not piece:
                remedy = "run the same command again with --restart"
                raise CheckpointError("the file was cut short while it was read", where=str(info.file), remedy=remedy)
            left -= len(piece)
            yield piece
