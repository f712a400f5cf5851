"""Shards of blocks become the files that others know: the same bytes after any crash, exact sizes, and no tensor unread."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import comparable
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright import quantize
from bitwright.errors import CheckpointError, OutputError, VerificationError
from bitwright.files import joined as cut
from bitwright.files.checkpoint import INDEX, Checkpoint, begin_file, file_bytes, read_header, sync_folder, write_shard
from bitwright.files.joined import checksum, joined
from bitwright.models.source import WeightSource
from bitwright.pipeline.joining import join
from bitwright.pipeline.work_in_progress import WorkInProgress
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe

BLOCKS = 3
PLAIN = {"scheme": "int4-g32-asym", "method": "rtn", "calib": "none"}
PLACES = {  # where a process is killed, and how many times it comes there between one trial and the next
    "copying": ("bitwright.files.joined.zlib.crc32", 11),
    "flushing": ("os.fsync", 2),
    "renaming": ("pathlib.Path.replace", 1),
    "removing": ("pathlib.Path.unlink", 2),
}


def shards() -> list[dict[str, Tensor]]:
    """Of types that take turns: odd numbers of bytes, an empty tensor, a single number."""
    g = torch.Generator().manual_seed(0)
    return [
        {
            f"{i}.a": torch.randint(-128, 127, (7, 9 + i), generator=g, dtype=torch.int8),
            f"{i}.w": torch.randn(40, 33, generator=g),
            f"{i}.h": torch.randn(13, 5, generator=g).half(),
            f"{i}.n": torch.randn(1, generator=g).double(),
            f"{i}.none": torch.empty(0, 4),
        }
        for i in range(BLOCKS)
    ]


def committed(folder: Path) -> WorkInProgress:
    """Work whose blocks are all done, not joined yet."""
    place = WorkInProgress(folder / "out", {}, needed=0, resume=True)
    for i, tensors in enumerate(shards()):
        write_shard(place.shard(i), tensors)
    return place


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def same(found: dict[str, Tensor], meant: dict[str, Tensor]) -> bool:
    return found.keys() == meant.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in meant.items()
    )


def everything() -> dict[str, Tensor]:
    return {name: t for tensors in shards() for name, t in tensors.items()}


@pytest.fixture(params=[None, 6000], ids=["one file", "several files"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Nothing is too much for one file, or little is."""
    if request.param:
        monkeypatch.setattr(cut, "MAX_BYTES", request.param)
    monkeypatch.setattr(cut, "PIECE", 1000)
    return request.param  # type: ignore[no-any-return]


