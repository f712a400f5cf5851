"""Models and texts that are measured on, and what a tool is calibrated with: the very same windows for each of them."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.gguf_vs_llamacpp import THREADS, tokenized, tool
from bench.measure import BITWRIGHT, OUT, SHARED, run

REAL = ("smollm2-135m", "gemma3-270m")
OUTLIERS = "+outliers"  # behind a Llama's name: see bench/make_outliers.py
TEXTS = SHARED / "text"
WHOLE = {"wiki": "wiki.txt", "tinystories": "tinystories.txt", "wikitext2": "wikitext2_raw_test.txt"}
HALVED = {"c4": "c4.txt", "code": "code.txt"}  # calibrated on the first half of it, judged on the second


@dataclass(frozen=True)
class Material:
    """What is made is made once, and kept in `work`; the real models lie in `models`."""

    models: Path = OUT / "real"
    work: Path = OUT / "real"

    def model(self, name: str) -> Path:
        """A checkpoint's directory. SystemExit if it cannot be made."""
        if name.endswith(OUTLIERS):
            plain, out = self.model(name.removesuffix(OUTLIERS)), self.work / name
            if not (out / "model.safetensors").exists():
                shutil.rmtree(out, ignore_errors=True)
                run([sys.executable, "-m", "bench.make_outliers", str(plain), str(out)])
            return out
        if name not in REAL:
            return SHARED / "models" / name
        if not (self.models / name / "model.safetensors").exists():
            run([sys.executable, str(SHARED / "models/real.py"), str(self.models), name])
        return self.models / name

    def calib(self, name: str) -> str:
        """A calibration text's file; a name that is none of ours is one that is built in, or a file."""
        return str(TEXTS / WHOLE[name]) if name in WHOLE else str(self._half(name, 0)) if name in HALVED else name

    def text(self, name: str) -> str:
        """As `calib`, for the text that is judged on."""
        return str(self._half(name, 1)) if name in HALVED else self.calib(name)

    def _half(self, name: str, which: int) -> Path:
        """A text's first half (0) or second (1), cut at a line's end."""
        file = self.work / f"{name}-{which + 1}.txt"
        if not file.exists():
            text = (TEXTS / HALVED[name]).read_text()
            middle = text.index("\n", len(text) // 2) + 1
            file.write_text(text[middle:] if which else text[:middle])
        return file

    def windows(self, model: str, calib: str, samples: int, seqlen: int) -> Path:
        """The windows that `bitwright quantize` draws, as a tensor; and beside it as text, in .txt."""
        out = self.work / f"windows-{model}-{Path(calib).name}-{samples}x{seqlen}.safetensors"
        if not out.with_suffix(".txt").exists():
            how = ["--samples", str(samples), "--seqlen", str(seqlen), "--text", str(out.with_suffix(".txt"))]
            run([sys.executable, "-m", "bench.make_tokens", str(self.model(model)), self.calib(calib), str(out), *how])
        return out

    def float_gguf(self, model: str) -> Path:
        """What llama.cpp's tools start from."""
        out = self.work / f"{model}-float.gguf"
        if not out.exists():
            run([*BITWRIGHT, "convert", str(self.model(model)), str(out), "--json"])
        return out

    def imatrix(self, model: str, calib: str, samples: int, seqlen: int) -> Path:
        """llama-imatrix's matrix of the windows' text, which it cuts into chunks of the same length.

        Said on standard error: how many tokens it makes of that text.
        """
        windows, source = self.windows(model, calib, samples, seqlen), self.float_gguf(model)
        out, text = windows.with_suffix(".imatrix.gguf"), windows.with_suffix(".txt")
        if not out.exists():
            print(f"{out.name}: {_alike(source, windows, text)}", file=sys.stderr, flush=True)
            half = out.with_suffix(".unfinished")
            chunks = ["-c", str(seqlen), "-b", str(seqlen), "--chunks", str(samples), "--parse-special", *THREADS]
            how = ["--output-format", "gguf", "--no-ppl", *chunks]
            tool("llama-imatrix", "-m", str(source), "-f", str(text), "-o", str(half), *how)
            half.rename(out)
        return out


def _alike(source: Path, windows: Path, text: Path) -> str:
    """How near llama.cpp comes to the windows' tokens: words that they cut in two, and joints of theirs, move it by some."""
    from safetensors.torch import load_file

    return f"{load_file(windows)['input_ids'].numel():,} tokens here, {len(tokenized(source, text)):,} by llama.cpp"
