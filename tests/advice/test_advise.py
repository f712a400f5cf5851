"""Advice: the classics of memory, what fits which GPU, what is not to be quantized, and bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from bitwright.advice import machine
from bitwright.advice.advise import BESIDE_IN_MODULES, CPU_SCHEMES, Advice, advise, expected_speed
from bitwright.advice.engines import ENGINES, TABLE
from bitwright.advice.machine import Gpu, Machine, this_machine
from bitwright.advice.measured import measured
from bitwright.advice.model_shape import head_type, shape_of
from bitwright.api import quantize
from bitwright.cli.app import app
from bitwright.errors import InputError
from conftest import FAMILIES, make_checkpoint

LLAMA_13B = {
    "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LAPTOP = Machine(
    "a CPU", ("AVX2",), 8, 8, 16 << 30, 12 << 30, "avx2", 40e9, {"float32": 4e11},
    dict.fromkeys(CPU_SCHEMES, 60000000000.0),
)  # fmt: skip
T4 = replace(LAPTOP, gpus=(Gpu("Tesla T4", 15_828_320_256, (7, 5), 280e9),))
H100 = replace(LAPTOP, gpus=(Gpu("NVIDIA H100", 85_520_809_984, (9, 0), 3e12),))


def config_only(folder: Path, kind: str, **options: Any) -> Path:
    """A directory with nothing but a config.json."""
    folder.mkdir()
    AutoConfig.for_model(kind, **options).save_pretrained(folder)
    return folder


def advice(model: Path, on: Machine, context: int = 4096, engine: str | None = None) -> Advice:
    return advise(shape_of(model), on, model="MODEL", context=context, engine=engine)


def test_175_billion_parameters_in_float32_are_700_gb(tmp_path: Path) -> None:
    sizes = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 50257}
    model = config_only(tmp_path / "gpt3", "gpt2", **sizes)
    shape = shape_of(model / "config.json")
    assert round(shape.parameters / 1e9) == 175
    assert shape.weight_bytes("float32") == pytest.approx(700e9, rel=0.01) == 4 * shape.parameters
    assert shape.cache_bytes(2048) == 2 * 96 * 12288 * 2048 * 2
    found = advise(shape, LAPTOP, model="MODEL", context=2048)
    assert not any(fit.fits for fit in found.fits)
    assert not found.scheme and "nothing fits" in found.why[0]


def test_13_billion_on_a_t4(tmp_path: Path) -> None:
    found = advice(config_only(tmp_path / "llama", "llama", **LLAMA_13B), T4)
    fits = {fit.scheme: fit for fit in found.fits}
    assert fits["bfloat16"].weights == pytest.approx(26e9, rel=0.01)
    assert not fits["bfloat16"].fits and not fits["int8-channel"].fits and fits["int4-g128"].fits
    assert fits["int4-g128"].cache == 2 * 40 * 5120 * 4096 * 2
    assert "fp8-channel" not in fits  # Turing has no FP8
    assert (found.scheme, found.format, found.engine) == ("int4-g128", "compressed-tensors", "vLLM")
    assert found.command == "bitwright quantize MODEL OUT --scheme int4-g128 --method gptaq"
    large = advice(tmp_path / "llama", H100)
    assert large.scheme == "fp8-channel" and "--activations fp8-token" in large.command
    assert {fit.scheme for fit in large.fits if not fit.fits} == set()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3"])
def test_a_config_alone_says_what_the_weights_say(family: str, tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", family)
    alone = config_only(tmp_path / "alone", family, **FAMILIES[family])
    a, b = shape_of(whole), shape_of(alone)
    assert (a.matrices, a.embedding, a.head, a.other, a.cached) == (b.matrices, b.embedding, b.head, b.other, b.cached)
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert a.parameters == sum(p.numel() for p in model.parameters())
    assert a.stored == "bfloat16" and not a.quantized


def test_experts_that_a_token_does_not_meet_are_not_read(tmp_path: Path) -> None:
    sizes = {**FAMILIES["mistral"], "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = shape_of(config_only(tmp_path / "mixtral", "mixtral", **sizes))
    experts = sum(count for count in shape.matrices.values()) - sum(count for count in shape.active.values())
    assert experts == 3 * 3 * (8 - 2)


def test_windows_end_the_kv_cache(tmp_path: Path) -> None:
    shape = shape_of(config_only(tmp_path / "gemma", "gemma3_text", **FAMILIES["gemma3_text"]))
    kinds = AutoConfig.from_pretrained(tmp_path / "gemma").layer_types
    each = 2 * 2 * 16 * 2
    tokens = sum(min(1000, 8) if kind == "sliding_attention" else 1000 for kind in kinds)
    assert shape.cache_bytes(1000) == each * tokens


def test_a_quantized_or_tiny_model_is_left_alone(llama: Path, text: str, tmp_path: Path) -> None:
    found = advice(llama, LAPTOP, context=64)
    assert not found.scheme and "should not be quantized" in found.why[0] and found.training.startswith("no")
    quantize(llama, tmp_path / "q", scheme="int4-g64", method="rtn", calib="none")
    again = advice(tmp_path / "q", LAPTOP, context=64)
    assert not again.scheme and "quantized already (compressed-tensors)" in again.why[0]
    quantize(llama, tmp_path / "q.gguf", scheme="q8_0", method="rtn", calib="none")
    assert shape_of(tmp_path / "q.gguf").stored == "q8_0"


def test_engines_are_held_to_their_hardware(tmp_path: Path) -> None:
    model = config_only(tmp_path / "llama", "llama", **{**LLAMA_13B, "num_hidden_layers": 20})
    assert advice(model, LAPTOP).format == "gguf"
    vllm = advice(model, LAPTOP, engine="vllm")
    assert (vllm.scheme, vllm.format) == ("int4-g128", "gptq")
    onnx = advice(model, LAPTOP, engine="ONNX Runtime")
    assert not onnx.scheme and "another --engine" in onnx.why[0]
    with pytest.raises(InputError, match="runs nothing quantized on a CPU, no GPU"):
        advice(model, LAPTOP, engine="TensorRT-LLM")
    with pytest.raises(InputError, match="unknown engine"):
        advice(model, LAPTOP, engine="vlllm")
    with pytest.raises(InputError, match="4096 positions"):
        advice(model, LAPTOP, context=5000)
    assert all(row.engine == "bitwright" or row.source.startswith("https://") for row in TABLE)
    assert {"vLLM", "llama.cpp", "transformers", "ONNX Runtime", "TensorRT-LLM"} < set(ENGINES)


def test_speed_is_what_memory_and_products_allow(tmp_path: Path) -> None:
    shape = shape_of(config_only(tmp_path / "llama", "llama", **LLAMA_13B))
    wide = expected_speed(shape, LAPTOP, "bfloat16", 1)
    read, products = 2 * (shape.parameters - shape.embedding) / 40e9, sum(shape.active.values())
    assert wide == pytest.approx(1 / (read + products * BESIDE_IN_MODULES), rel=0.01)
    narrow = expected_speed(shape, LAPTOP, "q4_k", 1)
    assert narrow == pytest.approx(6e10 / (shape.parameters - shape.embedding), rel=0.01)
    long = expected_speed(shape, LAPTOP, "q4_k", 4096)
    assert long is not None and narrow is not None
    assert 1 / long - 1 / narrow == pytest.approx(shape.cache_bytes(4095) / 40e9, rel=0.01)


def test_the_command_prints_80_columns_and_json(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.advice.machine.this_machine", lambda _: LAPTOP)
    model = config_only(tmp_path / "llama", "llama", **LLAMA_13B)
    done = CliRunner().invoke(app, ["advise", str(model), "--context", "2048"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if not line.startswith("bitwright quantize")]
    assert max(map(len, lines)) <= 80
    done_lines = done.output
    assert "q4_k" in done.output and "take q4_k_m by gptaq, as gguf, for llama.cpp" in done.output
    done = CliRunner().invoke(app, ["advise", str(model), "--json"])
    found = json.loads(done.stdout)
    assert found["model"]["float32_bytes"] == 4 * found["model"]["parameters"]
    assert found["recommended"]["command"].startswith(f"bitwright quantize {model} OUT.gguf --scheme q4_k_m")
    unchecked, checked = done_lines.index("sources, not checked:"), done_lines.index("sources, read 2026-11-29:")
    assert unchecked < done_lines.rindex("llama.cpp/blob") < checked < done_lines.rindex("docs.vllm.ai")
    monkeypatch.setattr(
        "bitwright.advice.machine.this_machine", lambda _: pytest.fail("measured before it was refused")
    )
    for wrong in (("--context", "4097"), ("--engine", "vllama")):
        done = CliRunner().invoke(app, ["advise", str(model), *wrong, "--json"])
        assert done.exit_code == 2 and json.loads(done.stdout)["where"] == wrong[0]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for bad in (tmp_path / "nowhere", tmp_path / "broken"):
        done = CliRunner().invoke(app, ["advise", str(bad), "--json"])
        assert done.exit_code == 2 and json.loads(done.stdout)["error"]


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.inference.speed.PROBE_BYTES", 1 << 24)
    monkeypatch.setattr("bitwright.advice.machine.SIDE", 256)
    monkeypatch.setattr("bitwright.advice.machine.COPIES_BYTES", 1 << 19)
    found = this_machine(("int4-g128", "q2_k"))
    assert found.cores >= 1 and 0 < found.available <= found.memory
    assert min(found.bandwidth, *found.products.values(), *found.weights.values()) > 1e6


def test_groups_fit_the_rows_and_a_short_run_checks_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", intermediate_size=160, hidden_size=64)
    monkeypatch.setattr("bitwright.advice.advise.SMALL", 1000)
    shape = shape_of(model)
    found = advise(shape, LAPTOP, model="MODEL", context=64, engine="vLLM")
    assert found.scheme == "int8-channel"  # quick enough in eight bits
    slow = replace(LAPTOP, weights=dict.fromkeys(CPU_SCHEMES, 1e5))
    assert advise(shape, slow, model="MODEL", context=64, engine="vLLM").scheme == "int4-g32"
    monkeypatch.setattr("bitwright.advice.measured.MEASURED_TOKENS", (8, 4))
    monkeypatch.setattr("bitwright.inference.speed.PROBE_BYTES", 1 << 24)
    run = measured(model, found)
    assert run.measured > 0 and run.expected > 0
    assert head_type("q8_0") == "q8_0" and head_type("q4_k") == "q6_k" and head_type("int8-channel") == ""
    with pytest.raises(InputError, match="stored as"):
        measured(model, replace(found, shape=replace(shape, quantized=True)))
    with pytest.raises(InputError, match="predicts no next token"):
        measured(model, replace(found, shape=replace(shape, predicts=False)))
    with pytest.raises(InputError, match="GB are free"):
        measured(model, replace(found, machine=replace(LAPTOP, available=1 << 20)))


def test_a_container_has_no_more_memory_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "meminfo"
    known.write_text("MemTotal: 32000000 kB\nMemFree: 1 kB\nMemAvailable: 20000000 kB\n")
    monkeypatch.setattr(machine, "MEMORY_INFO", known)
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)
    assert machine._memory() == (32_000_000 * 1024, 20_000_000 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._memory() == (32_000_000 * 1024, 20_000_000 * 1024)
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    assert machine._memory() == (8_000_000_000, 5_000_000_000)
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 2000000000\nactive_file 7\n")
    assert machine._memory() == (8_000_000_000, 7_000_000_000)


def test_an_encoder_keeps_no_keys_and_values(tmp_path: Path) -> None:
    shape = shape_of(make_checkpoint(tmp_path / "bert", "bert"))
    assert not shape.predicts and shape.cache_bytes(64) == 0


def test_layers_of_two_kinds_of_heads_are_counted_each_for_itself(tmp_path: Path) -> None:
    """Gemma 4: heads of two sizes and numbers; the last layers have keys and values of earlier ones."""
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 64}
    own = {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2, "hidden_size": 64}
    options = {"num_hidden_layers": 6, "vocab_size": 257, "vocab_size_per_layer_input": 257, "layer_types": kinds}
    cached = shape_of(config_only(tmp_path / "gemma", "gemma4_text", **sizes, **own, **options)).cached
    assert set(cached) == {(2 * 2 * 2 * 16, 512), (2 * 2 * 1 * 64, None)}
