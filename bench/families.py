"""Every family of the installed transformers that predicts a next token, as a tiny random model: what works, and why not.

    OMP_NUM_THREADS=1 python -m bench.families [FAMILY ...] [--jobs 2] [--known FILE]

Each is saved as transformers saves it, quantized to int4-g32 in compressed-tensors by GPTQ on a few windows, loaded by
transformers and by bitwright, judged, and quantized to GGUF. All three must give the same logits: transformers' own on the
same files, those of `bitwright.load`, and those of the evaluation's walk over one block at a time. Without families named,
docs/families.md is written. Exit status 1 if anything ended in a traceback.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import bitwright
from bench.measure import ROOT, table
from bench.tiny_models import construction, families, model_class, tiny_model
from bitwright.errors import BitwrightError
from bitwright.models.families import ENCODERS
from bitwright.models.streamed import StreamedModel

TEXT = "".join(
    f"{i}. The quick brown fox jumps over {i * i} lazy dogs, then {1 / (i + 1):.9f} (again)!\n" for i in range(40)
)
IDS = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(0))
SAME = 1e-2  # relative difference of logits: `load` rounds inputs to 16 bits, transformers multiplies in float32
DOCS = ROOT / "docs" / "families.md"
YES = "yes"


@dataclass(frozen=True)
class Outcome:
    """Of one family: what each step came to, "yes" or the reason why not; `broken`: what ended in a traceback."""

    family: str
    made: str = ""
    quantized: str = ""
    transformers: str = ""
    loaded: str = ""
    judged: str = ""
    gguf: str = ""
    broken: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether compressed-tensors does, from end to end."""
        return [self.quantized, self.transformers, self.loaded, self.judged] == [YES] * 4


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<eos>": 256}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<eos>", eos_token="<eos>").save_pretrained(folder)


def tried(kind: str) -> Outcome:
    """All steps for one family, in a directory of its own."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return _Trial(kind, Path(folder)).outcome()


class _Trial:
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.model, self.out = kind, folder / "model", folder / "out"
        self.text, self.gguf = folder / "text.txt", folder / "out.gguf"
        self.text.write_text(TEXT)
        self.broken: list[str] = []
        self.known: Tensor | None = None

    def outcome(self) -> Outcome:
        found = Outcome(self.kind, made=self._step("save", self._save, ours=False), broken=self.broken)
        if found.made != YES:
            return found
        found = replace(found, quantized=self._step("quantize", self._quantize), gguf=self._step("gguf", self._to_gguf))
        if found.quantized != YES:
            return replace(found, made=self._step("save", self._reread, ours=False))
        return replace(
            found,
            transformers=self._step("transformers", self._load_theirs, ours=False),
            loaded=self._step("load", self._load),
            judged=self._step("eval", self._judge),
        )

    def _step(self, name: str, run: Callable[[], str | None], *, ours: bool = True) -> str:
        """ "yes", or what is said instead. ours: an error that is not raised on purpose is a defect."""
        try:
            return run() or YES
        except BitwrightError as error:
            return (
                f"{error.message} ({error.where})"
                if error.where and str(self.model) not in error.where
                else error.message
            )
        except Exception as error:  # noqa: BLE001 (this is what it looks for)
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            if ours:
                at = traceback.extract_tb(error.__traceback__)[-1]
                self.broken.append(f"{name}: {said} at {Path(at.filename).name}:{at.lineno}")
            return said

    def _save(self) -> None:
        model = tiny_model(self.kind)
        self._run(model)
        model.save_pretrained(self.model)
        save_tokenizer(self.model)

    def _reread(self) -> str | None:
        """Whether transformers itself reads what it has saved."""
        missing = self._theirs(self.model)[1]["missing_keys"]
        return f"transformers misses {min(missing)} in its own file" if missing else None

    def _theirs(self, folder: Path) -> tuple[nn.Module, dict[str, set[str]]]:
        """A directory loaded by transformers, and what it missed."""
        options = {"dtype": torch.float32, "output_loading_info": True, **construction(self.kind)}
        model, info = model_class(self.kind).from_pretrained(folder, **options)
        return model.eval(), info

    @torch.no_grad()
    def _run(self, model: nn.Module) -> Tensor:
        """Logits, or an encoder's hidden states."""
        if self.kind in ENCODERS:
            hidden: Tensor = model(input_ids=IDS).last_hidden_state
            return hidden
        return model(input_ids=IDS, use_cache=False).logits.float()

    def _quantize(self) -> None:
        bitwright.quantize(
            self.model, self.out, scheme="int4-g32", method="gptq", calib=str(self.text), samples=2, seqlen=16
        )

    def _to_gguf(self) -> None:
        bitwright.quantize(self.model, self.gguf, scheme="q8_0", method="rtn", calib="none", pure=True)

    def _load_theirs(self) -> str | None:
        model, info = self._theirs(self.out)
        odd = [f"{what}: {sorted(names)[0]}" for what, names in info.items() if names]
        self.known = None if odd else self._run(model)
        return ", ".join(odd) or None

    def _load(self) -> str | None:
        return self._compared(self._run(bitwright.load(self.out)))

    def _judge(self) -> str | None:
        streamed = StreamedModel(self.out)
        hidden = torch.cat(streamed.hidden(IDS))
        if self.kind in ENCODERS:
            with streamed.skeleton._ports([], streamed.skeleton._calls.form, hidden):
                return self._compared(self._run(streamed.skeleton.model))  # a last norm behind the blocks
        said = self._compared(streamed.head(hidden))
        bitwright.evaluate(self.model, text=str(self.text), seqlen=16, tokens=32)
        return said

    def _compared(self, logits: Tensor) -> str | None:
        """Beside those known so far, the first that there were: transformers' own unless it did not come that far."""
        if self.known is None:
            self.known = logits
        away = float((logits - self.known).norm() / self.known.norm())
        return None if away < SAME else f"logits are {away:.2g} off"


