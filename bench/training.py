"""What training, merging and pruning give: QLoRA beside LoRA on 16-bit weights, merges of its adapter, distillation of
quantized models, and pruned models. (Weights stored in 8 bits: bench/storage.py.)

    python -m bench.training [--model DIR] [--text FILE] [--steps 30] [--batch 2] [--seqlen 128] [--parts lora,merge,prune]

Distilled and pruned models are calibrated and trained on the text's first nine tenths, and judged on the last.

Every figure is kept in bench/out/training/results.json as soon as it is known: the same command goes on from there. Small by
default, on the built-in model; --steps 300 --batch 8 --seqlen 256 --model DIR for a real one. The text needs ../shared.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measure import BITWRIGHT, OUT, PEER, PEERS_COMPUTE_IN, ROOT, SHARED, run, table

WORK = OUT / "training"
PRUNED = [f"{method}:{amount}" for amount in ("0.5", "2:4") for method in ("sparsegpt", "wanda", "magnitude")]
DISTILLED = ("int2-g32", "int3-g64", "int4-g64")
TRAINED = {
    "": "–",
    "scales": "scales and norms",
    "zero": "an adapter beside it",
    "residual": "an adapter, --init residual",
}
QLORA = "nf4-g64-dq"


@dataclass(frozen=True)
class Bench:
    """The arguments, and the results so far."""

    model: Path
    text: Path
    steps: int
    batch: int
    seqlen: int
    samples: int
    tokens: int
    lr: float

    def known(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result by key, made and kept if it is not there yet."""
        file = WORK / "results.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        whole = f"{self.model.name} {self.text.name} {self.steps}x{self.batch}x{self.seqlen} {self.lr:g} {self.tokens} {key}"
        if whole not in found:
            found[whole] = make()
            WORK.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1))
        result: dict[str, Any] = found[whole]
        return result

    def trained(self, scheme: str, rounded: Path | None = None) -> dict[str, Any]:
        """A LoRA adapter beside weights in this scheme; float: 16 bits. rounded: a model that is rounded already."""
        sizes = ["--steps", str(self.steps), "--batch", str(self.batch), "--seqlen", str(self.seqlen)]
        more = [
            *sizes,
            "--scheme",
            scheme,
            "--data",
            str(self.text),
            "--lr",
            str(self.lr),
            "--save-every",
            "10",
            "--json",
        ]
        name = scheme if rounded is None else f"{scheme}-calibrated"
        command = [*BITWRIGHT, "finetune", str(rounded or self.model), str(self.adapter(name)), *more]
        return self.known(f"lora {name}", lambda: run(command).result)

    def windows(self) -> Path:
        """The windows of `finetune` in the order of its steps, and those that it judges on, for peers."""
        from safetensors.torch import save_file
        from transformers import AutoConfig, AutoTokenizer

        from bitwright.train.data import training_data
        from bitwright.train.finetune import drawn
        from bitwright.train.settings import Training

        how = Training(steps=self.steps, batch=self.batch, seqlen=self.seqlen, lr=self.lr)
        vocabulary, total = AutoConfig.from_pretrained(self.model).vocab_size, self.steps * self.batch
        data = training_data(
            AutoTokenizer.from_pretrained(self.model), str(self.text), seqlen=self.seqlen, vocabulary=vocabulary,
            windows=total, seed=how.seed, where=str(self.model),
        )  # fmt: skip
        seen = [data.seen.ids[drawn(len(data.seen), step, how)] for step in range(self.steps)]
        file = WORK / f"windows-{self.model.name}-{self.steps}x{self.batch}x{self.seqlen}.safetensors"
        WORK.mkdir(parents=True, exist_ok=True)
        rates = torch.tensor([how.rate(step) for step in range(self.steps)], dtype=torch.float64)
        save_file({"seen": torch.cat(seen), "held_out": data.held_out.ids, "rates": rates}, file)
        return file

    def by_peft(self, weights: str) -> dict[str, Any]:
        """The same by transformers and peft alone; weights: "bfloat16", or "nf4", bitsandbytes'."""
        sizes = ["--steps", str(self.steps), "--batch", str(self.batch), "--weights", weights]
        script = str(ROOT / "bench/peers/peft_lora.py")
        command = [sys.executable, script, str(self.model), "--windows", str(self.windows()), *sizes]
        return self.known(f"peft {weights}", lambda: run(command).result)

    def adapter(self, scheme: str) -> Path:
        """Where that adapter lies."""
        return WORK / f"adapter-{self.model.name}-{scheme}-{self.steps}x{self.batch}x{self.seqlen}"

    @property
    def calibration(self) -> list[str]:
        """Options of calibration."""
        return ["--samples", str(self.samples), "--seqlen", str(self.seqlen)]

    def merged(self, scheme: str, ending: str) -> dict[str, Any]:
        """The QLoRA adapter merged at this scheme."""
        out = WORK / f"merged-{self.model.name}-{scheme}{ending}"
        judged = ["--calib", str(self.text), "--tokens", str(self.tokens), "--eval-seqlen", str(self.seqlen), "--json"]
        command = [*BITWRIGHT, "merge", str(self.model), str(self.adapter(QLORA)), str(out), "--scheme", scheme]
        return self.known(f"merge {scheme}", lambda: run([*command, *self.calibration, *judged], fine=(0, 1)).result)

    def parts(self) -> tuple[Path, Path]:
        """The text's first nine tenths, and its last."""
        lines = self.text.read_text(encoding="utf-8").splitlines(keepends=True)
        cut = len(lines) * 9 // 10
        found = WORK / f"seen-{self.text.name}", WORK / f"held-out-{self.text.name}"
        WORK.mkdir(parents=True, exist_ok=True)
        for file, part in zip(found, (lines[:cut], lines[cut:]), strict=True):
            file.write_text("".join(part), encoding="utf-8")
        return found

    def calibrated(self) -> Path:
        """The model rounded by the default method, with calibration on the seen text."""
        out = WORK / f"{self.model.name}-{QLORA}"
        if not out.exists():
            how = ["--scheme", QLORA, "--format", "bitwright", "--calib", str(self.parts()[0]), *self.calibration]
            run([*BITWRIGHT, "quantize", str(self.model), str(out), *how], fine=(0, 1))
        return out

    def judged(self, model: Path, adapter: Path | None = None) -> dict[str, Any]:
        """Perplexity and KL from the original, on what is held out."""
        from bitwright.evaluation.evaluate import evaluate

        how: dict[str, Any] = {"reference": self.model, "seqlen": self.seqlen, "tokens": self.tokens}
        found = evaluate(model, texts=[str(self.parts()[1])], adapter=adapter, predictions=WORK / "predictions", **how)[
            0
        ]
        return {"kl_mean": found.kl_mean, "kl_stderr": found.kl_stderr, "perplexity": found.perplexity}

    def quantized(self, name: str, **how: Any) -> dict[str, Any]:
        """The model rounded, with calibration on the seen text, and judged."""
        from bitwright import quantize

        out = WORK / f"{self.model.name}-{name}"

        def make() -> dict[str, Any]:
            begun = time.process_time()
            if not out.exists():
                sizes: dict[str, Any] = {"samples": self.samples, "seqlen": self.seqlen}
                quantize(self.model, out, format="bitwright", calib=str(self.parts()[0]), **sizes, **how)
            spent, size = time.process_time() - begun, (out / "model.safetensors").stat().st_size
            return {**self.judged(out), "out": str(out), "seconds": spent, "bytes": size}

        return self.known(name, make)

    def distilled(self, scheme: str, method: str, way: str) -> dict[str, Any]:
        """A rounded model trained towards the original: way "scales", with its norms; or where an adapter beside it begins."""
        from bitwright.train.finetune import finetune
        from bitwright.train.settings import Training

        source = Path(self.quantized(f"round-{scheme}-{method}", scheme=scheme, method=method)["out"])
        out, alone = source.with_name(f"{source.name}-{way}"), way == "scales"
        how = Training(
            steps=self.steps, batch=self.batch, seqlen=self.seqlen, teacher=self.model, scales_only=alone,
            init="zero" if alone else way, lr=self.lr,
        )  # fmt: skip

        def make() -> dict[str, Any]:
            begun = time.process_time()
            if not out.exists():
                finetune(source, out, data=str(self.parts()[0]), how=how)
            spent = time.process_time() - begun
            return {**(self.judged(out) if alone else self.judged(source, out)), "seconds": spent}

        return self.known(f"distil-{scheme}-{method}-{way}", make)

    def pruned(self, scheme: str, prune: str) -> dict[str, Any]:
        """The model pruned, rounded and judged; prune "": not pruned."""
        name = f"prune-{scheme}-{prune.replace(':', '-')}"
        return self.quantized(name, scheme=scheme, **({"prune": prune} if prune else {}))

    def pruned_by_peer(self, prune: str) -> dict[str, Any]:
        """The model pruned by llm-compressor on the same windows, in float, and judged."""
        out, tokens = WORK / f"{self.model.name}-peer-{prune.replace(':', '-')}", WORK / f"{self.model.name}-windows"

        def make() -> dict[str, Any]:
            script, source = str(ROOT / "bench/peers/llmcompressor_gptq.py"), str(self.parts()[0])
            run([sys.executable, "-m", "bench.make_tokens", str(self.model), source, str(tokens), *self.calibration])
            how = ["--tokens", str(tokens), "--dtype", PEERS_COMPUTE_IN, "--prune", prune]
            if not out.exists():
                run([str(PEER), script, str(self.model), str(out), *how])
            return self.judged(out)

        return self.known(f"peer {prune}", make)


