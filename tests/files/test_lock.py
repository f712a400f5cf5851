"""Unfinished work belongs to one process at a time, and to nobody once that process is dead."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitwright.errors import OutputError
from bitwright.pipeline.work_in_progress import WorkInProgress
from bitwright.train.checkpoints import Checkpoints

AT_WORK = """
import sys
from pathlib import Path
from bitwright.files.lock import Lock

lock = Lock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""
BEGUN: dict[str, Callable[[Path, bool], object]] = {
    "quantize": lambda out, resume: WorkInProgress(out, {}, needed=0, resume=resume),
    "finetune": lambda out, resume: Checkpoints(out, {}, resume=resume),
}


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process at work on OUT."""
    work = tmp_path / "OUT.partial"
    work.mkdir()
    (work / "kept").touch()
    command = [sys.executable, "-c", AT_WORK, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)
def test_work_of_a_live_process_is_left_alone(
    begun: Callable[[Path, bool], object], resume: bool, other: subprocess.Popen[str], tmp_path: Path
) -> None:
    """It is neither resumed nor removed until that process is killed; then it is."""
    with pytest.raises(OutputError, match="another process is at this work"):
        begun(tmp_path / "OUT", resume)
    assert (tmp_path / "OUT.partial/kept").exists()
    other.kill()
    other.wait()
    assert begun(tmp_path / "OUT", resume)
    assert (tmp_path / "OUT.partial/kept").exists() is resume
