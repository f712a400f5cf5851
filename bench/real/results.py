"""Quantize and judge, once for each key: what is in results.jsonl already is not measured again."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.measure import BITWRIGHT, run
from bench.real.material import Material
from bench.real.tools import TOOLS, Job, version


@dataclass(frozen=True)
class Judge:
    """The text's first tokens, in windows that each begin anew."""

    text: str = "wikitext2"
    tokens: int = 8192
    window: int = 512


@dataclass(frozen=True)
class Bench:
    """Where things are, and which tools may run."""

    material: Material
    tools: tuple[str, ...]
    judge: Judge = Judge()

    def measured(self, job: Job, texts: Iterable[str] = ("wikitext2",)) -> dict[str, dict[str, Any]]:
        """By text: bytes of the files, and what `bitwright eval` says. A text is missing where the tool did not do the job."""
        now = version(job.tool)
        if now is None or job.tool not in self.tools:
            return {}
        keys = {text: {**asdict(job), **asdict(self.judge), "text": text, "version": now} for text in texts}
        found = {text: row for text, key in keys.items() if (row := self._known(key)) is not None}
        missing = {text: key for text, key in keys.items() if text not in found}
        if missing:
            print(f"{job.model} {job.scheme} {job.activations} {job.label}", file=sys.stderr, flush=True)
            found |= self._made(job, missing)
        return found

    def _made(self, job: Job, keys: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Quantize once, judge on each text; a tool that fails is said on standard error, and tried again another time."""
        found = {}
        with TemporaryDirectory(dir=self.material.work) as folder:
            out = Path(folder) / ("out.gguf" if is_mix(job.scheme) else "out")
            try:
                done = TOOLS[job.tool].quantize(job, self.material, out) | {"bytes": size(out)}
                for text, key in keys.items():
                    found[text] = done | self._judged(job.model, out, text)
                    self._keep(key, found[text])
                    print(f"  {text}: KL {found[text]['kl_mean']:.5f}", file=sys.stderr, flush=True)
            except SystemExit as ended:  # a command's own words, which name it
                print(f"  failed: {ended}", file=sys.stderr, flush=True)
        return found

    def _judged(self, model: str, out: Path, text: str) -> dict[str, Any]:
        """KL, perplexity and top-1 against the float model, whose predictions are kept."""
        known = self.material.work / "predictions" / f"{model}-{text}"
        what = [
            "--text",
            self.material.text(text),
            "--tokens",
            str(self.judge.tokens),
            "--seqlen",
            str(self.judge.window),
        ]
        against = ["--reference", str(self.material.model(model)), "--predictions", str(known)]
        result = run([*BITWRIGHT, "eval", str(out), *against, *what, "--json"]).result
        return {k: v for k, v in result.items() if k != "seconds"}

    @property
    def _file(self) -> Path:
        return self.material.work / "results.jsonl"

    def _known(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The newest result of that very key."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return next((row["result"] for line in reversed(lines) if (row := json.loads(line))["key"] == key), None)

    def _keep(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps({"key": key, "result": result}) + "\n")


def is_mix(scheme: str) -> bool:
    """Whether a scheme is llama.cpp's name of a mix: Q4_K_M."""
    return scheme.isupper()


def size(out: Path) -> int:
    """Bytes of a file, or of a directory's weights."""
    return out.stat().st_size if out.is_file() else sum(file.stat().st_size for file in out.glob("*.safetensors"))


def kl(row: dict[str, Any] | None) -> str:
    """With its standard error; a dash where there is none."""
    return "–" if row is None else f"{row['kl_mean']:.4f} ± {row['kl_stderr']:.4f}"


def described(row: dict[str, Any]) -> list[str]:
    """KL, perplexity, top-1 agreement."""
    perplexity = f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}"
    return [kl(row), perplexity, f"{100 * row['top1']:.2f} %"]
