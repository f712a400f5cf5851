"""`eval --kv`: what the decoders compute with keys and values in few bits is what is judged."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bitwright import evaluate, load, quantize
from bitwright.calibration.windows import load_tokenizer, read_text
from bitwright.cli.app import app
from bitwright.errors import InputError
from bitwright.inference.decoder import Part
from bitwright.inference.module_decoder import ModuleDecoder
from bitwright.numerics.key_value_codes import KEY_VALUE_CODES


def test_what_is_judged_is_what_decodes(llama: Path, text: str) -> None:
    judged = evaluate(llama, reference=llama, text=text, seqlen=60, tokens=60, kv="q4")
    ids = torch.tensor(load_tokenizer(llama).encode(read_text(text)))[:60]
    log_p, log_q = (
        ModuleDecoder(load(llama), 60, kv=codes).read([Part(0, ids, 60)])[0].log_softmax(-1)[:-1]
        for codes in (None, KEY_VALUE_CODES["q4"])
    )
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert judged.kl_mean == pytest.approx(kl, rel=0.05) and kl > 1e-8


def test_few_bits_cost_more_and_are_asked_for_on_the_command_line(llama: Path, text: str) -> None:
    found = []
    for kv in ("q8", "q4"):
        options = ["--reference", str(llama), "--text", text, "--seqlen", "60", "--tokens", "120", "--kv", kv, "--json"]
        done = CliRunner().invoke(app, ["eval", str(llama), *options])
        found.append(json.loads(done.stdout)["kl_mean"])
    assert 0 < found[0] < found[1] / 4
    assert CliRunner().invoke(app, ["eval", str(llama), "--text", text, "--kv", "q5"]).exit_code == 2


def test_what_is_rounded_already_is_not_rounded_again(llama: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "q"
    quantize(llama, out, scheme="int8-channel", method="rtn", kv_cache="int8-tensor", calib=text, samples=2, seqlen=32)
    with pytest.raises(InputError, match="already"):
        evaluate(out, text=text, seqlen=32, tokens=64, kv="q8")
    done = CliRunner().invoke(app, ["generate", str(out), "--prompt", "x", "--kv", "q4"])
    assert done.exit_code == 2 and "leave out --kv" in done.stderr