def test_the_safetensors_library_reads_what_was_joined(limit: int | None, tmp_path: Path) -> None:
    place = committed(tmp_path)
    specs = [{n: (i.dtype, i.shape) for n, i in read_header(place.shard(k)).items()} for k in range(BLOCKS)]
    written = join(place, BLOCKS)
    files = sorted(place.result.glob("*.safetensors"))
    assert written == sum(f.stat().st_size for f in files) == sum(map(file_bytes, joined(specs).values()))
    assert same({name: t for f in files for name, t in load_file(f).items()}, everything())
    assert same({n: Checkpoint(place.result).read(n) for n in everything()}, everything())
    assert not list(place.path.glob("shard-*"))
    index = place.result / INDEX
    if limit is None:
        assert [f.name for f in files] == ["model.safetensors"] and not index.exists()
        return
    assert [f.name for f in files] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(sum(t.nbytes for t in load_file(f).values()) <= limit for f in files)
    said = json.loads(index.read_text())
    assert said["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert said["metadata"] == {"total_size": sum(t.nbytes for t in everything().values())}


def test_tensors_stay_in_order_and_whole() -> None:
    """One that is too much for any file gets its own; a file is as full as it may be."""
    spec = lambda n: (torch.int8, (n,))  # noqa: E731
    limit = cut.MAX_BYTES
    files = joined([{"b": spec(limit), "a": spec(1)}, {"c": spec(limit + 1)}, {"d": spec(limit - 1), "e": spec(1)}])
    assert [list(own) for own in files.values()] == [["a"], ["b"], ["c"], ["d", "e"]]
    assert list(files)[1] == "model-00002-of-00004.safetensors"


def killed_at(moment: int, where: str, work: Callable[[], Any]) -> bool:
    """Whether a process that does the work was killed (-9) when it came to some place so many times."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left, owner, name = moment, *where.rsplit(".", 1)
    module = sys.modules.get(owner) or (Path if owner == "pathlib.Path" else zlib)
    real = getattr(module, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **options)

    try:
        setattr(module, name, counted)
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("where", PLACES)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(where: str, limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = committed(tmp_path / "whole")
    join(whole, BLOCKS)
    (function, step), moment = PLACES[where], 0
    while True:
        folder = tmp_path / str(moment)
        folder.mkdir()
        place = committed(folder)
        if not killed_at(moment, function, lambda place=place: join(place, BLOCKS)):  # type: ignore[misc]
            break
        kept = {name for shard in place.path.glob("shard-*") for name in read_header(shard)}
        records = [json.loads(record.read_text()) for record in place.path.glob("joined-*.json")]
        assert kept | {name for record in records for name in record} == everything().keys()
        killed_at(1, function, lambda place=place: join(place, BLOCKS))  # type: ignore[misc]
        join(place, BLOCKS)
        assert bytes_of(place.result) == bytes_of(whole.result)
        shutil.rmtree(folder)
        moment += step
    assert moment > BLOCKS


def test_a_wrong_byte_in_the_joined_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cut.copy_tensor

    def faulty(source: Any, stream: Any, to: Any) -> int:
        found = honest(source, stream, to)
        if source.file.name == "shard-00001.safetensors" and source.shape == (40, 33):
            stream.seek(to.offset + 77)
            stream.write(b"\x55")
        return found

    place = committed(tmp_path)
    monkeypatch.setattr("bitwright.pipeline.joining.copy_tensor", faulty)
    with pytest.raises(VerificationError, match="not the one of its block's shard") as caught:
        join(place, BLOCKS)
    assert caught.value.where == "1.w" and "again" in caught.value.remedy
    assert [f.name for f in sorted(place.path.glob("shard-*"))] == [
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    ]
    monkeypatch.setattr("bitwright.pipeline.joining.copy_tensor", honest)
    join(place, BLOCKS)
    assert same(load_file(place.result / "model.safetensors"), everything())


def half(folder: Path) -> WorkInProgress:
    """Killed when the first shard had been removed, and the second was about to be: its record is written."""
    folder.mkdir()
    place = committed(folder)
    assert killed_at(1, "pathlib.Path.unlink", lambda: join_counting_shards(place))
    assert [place.shard(i).exists() for i in range(BLOCKS)] == [False, True, True]
    assert [place.joined(i).exists() for i in range(BLOCKS)] == [True, True, False]
    return place


def join_counting_shards(place: WorkInProgress) -> None:
    """Path.unlink is called for other files too: those are removed in another way here."""
    real = Path.unlink

    def only_shards(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("shard-"):
            real(self, missing_ok)
        elif self.exists():
            os.unlink(self)

    Path.unlink = only_shards  # type: ignore[method-assign]
    join(place, BLOCKS)


def test_leftovers_are_made_anew_or_refused(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = committed(tmp_path / "whole")
    join(whole, BLOCKS)
    (tmp_path / "a").mkdir()
    place = committed(tmp_path / "a")  # all shards are there: nothing else is believed
    place.result.mkdir()
    (place.result / "model.safetensors").write_bytes(whole.result.joinpath("model.safetensors").read_bytes()[:500])
    (place.result / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 50)
    (place.result / INDEX).write_text("{}")
    join(place, BLOCKS)
    assert bytes_of(place.result) == bytes_of(whole.result)

    def cut_short(place: WorkInProgress) -> None:
        os.truncate(place.result / "model.safetensors", 900)

    def changed(place: WorkInProgress) -> None:
        with (place.result / "model.safetensors").open("r+b") as stream:
            stream.seek(read_header(place.result / "model.safetensors")["0.w"].offset)
            stream.write(b"\1\2\3")

    def missing(place: WorkInProgress) -> None:
        place.shard(2).unlink()

    def other(place: WorkInProgress) -> None:
        write_shard(place.shard(2), {"2.a": torch.zeros(3)})

    def fewer(place: WorkInProgress) -> None:
        write_shard(place.shard(2), {n: t for n, t in shards()[2].items() if n != "2.h"})

    for spoil, says in [
        (cut_short, "damaged"),
        (changed, "not the one"),
        (missing, "gone"),
        (other, "no place"),
        (fewer, "no block"),
    ]:
        place = half(tmp_path / spoil.__name__)
        spoil(place)
        with pytest.raises(VerificationError, match=says) as caught:
            join(place, BLOCKS)
        assert caught.value.where and "--restart" in caught.value.remedy
    place = half(tmp_path / "good")
    join(place, BLOCKS)
    assert bytes_of(place.result) == bytes_of(whole.result)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", shards()[0])
    info = read_header(tmp_path / "a.safetensors")["0.w"]
    os.truncate(tmp_path / "a.safetensors", info.offset + 10)
    with pytest.raises(CheckpointError, match="cut short"):
        checksum(info)


def test_a_file_that_is_begun_takes_no_room(tmp_path: Path) -> None:
    begin_file(tmp_path / "a", {"w": (torch.float32, (1 << 24,))})
    assert (tmp_path / "a").stat().st_size > 1 << 26 and 512 * (tmp_path / "a").stat().st_blocks < 1 << 20


def test_a_directory_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems know of no such thing; any other failure counts."""
    for number, fails in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)):

        def refuse(_: int, number: int = number) -> None:
            raise OSError(number, "refused")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OutputError, match="refused") if fails else nullcontext():
            sync_folder(tmp_path)