def lora(bench: Bench) -> str:
    """QLoRA beside LoRA on 16-bit weights, and both by peft alone."""
    rows = []
    for name, found in (
        ("QLoRA, nf4-g64-dq to nearest", lambda: bench.trained(QLORA)),
        ("QLoRA, nf4-g64-dq by the default method", lambda: bench.trained(QLORA, bench.calibrated())),
        ("LoRA, 16 bits", lambda: bench.trained("float")),
        ("peft, bitsandbytes' nf4", lambda: bench.by_peft("nf4")),
        ("peft, bfloat16", lambda: bench.by_peft("bfloat16")),
    ):
        r = found()
        figures = [r["loss_before"], r["loss_after"], r["tokens_per_second"], r["peak_rss_bytes"] / 1e6]
        rows.append([name, *(f"{f:.4f}" if f < 50 else f"{f:,.0f}" for f in figures)])
    return table(["", "held-out loss before", "after", "tokens a second", "MB at most"], rows)


def merge(bench: Bench) -> str:
    """What merges keep of the adapter."""
    bench.trained("nf4-g64-dq")
    rows = []
    for scheme, ending in (("int4-g64", ""), ("q4_k_m", ".gguf")):
        for way in bench.merged(scheme, ending)["ways"]:
            kept = [
                f"{way['kl_mean']:.5f} ± {way['kl_stderr']:.5f}",
                f"{way['perplexity']:.3f}",
                f"{way['gain_kept']:.0%}",
            ]
            rows.append([scheme, way["name"], *kept])
    return table(["scheme", "way", "KL to the adapted model", "perplexity", "gain kept"], rows)


