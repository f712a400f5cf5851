"""What a plan says of its memory beside what the process really takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_checkpoint

SHAPE = {
    "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 5, "max_position_embeddings": 512,
}  # fmt: skip
MEASURED = """
import json, sys
from pathlib import Path
from bitwright.pipeline.planned_recipe import Settings, plan_recipe
from bitwright.plan.target import Target
from bitwright.system.memory import peak_rss_bytes

made = plan_recipe(
    Path(sys.argv[1]), Target(bits=11), Settings(method="rtn", calib=sys.argv[2], samples=int(sys.argv[3]), seqlen=512)
)
print(json.dumps([made.memory, peak_rss_bytes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what an import takes differs")
def test_a_plan_takes_the_memory_that_it_says(tmp_path: Path) -> None:
    """Gradients are taken on 4,096 tokens: six states of 512 numbers, and logits of 16,384 tokens."""
    model = make_checkpoint(tmp_path / "model", **SHAPE)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The fox met {i} hounds at the well.\n" for i in range(2_000)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, str(model), str(text)]
    said = []
    for samples in ("4", "64"):
        done = subprocess.run([*command, samples], env=environment, check=True, capture_output=True, text=True)
        expected, taken = json.loads(done.stdout)
        assert expected == pytest.approx(taken, rel=0.25)
        said.append(expected)
    assert said[1] > said[0] + 60 * 512 * 512 * 2  # states of 60 windows more, in bfloat16 at least
