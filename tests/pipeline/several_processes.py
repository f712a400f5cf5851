"""What each of several processes runs in test_distributed.py: jobs for `bitwright.quantize`, one after the other.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python several_processes.py JOBS.json

Prints a line of JSON for each: its losses, or its error. A job's "of_rank" holds other options for single processes; a process
whose "dies" is true ends without a word once it has quantized a block.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import distributed

from bitwright import quantize
from bitwright.errors import BitwrightError


def done(job: dict[str, Any], together: bool) -> dict[str, Any]:
    """Carry out one job."""
    job |= job.pop("of_rank", {}).get(os.environ["RANK"], {})
    if job.pop("fails", False):
        job["progress"] = fail
    if job.pop("dies", False):
        job["progress"] = lambda step, at, _: os._exit(9) if step.startswith("block,") and at > 0 else None
    try:
        result = quantize(**job, distributed=together)
    except BitwrightError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {
        "bytes": result.bytes,
        "losses": {e.name: e.loss for e in result.ledger if e.loss is not None},
        "blocks": [e.block_error for e in result.ledger if e.block_error is not None],
        "fallbacks": list(result.fallbacks),
    }


def fail(step: str, at: int, _: int) -> None:
    """Raise once a block is quantized."""
    if step.startswith("block,") and at > 0:
        raise BitwrightError("on purpose")


def main() -> None:
    together = int(os.environ["WORLD_SIZE"]) > 1
    if together:
        distributed.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(json.dumps(done(job, together)), flush=True)
    if together:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