def written(found: list[Outcome]) -> str:
    """docs/families.md."""
    works, made = [o for o in found if o.works], [o for o in found if o.made == YES]
    rows = [[o.family, YES if o.works else "no", _short(o.gguf), "" if o.works else _why(o)] for o in made]
    unmade = ", ".join(o.family for o in found if o.made != YES)
    return f"""# Families

Printed by `python -m bench.families` under transformers {transformers.__version__}: {len(found)} families that predict a next
token, each as a tiny random model. {len(works)} work from end to end in compressed-tensors: quantized by GPTQ, loaded by
transformers and by bitwright with the same logits, judged by `eval`. Of the others the table names what is missing. Of models
with towers for images or sound the text model is quantized, and the rest is kept.

{table(["family", "compressed-tensors", "GGUF", "what is missing"], rows)}

No tiny model is made of: {unmade}.
"""


def _why(o: Outcome) -> str:
    named = {"": o.quantized, "transformers: ": o.transformers, "load: ": o.loaded, "eval: ": o.judged}
    first = next((f"{step}{said}" for step, said in named.items() if said not in (YES, "")), "")
    return first.replace("|", "/")


def _short(said: str) -> str:
    return said if said == YES else "no"


def _all(kinds: list[str], jobs: int) -> Iterator[Outcome]:
    """As they come."""
    if jobs == 1:
        yield from map(tried, kinds)
        return
    with get_context("spawn").Pool(jobs, maxtasksperchild=20) as pool:
        yield from pool.imap_unordered(tried, kinds)


def _known(file: Path | None) -> list[Outcome]:
    """The last outcome that a file has of each family."""
    lines = [] if file is None else [line for line in file.read_text().splitlines() if line.startswith("{")]
    return list({outcome.family: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}.values())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--known", type=Path, help="what an earlier run printed: those families are not tried again")
    arguments = parser.parse_args()
    found = _known(arguments.known)
    asked = [kind for kind in arguments.family or families() if all(o.family != kind for o in found)]
    for outcome in _all(asked, arguments.jobs):
        found.append(outcome)
        print(json.dumps(asdict(outcome)), flush=True)
    found.sort(key=lambda o: o.family)
    if not arguments.family:
        DOCS.write_text(written(found), encoding="utf-8")
    broken = [f"{o.family}: {what}" for o in found for what in o.broken]
    print(f"{sum(o.works for o in found)} of {len(found)} work", *broken, sep="\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
