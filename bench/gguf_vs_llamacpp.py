"""GGUF files of bitwright beside those of llama-quantize with an importance matrix of the same text, mix by mix.

    python -m bench.gguf_vs_llamacpp [--models wiki-llama-7m,tiny1m-llama,mixture] [--mixes Q4_K_M,Q2_K] [--method gptaq]
                                     [--seed 0] [--temper 0.05]

Both judged by `bitwright eval` on text that neither has seen; llama-perplexity loads each file of ours and must agree with it,
better where inputs are rounded as it rounds them, and where it is given the same numbers in float32.
Also compared: block type by block type, size by size, and all tokens of WikiText-2's test text. Needs ../shared and
`bench/peers/install.sh llamacpp`.
"""

import argparse
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import BITWRIGHT, OUT, ROOT, SHARED, run, table
from bitwright.calibration.stdlib_text import CALIBRATION, HELD_OUT, module_text
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.gguf.input_rounding import ENGINE
from bitwright.gguf.reader import GgufFile
from bitwright.models.config import read_config
from bitwright.models.skeleton import TOKENS_PER_BATCH, batches
from bitwright.models.streamed import StreamedModel

TOOLS = ROOT / "bench/peers/envs/llamacpp/build/bin"
MIXES = "Q2_K,Q3_K_S,Q3_K_M,Q4_0,IQ4_XS,Q4_K_S,Q4_K_M,Q5_K_M,Q6_K"
THREADS = ["-t", "2"]
WINDOW, JUDGED, CHARACTERS = 256, 16384, 120_000  # of llama-perplexity's text
PAIRED = 49152  # tokens of which two files' losses are compared


@dataclass(frozen=True)
class Case:
    """A model, the text it is calibrated on, the text it is judged on."""

    model: Path
    calib: Path
    text: Path