# --------------------------------------------------------------------------------------------------------- end to end


def test_transformers_loads_several_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = quantize(llama, tmp_path / "one", **PLAIN)  # type: ignore[arg-type]
    assert [f.name for f in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    monkeypatch.setattr(cut, "MAX_BYTES", 30_000)
    plan = preflight(llama, Recipe.uniform("int4-g32-asym", "rtn"), "compressed-tensors")
    several = quantize(llama, tmp_path / "several", **PLAIN)  # type: ignore[arg-type]
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2 and (tmp_path / "several" / INDEX).is_file()
    assert plan.bytes == several.bytes == sum(f.stat().st_size for f in files) != one.bytes
    a, b = (WeightSource(tmp_path / name) for name in ("one", "several"))
    assert a.shapes == b.shapes and all(torch.equal(a.read(n), b.read(n)) for n in a.shapes)
    ids = torch.arange(20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32).eval()(ids).logits
        for n in ("one", "several")
    ]
    assert torch.equal(*logits) and bool(logits[0].isfinite().all())


def test_the_disk_must_hold_one_shard_twice(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = preflight(llama, Recipe.uniform("int4-g32-asym", "rtn"), "compressed-tensors")
    largest = max(file_bytes(plan.shard_specs(i)) for i in range(4))
    assert plan.disk_bytes == plan.bytes + largest
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=plan.disk_bytes - 1))
    with pytest.raises(OutputError, match=f"{plan.disk_bytes:,} bytes more"):
        quantize(llama, tmp_path / "out", **PLAIN)  # type: ignore[arg-type]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=plan.disk_bytes))
    quantize(llama, tmp_path / "out", **PLAIN)  # type: ignore[arg-type]


KILLED = """
import os, pathlib, shutil, signal, sys
from bitwright.files import joined
from bitwright.cli.app import main
joined.MAX_BYTES, owner, name, at = 30_000, *sys.argv.pop(1).split(":")
owner = {"Path": pathlib.Path, "shutil": shutil}.get(owner)
real = getattr(owner, name, None)
def watched(path, *more, **options):
    if pathlib.Path(path).name == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *more, **options)
if owner:
    setattr(owner, name, watched)
main()
"""


def test_a_killed_run_goes_on_to_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    """While shards are joined; when all is there but OUT's name; when OUT is there and the rest is not removed yet."""

    def run(out: Path, where: str) -> int:
        how = ["--scheme", "int4-g32-asym", "--method", "rtn", "--calib", "none", "--json"]
        start = [sys.executable, "-c", KILLED, where, "quantize", str(llama), str(out), *how]
        return subprocess.run(start, capture_output=True, check=False).returncode

    whole, out, partial = tmp_path / "whole", tmp_path / "out", tmp_path / "out.partial"
    assert run(whole, "::") == 0
    for where, left in (("Path:unlink:shard-00001.safetensors", 3), ("Path:rename:out", 0)):
        assert run(out, where) == -signal.SIGKILL
        assert not out.exists() and len(list(partial.glob("shard-*"))) == left
        assert len(list(partial.glob("ledger-*"))) == 4
    assert run(out, "Path:rename:out.partial") == -signal.SIGKILL
    assert comparable(out) == comparable(whole) and partial.is_dir()
    shutil.rmtree(out)  # and what was left behind is in nobody's way
    assert run(out, "::") == 0
    assert comparable(out) == comparable(whole) and not partial.exists()
    assert not list(tmp_path.glob("out.partial*"))
