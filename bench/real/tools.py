"""How each tool quantizes: ours, and the peers that `bench/peers/install.sh` has brought."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gguf_vs_llamacpp import tool
from bench.measure import BITWRIGHT, PEERS_COMPUTE_IN, ROOT, run
from bench.real.material import Material

OURS = "bitwright"
DEFAULT = "default"  # ours without --method
PEERS = ROOT / "bench/peers"


@dataclass(frozen=True)
class Job:
    """What is to be quantized, by which tool, how, and on which windows."""

    model: str
    tool: str
    scheme: str
    method: str = DEFAULT  # of ours; behind it may stand options of a recipe's: gptq:damping=0.1:sweeps=0
    activations: str = ""
    calib: str = "wiki"
    samples: int = 64
    seqlen: int = 512

    @property
    def label(self) -> str:
        """What a table says of who did it."""
        return f"{OURS} {self.method}" if self.tool == OURS else self.tool


def ours(job: Job, material: Material, out: Path) -> dict[str, Any]:
    """With an exit status of 1 a matrix was worse than asked, which the result says."""
    how = ["--calib", material.calib(job.calib), "--samples", str(job.samples), "--seqlen", str(job.seqlen)]
    method, *options = job.method.split(":")
    if options:
        recipe = out.with_suffix(".toml")
        given = ", ".join(option.replace("=", " = ", 1) for option in options)
        lines = ["[[rule]]", 'match = "*"', f'scheme = "{job.scheme}"', f"options = {{ {given} }}"]
        recipe.write_text("\n".join(lines) + "\n")
        how += ["--recipe", str(recipe)]
    how += [] if method == DEFAULT else ["--method", method]
    how += ["--activations", job.activations] if job.activations else []
    done = run(
        [*BITWRIGHT, "quantize", str(material.model(job.model)), str(out), "--scheme", job.scheme, *how, "--json"],
        fine=(0, 1),
    )
    return {"seconds": done.seconds, "fallbacks": len(done.result["fallbacks"])}


def llama_quantize(job: Job, material: Material, out: Path) -> dict[str, Any]:
    """With llama-imatrix of the same windows."""
    imatrix = material.imatrix(job.model, job.calib, job.samples, job.seqlen)
    tool("llama-quantize", "--imatrix", str(imatrix), str(material.float_gguf(job.model)), str(out), job.scheme, "2")
    return {}


def by_script(script: str, environment: str, *own: str) -> Callable[[Job, Material, Path], dict[str, Any]]:
    """A peer that a script of bench/peers runs; scheme as intB-gG or intB-channel, with -asym or without."""

    def quantize(job: Job, material: Material, out: Path) -> dict[str, Any]:
        grid, group, *zero = job.scheme.split("-")
        windows = material.windows(job.model, job.calib, job.samples, job.seqlen)
        how = ["--tokens", str(windows), "--dtype", PEERS_COMPUTE_IN, "--bits", grid.removeprefix("int")]
        how += ["--group", group.removeprefix("g"), "--asym" if zero else "--sym"]
        how += ["--activations", job.activations] if job.activations else []
        python, peer = PEERS / "envs" / environment / "bin/python", PEERS / script
        return {"seconds": run([str(python), str(peer), str(material.model(job.model)), str(out), *how, *own]).seconds}

    return quantize


@dataclass(frozen=True)
class Tool:
    """environment: of bench/peers/envs; stores: whether a file's bytes are those of the scheme, not of decoded numbers."""

    quantize: Callable[[Job, Material, Path], dict[str, Any]]
    environment: str = ""
    activations: bool = False
    stores: bool = True


_SCRIPT, _ENVIRONMENT = "llmcompressor_gptq.py", "llmcompressor"
TOOLS = {
    OURS: Tool(ours, activations=True),
    "llama-quantize": Tool(llama_quantize, "llamacpp"),
    "llm-compressor gptq": Tool(by_script(_SCRIPT, _ENVIRONMENT, "--method", "gptq"), _ENVIRONMENT, activations=True),
    "llm-compressor awq": Tool(by_script(_SCRIPT, _ENVIRONMENT, "--method", "awq"), _ENVIRONMENT, activations=True),
    "auto-round 200 steps": Tool(by_script("autoround.py", _ENVIRONMENT), _ENVIRONMENT, stores=False),
    "GPTQModel gptq": Tool(by_script("gptqmodel_gptq.py", "gptqmodel"), "gptqmodel", stores=False),
}


def version(name: str) -> str | None:
    """What a result is a result of: our sources' hash, or what install.sh was asked for. None: not installed."""
    environment = TOOLS[name].environment
    if environment:
        mark = PEERS / "envs" / environment / ".installed"
        return " ".join(re.findall(r"\S+==\S+", mark.read_text())) if mark.exists() else None
    digest, source = hashlib.sha256(), ROOT / "src" / OURS
    for file in sorted([*source.rglob("*.py"), *(ROOT / "csrc").glob("*/*")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