def case_of(name: str, work: Path) -> Case:
    """wiki-llama-7m on Wikipedia and WikiText-2; tiny1m-llama on the two halves of TinyStories; the mixture of experts on
    Python's standard library, without the modules it is judged on."""
    model, text = SHARED / "models" / name, SHARED / "text"
    if name == "mixture":
        files = [work / f"{part}.txt" for part in ("stdlib", "heldout")]
        for file, modules in zip(files, (CALIBRATION, HELD_OUT), strict=True):
            file.write_text(module_text(modules))
        return Case(ROOT / "bench/mixture", files[0], files[1])
    if name != "tiny1m-llama":
        return Case(model, text / "wiki.txt", text / "wikitext2_raw_test.txt")
    stories = (text / "tinystories.txt").read_text()
    halves = stories[: len(stories) // 2], stories[len(stories) // 2 :]
    files = [work / f"stories{i}.txt" for i in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        file.write_text(half)
    return Case(model, files[0], files[1])


def prepared(name: str, work: Path) -> tuple[Case, Path, Path]:
    """A case, its model as a float .gguf file, and an importance matrix of its calibration text made here."""
    work.mkdir(parents=True, exist_ok=True)
    case, source, imatrix = case_of(name, work), work / "float.gguf", work / "imatrix.gguf"
    for old in (source, imatrix):
        old.unlink(missing_ok=True)
    run([*BITWRIGHT, "convert", str(case.model), str(source), "--json"])
    how = ["--calib", str(case.calib), "--seqlen", str(WINDOW), "--json"]
    run([*BITWRIGHT, "imatrix", str(case.model), str(imatrix), *how])
    return case, source, imatrix


def tool(name: str, *arguments: str) -> str:
    """Run one of llama.cpp's tools and give back all that it said."""
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{name} {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def tokenized(file: Path, text: Path, *more: str) -> list[int]:
    """A text's tokens by llama-tokenize. more: arguments."""
    said = tool("llama-tokenize", "-m", str(file), "-f", str(text), "--ids", "--log-disable", *more)
    return [int(i) for i in re.findall(r"-?\d+", said[said.rindex("[") : said.rindex("]")])]


def tokens_agree(case: Case, file: Path) -> str:
    """Whether llama.cpp cuts WikiText-2's test text as the checkpoint's tokenizer does."""
    text = SHARED / "text/wikitext2_raw_test.txt"
    theirs = tokenized(file, text)
    tokenizer = load_tokenizer(case.model)
    tokenizer.model_max_length = int(1e30)
    mine = tokenizer(text.read_bytes().decode())["input_ids"]  # its line ends as they are
    return f"{len(mine)} tokens, all alike" if mine == theirs else f"DIFFERENT: {len(mine)} and {len(theirs)} tokens"


def disagreement(case: Case, file: Path, work: Path) -> tuple[str, ...]:
    """llama-perplexity's figure less ours on the very same tokens, the second half of each window, in its standard errors.

    The second figure is that of inputs rounded as llama.cpp does, the third that of the same numbers in float32.
    """
    (theirs, error), (exact, _) = (llama_perplexity(case, f, work) for f in (file, decoded(file, work)))
    ids = judged_by_llama(file, work)
    mine, alike = (math.exp(float(losses(file, ids, WINDOW // 2, engine).mean())) for engine in (None, ENGINE))
    return tuple(f"{more / error:+.3f}" for more in (theirs - mine, theirs - alike, exact - mine))


def llama_perplexity(case: Case, file: Path, work: Path) -> tuple[float, float]:
    """llama-perplexity's figure for the beginning of the text that a case is judged on, and its standard error."""
    some = work / "some.txt"
    some.write_text(case.text.read_text()[:CHARACTERS])
    found = None
    while found is None:  # now and then it ends before its log is written
        said = tool(
            "llama-perplexity", "-m", str(file), "-f", str(some), "-c", str(WINDOW), "-b", str(WINDOW), *THREADS
        )
        found = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", said)
    return float(found[1]), float(found[2])


def judged_by_llama(file: Path, work: Path) -> Tensor:
    """The windows [W, T] that llama-perplexity makes of its text."""
    tokenizer = load_tokenizer(file)
    tokenizer.model_max_length = int(1e30)
    ids = torch.tensor(tokenizer((work / "some.txt").read_text())["input_ids"])
    ids = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    if ids[0, 0] == tokenizer.bos_token_id:
        ids[:, 0] = tokenizer.bos_token_id
    return ids


def losses(model: Path, ids: Tensor, start: int = 0, engine: str | None = None) -> Tensor:
    """Mean −log p of each window's tokens behind the first `start`, float64 [W]. ids [W, T]; engine: as `bitwright eval`'s."""
    streamed, lost = StreamedModel(model, engine=engine), []
    for hidden, part in zip(streamed.hidden(ids), batches(ids, TOKENS_PER_BATCH), strict=True):
        logits = streamed.head(hidden)[:, start:-1].log_softmax(-1)
        lost.append(-logits.gather(-1, part[:, start + 1 :, None])[..., 0])
    return torch.cat(lost).double().mean(1)


def judged_windows(case: Case) -> Tensor:
    """All windows [W, T] of the text that a case is judged on."""
    vocabulary = read_config(case.model).get_text_config().vocab_size
    return windows(load_tokenizer(case.model), str(case.text), seqlen=WINDOW, vocabulary=vocabulary)


def difference(mine: Path, theirs: Path, case: Case) -> str:
    """How much more −log p a token loses in our file than in theirs, and its standard error over windows, pair by pair."""
    ids = judged_windows(case)[: PAIRED // WINDOW]
    more = losses(mine, ids) - losses(theirs, ids)
    return f"{float(more.mean()):+.4f} ± {float(more.std()) / len(more) ** 0.5:.4f}"


def decoded(file: Path, work: Path) -> Path:
    """The same numbers in float32, by llama-quantize."""
    flat = work / "decoded.gguf"
    tool("llama-quantize", "--allow-requantize", str(file), str(flat), "F32", "2")
    return flat


def judged(file: Path, case: Case) -> dict[str, float]:
    """`bitwright eval`'s KL and perplexity."""
    more = ["--reference", str(case.model), "--text", str(case.text), "--tokens", str(JUDGED), "--json"]
    return run([*BITWRIGHT, "eval", str(file), *more]).result


def types_differ(mine: Path, theirs: Path) -> str:
    """Tensors to which the two tools gave different types."""
    a, b = (GgufFile(file).tensors for file in (mine, theirs))
    other = [name for name in a | b if (a[name].type if name in a else None) != (b[name].type if name in b else None)]
    return "same" if not other else f"{len(other)} differ: {other[0]}"


def compared(case: Case, mix: str, how: list[str], work: Path, source: Path, imatrix: Path) -> list[str]:
    """A row of the table. how: arguments for `bitwright quantize`."""
    mine, theirs = work / f"mine-{mix}.gguf", work / f"theirs-{mix}.gguf"
    for file in (mine, theirs):
        file.unlink(missing_ok=True)
    arguments = ["--scheme", mix, *how, "--calib", str(case.calib), "--seqlen", str(WINDOW), "--json"]
    done = run([*BITWRIGHT, "quantize", str(case.model), str(mine), *arguments], fine=(0, 1))
    tool("llama-quantize", "--imatrix", str(imatrix), str(source), str(theirs), mix, "2")
    ours, peer = judged(mine, case), judged(theirs, case)
    return [
        case.model.name,
        mix,
        f"{mine.stat().st_size:,}",
        f"{theirs.stat().st_size:,}",
        types_differ(mine, theirs),
        f"{ours['kl_mean']:.5f} ± {ours['kl_stderr']:.5f}",
        f"{peer['kl_mean']:.5f} ± {peer['kl_stderr']:.5f}",
        f"{100 * (1 - ours['kl_mean'] / peer['kl_mean']):.0f} %",
        f"{ours['perplexity']:.3f}",
        f"{peer['perplexity']:.3f}",
        difference(mine, theirs, case),
        *disagreement(case, mine, work),
        f"{done.seconds:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="wiki-llama-7m,tiny1m-llama")
    parser.add_argument("--mixes", default=MIXES)
    parser.add_argument("--method", default="gptaq")
    parser.add_argument("--seed", default="0", help="of the calibration windows")
    parser.add_argument("--temper", type=float, help="share of KL to spend on likelihood; nothing is done without it")
    args = parser.parse_args()
    header = [
        "model", "mix", "bytes", "llama-quantize", "types", "KL", "llama-quantize", "less", "perplexity", "llama-quantize",
        "−log p more than theirs", "llama-perplexity less ours, in its standard errors", "with `--engine llama.cpp`",
        "on its numbers in float32", "seconds",
    ]  # fmt: skip
    rows, how = [], ["--method", args.method, "--seed", args.seed]
    if args.temper is not None:
        OUT.mkdir(parents=True, exist_ok=True)
        recipe = OUT / "temper.toml"
        recipe.write_text(f"temper = {args.temper}\n")
        how += ["--recipe", str(recipe)]
    for name in args.models.split(","):
        work = OUT / "gguf" / name
        work.mkdir(parents=True, exist_ok=True)
        case = case_of(name, work)
        source, imatrix = work / "float.gguf", work / "imatrix.gguf"
        source.unlink(missing_ok=True)
        run([*BITWRIGHT, "convert", str(case.model), str(source), "--json"])
        chunks = ["-c", str(WINDOW), "--chunks", "128", *THREADS]
        tool("llama-imatrix", "-m", str(source), "-f", str(case.calib), "-o", str(imatrix), *chunks)
        print(name, tokens_agree(case, source), file=sys.stderr, flush=True)
        for mix in args.mixes.split(","):
            rows.append(compared(case, mix, how, work, source, imatrix))
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(header, rows))


if __name__ == "__main__":
    main()
