"""Join the shards of single blocks into OUT's weight files. A crash at any point costs nothing; one shard is on disk twice.

1. Every file gets its header and its full size, but no data yet: a sparse file, which takes no room on the file systems of
   Linux and macOS. Until the first record of step 2, all shards exist and a resumed run begins anew.
2. Shard by shard: its tensors are copied to their places and flushed to the disk, read back, and compared by checksum with
   what was read from the shard; joined-00002.json, a record of the checksums, is written and flushed; only then is the
   shard removed. After a crash before the record, the same bytes are copied to the same places once more.
3. The index, if there are several files. A resumed run reads and compares again all tensors that have a record.

So the disk holds all weights once and one shard twice; memory holds a piece of a tensor.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import CheckpointError, VerificationError
from bitwright.files.checkpoint import (
    INDEX,
    TensorInfo,
    begin_file,
    disk_errors,
    read_header,
    sync_folder,
    write_file,
)
from bitwright.files.joined import checksum, copy_tensor, joined
from bitwright.pipeline.work_in_progress import WorkInProgress

AFRESH = "start afresh with --restart"


def join(place: WorkInProgress, count: int) -> int:
    """Join `count` committed shards into the weight files, with an index if they are several; their bytes in all.

    VerificationError names a tensor that does not read back as it was in its shard, or a file that is missing or damaged.
    """
    shards, records = ([of(i) for i in range(count)] for of in (place.shard, place.joined))
    if not any(record.is_file() for record in records):
        _begin(place.result, shards)
    files = sorted(place.result.glob("model*.safetensors"))
    places = {name: info for file in files for name, info in _header_of(file).items()}
    seen: set[str] = set()
    for shard, record in zip(shards, records, strict=True):
        known = record.is_file()
        sums: dict[str, int] = json.loads(record.read_bytes()) if known else _copied(_header_of(shard), places)
        _check(sums, places)
        if not known:
            write_file(record, json.dumps(sums).encode())
            sync_folder(place.path)
        with disk_errors(shard):
            shard.unlink(missing_ok=True)
        seen |= sums.keys()
    for name in places.keys() - seen:
        raise VerificationError("no block has this tensor", where=name, remedy=AFRESH)
    if len(files) > 1:
        _write_index(place, places)
    return sum(file.stat().st_size for file in files)


def _begin(folder: Path, shards: list[Path]) -> None:
    """Make the files: headers and full size, no data yet."""
    specs = [{name: (info.dtype, info.shape) for name, info in _header_of(shard).items()} for shard in shards]
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob("model*"):
            unfinished.unlink()
    for name, own in joined(specs).items():
        begin_file(folder / name, own)
    sync_folder(folder)
    sync_folder(folder.parent)


def _header_of(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that an earlier step has made. VerificationError if it is gone or damaged."""
    if not file.is_file():
        raise VerificationError("work that was done is gone", where=str(file), remedy=AFRESH)
    try:
        return read_header(file)
    except CheckpointError as error:
        message = f"work that was done is damaged: {error.message}"
        raise VerificationError(message, where=str(file), remedy=AFRESH) from error


def _copied(shard: Mapping[str, TensorInfo], places: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Copy a shard's tensors to their places and flush them to the disk; the checksum of each."""
    for name, info in shard.items():
        to = places.get(name)
        if to is None or (to.dtype, to.shape) != (info.dtype, info.shape):
            raise VerificationError("the joined file has no place for it", where=name, remedy=AFRESH)
    sums: dict[str, int] = {}
    for file in sorted({places[name].file for name in shard}):
        with disk_errors(file), file.open("r+b") as stream:
            here = [name for name in shard if places[name].file == file]
            sums |= {name: copy_tensor(shard[name], stream, places[name]) for name in here}
            stream.flush()
            os.fsync(stream.fileno())
    return sums


def _check(sums: Mapping[str, int], places: Mapping[str, TensorInfo]) -> None:
    """VerificationError for a tensor whose bytes in its place differ from those in its shard."""
    for name, meant in sums.items():
        if name not in places or checksum(places[name]) != meant:
            message = "the tensor in the joined file is not the one of its block's shard"
            remedy = f"run the same command again; if that says the same, {AFRESH}"
            raise VerificationError(message, where=name, remedy=remedy)


def _write_index(place: WorkInProgress, places: Mapping[str, TensorInfo]) -> None:
    """Which tensor is in which file."""
    total = sum(info.nbytes for info in places.values())
    weight_map = {name: info.file.name for name, info in sorted(places.items())}
    place.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