def distil(bench: Bench) -> str:
    """Quantized models trained towards the original, beside the methods that need no training."""
    rows = []
    for scheme in DISTILLED:
        for method in ("gptaq", "autoround"):
            ways = [("", bench.quantized(f"round-{scheme}-{method}", scheme=scheme, method=method))]
            ways += [(way, bench.distilled(scheme, method, way)) for way in ("scales", "zero", "residual")]
            for way, r in ways:
                kl = f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}"
                rows.append([scheme, method, TRAINED[way], kl, f"{r['perplexity']:.3f}", f"{r['seconds'] / 60:.1f}"])
    return table(["scheme", "method", "trained", "KL", "perplexity", "CPU minutes"], rows)


def prune(bench: Bench) -> str:
    """Pruned models, in 8 bits (nearly alone) and in 4; those of llm-compressor, if it is installed."""
    rows = []
    for scheme in ("int8-g64", "int4-g64"):
        for how in ("", *PRUNED):
            r = bench.pruned(scheme, how)
            rows.append(
                [scheme, how or "–", f"{r['perplexity']:.3f}", f"{r['kl_mean']:.4f}", f"{r['bytes'] / 1e6:.1f}"]
            )
    for how in (name for name in PRUNED if PEER.exists() and "magnitude" not in name):
        r = bench.pruned_by_peer(how)
        rows.append(["llm-compressor, float", how, f"{r['perplexity']:.3f}", f"{r['kl_mean']:.4f}", "–"])
    return table(["scheme", "pruned", "perplexity", "KL", "MB"], rows)


PARTS = {"lora": lora, "merge": merge, "distil": distil, "prune": prune}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src/bitwright/builtin")
    parser.add_argument("--text", type=Path, default=SHARED / "text/tinystories.txt")
    parser.add_argument("--parts", default=",".join(PARTS))
    for name, value in (("steps", 30), ("batch", 2), ("seqlen", 128), ("samples", 16), ("tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = vars(parser.parse_args())
    parts = args.pop("parts").split(",")
    bench = Bench(**args)
    for part in parts:
        print(f"\n{part}\n\n{PARTS[part](bench)}", flush=True)


if __name__ == "__main__":
    main()
