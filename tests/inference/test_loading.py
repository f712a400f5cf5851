"""Loaded checkpoints: logits as the evaluation's independent walk has them, native steps as the modules have them."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

from bitwright import kernels, load, quantize
from bitwright.calibration.windows import load_tokenizer
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError, InputError, KernelError, RecipeError
from bitwright.formats import FORMATS, Layer
from bitwright.formats.ggml_scales import READ_ONLY
from bitwright.inference.decoding import decoder_of, tokens
from bitwright.inference.dense import Dense
from bitwright.inference.generation import Written, pieces
from bitwright.inference.lookup import Lookup
from bitwright.inference.module_decoder import ModuleDecoder
from bitwright.inference.native_decoder import LIKE_LLAMA, NativeDecoder
from bitwright.inference.qlinear import QLinear
from bitwright.inference.sampling import Sampling
from bitwright.methods.rtn import rtn
from bitwright.models.streamed import StreamedModel
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import Outliers, Scales
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.conversion import convert
from conftest import FAMILIES, ISAS, SIZES, in_blocks, make_checkpoint

IDS = torch.tensor([[10, 200, 3, 77, 5, 5, 130, 64, 1, 2, 90, 33]])
MADE = [
    ("compressed-tensors", "int4-g32"), ("compressed-tensors", "int3-channel-asym"), ("compressed-tensors", "mxfp4"),
    ("compressed-tensors", "nvfp4"), ("compressed-tensors", "fp8-channel"), ("gptq", "int4-g32-asym"),
    ("bitwright", "nf4-g64-dq"), ("bitwright", "q4_1"), ("gguf", "q4_0"), ("gguf", "q8_0"),
]  # fmt: skip
native_only = pytest.mark.skipif(kernels.native is None, reason="the extension was not built")


def made(model: Path, folder: Path, format: str, scheme: str, **options: Any) -> Path:
    """The model in a file format, without calibration."""
    out = folder / ("q.gguf" if format == "gguf" else "q")
    pure = format == "gguf"
    quantize(model, out, format=format, scheme=scheme, method="search", calib="none", pure=pure, **options)
    return out


def logits_of(path: Path, ids: Tensor = IDS) -> Tensor:
    """By decoded weights, a block at a time."""
    streamed = StreamedModel(path)
    return streamed.skeleton.head(torch.cat(streamed.hidden(ids)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def run(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize(("format", "scheme"), MADE)
def test_logits_are_those_of_the_decoded_weights(format: str, scheme: str, llama: Path, tmp_path: Path) -> None:
    out = made(llama, tmp_path, format, scheme)
    model = load(out)
    assert distance(run(model), logits_of(out)) < 5e-3
    assert any(isinstance(m, QLinear) for m in model.modules())
    assert not any(p.dtype == torch.float32 and p.ndim == 2 for p in model.parameters())  # nothing was decoded


@pytest.mark.parametrize("kind", [*READ_ONLY, "IQ1_M", "IQ2_XXS", "IQ3_S"])
def test_others_blocks_are_multiplied_too(kind: str, tmp_path: Path) -> None:
    """Lattices of 2 and 3 bits, NVFP4: logits of the decoded weights, and a matrix no larger than its codes."""
    source = make_checkpoint(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    convert(source, tmp_path / "float.gguf")
    file = in_blocks(tmp_path / "float.gguf", tmp_path / "q.gguf", kind)
    model = load(file)
    assert distance(run(model), logits_of(file)) < 5e-3
    up = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(up, QLinear) and 8 * up.packed.nbytes / (512 * 256) < 5.2
    said = CliRunner().invoke(app, ["generate", str(file), "--prompt", "a fox", "--max-tokens", "4", "--json"])
    assert said.exit_code == 0, said.output
    assert isinstance(decoder_of(model, 32), NativeDecoder) == (kernels.native is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", family)
    out = made(model, tmp_path, "bitwright", "int8-g32")
    assert distance(run(load(out)), logits_of(out)) < 5e-3
    assert distance(run(load(model)), logits_of(model)) < 1e-4
    assert distance(run(load(model, scheme="int8-g32")), logits_of(model)) < 5e-2


STATIC = Scales(torch.tensor([[0.02]]), torch.tensor([[3.0]]))
INTAKES = [
    InputQuantization(), InputQuantization(Scheme.parse("int8-token")), InputQuantization(Scheme.parse("fp8-token")),
    InputQuantization(Scheme.parse("int8-tensor-asym"), STATIC),
    InputQuantization(rotate=32), InputQuantization(Scheme.parse("int8-token"), rotate=64),
    InputQuantization(Scheme.parse("int8-token"), outliers=torch.tensor([3, 50])),
    InputQuantization(Scheme.parse("int8-token"), threshold=2.5), InputQuantization(Scheme.parse("mxfp4")),
    InputQuantization(Scheme.parse("nvfp4"), outer=torch.tensor([[90.0]])),
]  # fmt: skip


@pytest.mark.parametrize("input_quantization", INTAKES)
def test_inputs_are_treated_as_the_file_says(input_quantization: InputQuantization) -> None:
    """Rotated, rounded, spared: as the evaluation does it in float."""
    x = torch.randn(40, 64)
    q = rtn(torch.randn(48, 64), None, Scheme.parse("int8-g32")).q
    if input_quantization.outliers is not None:
        q = replace(q, outliers=Outliers(input_quantization.outliers, torch.randn(48, 2)))
    layer = QLinear(q, input_quantization=replace(input_quantization, outliers=None))
    exact = input_quantization(x) @ decode(q).T
    assert distance(layer(x), exact) < 1e-3
    if input_quantization.scheme is not None:
        assert distance(layer(x), x @ decode(q).T) > 3e-3  # which is not what is computed


def test_a_scheme_reaches_experts_too(tmp_path: Path) -> None:
    """gpt-oss's, which its files fuse: load keeps what quantize promises."""
    more = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    more |= {"head_dim": 16, "layer_types": ["full_attention"]}
    config = AutoConfig.for_model("gpt_oss", **(SIZES | more))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path, scheme="int8-g32")
    assert not any(p.ndim >= 2 and p.numel() > 2 * 64 for name, p in model.named_parameters() if ".layers." in name)
    assert sum(isinstance(m, QLinear) for name, m in model.named_modules() if ".experts." in name) == 2 * 3


def test_outliers_at_run_time(llama: Path, text: str, tmp_path: Path) -> None:
    file, out = tmp_path / "r.toml", tmp_path / "q"
    rule = 'match = "*"\nscheme = "int4-g32"\nmethod = "rtn"\ntransforms = [{ name = "outlier", fraction = 0.05 }]'
    file.write_text(f"[[rule]]\n{rule}\n")
    quantize(llama, out, format="bitwright", recipe=file, calib=text, samples=4, seqlen=32)
    model = load(out)
    assert any(getattr(m, "outlier_columns", None) is not None for m in model.modules())
    assert distance(run(model), logits_of(out)) < 5e-3


@native_only
@pytest.mark.parametrize("family", LIKE_LLAMA)
@pytest.mark.parametrize("at_once", [512, 5])
def test_native_steps_are_the_modules_own(
    family: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.inference.native_decoder.TOKENS_AT_ONCE", at_once)
    window = {"sliding_window": 5} if family == "mistral" else {}
    model = load(make_checkpoint(tmp_path / "m", family, **window), scheme="int4-g32")
    fast, slow = decoder_of(model, 32), ModuleDecoder(model)
    assert isinstance(fast, NativeDecoder)
    for prompt in (IDS[0], IDS[0, :1]):  # a second prefill forgets the first
        assert distance(fast.prefill(prompt), slow.prefill(prompt)) < 2e-3
        for token in (7, 250, 7, 0, 31, 32, 99):
            assert distance(fast.step(token), slow.step(token)) < 2e-3


@pytest.mark.parametrize(("heads", "key_heads", "D"), [(4, 2, 64), (4, 1, 128), (2, 2, 48)])
def test_attention_is_the_modules_own(isa: str, heads: int, key_heads: int, D: int, tmp_path: Path) -> None:
    """Over more positions than are taken together, and not a multiple of them."""
    shape = {
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": D,
        "max_position_embeddings": 128,
    }
    model = load(make_checkpoint(tmp_path / "m", **shape), scheme="int8-g32")
    fast, slow, prompt = decoder_of(model, 80), ModuleDecoder(model), torch.arange(71) * 3
    assert isinstance(fast, NativeDecoder)
    assert distance(fast.prefill(prompt), slow.prefill(prompt)) < 1e-3
    for token in range(9):
        assert distance(fast.step(token), slow.step(token)) < 1e-3


@native_only
def test_every_instruction_set_takes_the_same_steps(llama: Path) -> None:
    model, before, native = load(llama, scheme="int4-g32"), kernels.native.current(), kernels.native
    logits, caches = [], []
    for isa in ISAS:
        native.choose(isa)
        decoder = NativeDecoder(model, 60)
        held = decoder.store.rows[..., :40, :]
        held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(0)))
        decoder.lengths[0] = 40
        logits.append(torch.stack([decoder.step(token) for token in range(20)]))
        caches.append(decoder.store.rows)
    native.choose(before)
    assert all(torch.equal(each, logits[0]) for each in logits)
    assert all(torch.equal(each, caches[0]) for each in caches)


@native_only
def test_room_is_kept(llama: Path) -> None:
    decoder = NativeDecoder(load(llama, scheme="int4-g32"), 13)
    decoder.prefill(IDS[0])
    decoder.step(1)
    with pytest.raises(InputError, match="14 tokens in a context of 13"):
        decoder.step(1)
    with pytest.raises(InputError, match="15 tokens"):
        decoder.prefill(torch.zeros(15, dtype=torch.long))


@native_only
def test_other_families_run_through_their_modules(tmp_path: Path) -> None:
    assert isinstance(decoder_of(load(make_checkpoint(tmp_path / "m", "gemma2")), 32), ModuleDecoder)
    out = made(make_checkpoint(tmp_path / "l"), tmp_path, "compressed-tensors", "fp8-channel")
    assert isinstance(decoder_of(load(out), 32), ModuleDecoder)


def test_greedy_tokens_are_transformers_own(llama: Path) -> None:
    model = load(llama, scheme="int8-g32")
    ours = list(tokens(decoder_of(model, 64), IDS[0], most=12, stop=frozenset(), sampling=Sampling()))
    theirs = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, IDS.shape[1] :]
    assert ours == theirs.tolist()
    stopped = list(tokens(decoder_of(model, 64), IDS[0], most=12, stop=frozenset({ours[3]}), sampling=Sampling()))
    assert stopped == ours[: ours.index(ours[3])]


def test_drawing_follows_the_seed_and_the_mass() -> None:
    logits, generator = torch.tensor([0.0, 3.0, 1.0, 2.9]), torch.Generator().manual_seed(0)
    assert {Sampling(1.0, 0.3).pick(logits, generator) for _ in range(50)} == {1}
    assert {Sampling(1.0, 0.8).pick(logits, generator) for _ in range(200)} == {1, 3}
    assert {Sampling(5.0, 1.0).pick(logits, generator) for _ in range(300)} == {0, 1, 2, 3}
    again = [[Sampling(2.0).pick(logits, torch.Generator().manual_seed(s)) for s in range(40)] for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(InputError):
        Sampling(temperature=-1)
    with pytest.raises(InputError):
        Sampling(top_p=0)


def test_text_comes_in_whole_characters() -> None:
    text = "größe 字\nnext — line " + "字ö" * 60 + "e"
    alphabet = list(text.encode())

    def decode_bytes(part: list[int]) -> str:
        return bytes(part).decode(errors="replace")

    found = list(pieces(iter(alphabet), decode_bytes))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(pieces(iter([*alphabet[:-1], 0xE2]), decode_bytes)) == text[:-1] + "\ufffd"


def test_what_is_saved_is_what_was_loaded(llama: Path, tmp_path: Path) -> None:
    out = made(llama, tmp_path, "compressed-tensors", "int4-g32")
    model = load(out)
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items() if "layers" in name)
    model.save_pretrained(tmp_path / "again")
    assert distance(run(load(tmp_path / "again")), run(model)) == 0
    for other in (load(llama, scheme="int4-g32"), load(made(llama, tmp_path, "gguf", "q4_0"))):
        with pytest.raises(FormatError, match="no Hugging Face checkpoint"):
            other.save_pretrained(tmp_path / "never")
        assert any(name.endswith("q_proj.panels") or name.endswith("q_proj.weight") for name in other.state_dict())


def test_tying_weights_again_changes_nothing(llama: Path) -> None:
    """As lm-evaluation-harness does with any model."""
    model = load(llama, scheme="int4-g32")
    before = run(model)
    model.tie_weights()
    assert distance(run(model), before) == 0


def test_a_pipeline_takes_it(llama: Path) -> None:
    pipe = pipeline("text-generation", model=load(llama, scheme="int8-g32"), tokenizer=load_tokenizer(llama))
    assert pipe("The fox", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("The fox")


def test_files_of_others_in_transformers_layout(llama: Path) -> None:
    """The float path beside transformers' own loader."""
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert distance(run(load(llama)), run(theirs)) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_codes_come_back_out_of_files(format: str) -> None:
    """All schemes that a format holds: codes and scales that decode to what was meant."""
    count = 0
    for text in (
        "int4-g128", "int3-g64-asym", "int2-g32", "int8-channel", "int6-g16-min-bf16", "q4_k", "q5_k", "q6_k", "q2_k", "q3_k",
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs", "nf4-g64-dq", "mxfp4", "nvfp4", "ternary-g256",
        "binary-g32", "int8-g256-asym", "int4-tensor", "fp8-channel", "fp8-tensor",
    ):  # fmt: skip
        try:
            layer = FORMATS[format].adapt(Layer("m", 64, 512, Scheme.parse(text)), torch.bfloat16)
        except FormatError:
            continue
        w = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
        w[3] = 0
        q = rtn(w, None, layer.scheme).q
        tensors = FORMATS[format].encode(q, layer, torch.bfloat16)
        again = FORMATS[format].quantized(FORMATS[format].config([layer], []), "m", tensors)
        assert torch.equal(decode(again), decode(q)), text
        count += 1
    assert count >= {"awq": 2, "bitsandbytes": 1}.get(format, 6)


def holding(folder: Path, end: str) -> tuple[Path, dict[str, Tensor], str]:
    """A file that has a tensor whose name ends so, what is in the file, and that name."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(end):
                return file, tensors, name
    raise AssertionError(end)


def test_columns_in_an_order_of_their_own(llama: Path, tmp_path: Path) -> None:
    """As GPTQ's desc_act leaves them: in any group, as long as all groups are full."""
    out = made(llama, tmp_path, "gptq", "int4-g32-asym")
    file, tensors, _ = holding(out, "q_proj.g_idx")
    for i, name in enumerate(sorted(name for name in tensors if name.endswith("g_idx") and "k_proj" not in name)):
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(i))]
    save_file(tensors, file)
    model = load(out)
    assert distance(run(model), logits_of(out)) < 5e-3
    decoder, walked = decoder_of(model, 12), logits_of(out)
    assert kernels.native is None or isinstance(decoder, NativeDecoder)
    decoder.prefill(IDS[0, :-1])
    assert distance(decoder.step(int(IDS[0, -1])), walked[0, -1]) < 5e-3
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file)
    with pytest.raises(FormatError, match="not in groups of 32"):
        load(out)


def test_a_file_that_lacks_what_its_config_promises(llama: Path, tmp_path: Path) -> None:
    out = made(llama, tmp_path, "compressed-tensors", "int4-g32")
    file, tensors, name = holding(out, "q_proj.weight_scale")
    kept = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="promises tensor"):
        load(out)
    save_file(tensors | {name: kept[:-1].contiguous()}, file)
    with pytest.raises((CheckpointError, FormatError)):
        load(out)


def test_a_zero_point_that_is_missing_is_not_taken_for_none(llama: Path, tmp_path: Path) -> None:
    out = made(llama, tmp_path, "compressed-tensors", "int4-g32-asym")
    file, tensors, name = holding(out, "q_proj.weight_zero_point")
    tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"promises tensor .*weight_zero_point"):
        load(out)


def test_what_is_quantized_is_not_rounded_again(llama: Path, tmp_path: Path) -> None:
    made_already = made(llama, tmp_path, "compressed-tensors", "int4-g32"), made(llama, tmp_path, "gguf", "q4_0")
    for out in made_already:
        with pytest.raises(RecipeError, match="quantized already"):
            load(out, scheme="int4-g32")
    convert(llama, tmp_path / "f.gguf")
    load(tmp_path / "f.gguf", scheme="int4-g32")


def test_bad_wishes_are_refused(llama: Path, tmp_path: Path) -> None:
    out = made(llama, tmp_path, "compressed-tensors", "int4-g32")
    with pytest.raises(RecipeError, match="needs a text"):
        load(llama, scheme="int4-g32", method="gptq")
    with pytest.raises(RecipeError, match="weights have no tokens"):
        load(llama, scheme="int8-token")
    for model in (out, llama):
        with pytest.raises(KernelError, match="8 or 16"):
            load(model, activations=4)
    with pytest.raises(CheckpointError):
        load(tmp_path / "nowhere")


def test_a_number_alone_is_no_input(llama: Path) -> None:
    layer = next(m for m in load(llama, scheme="int4-g32").modules() if isinstance(m, QLinear))
    with pytest.raises(KernelError, match="for a matrix"):
        layer(torch.tensor(1.0))


def test_layers_take_any_leading_axes() -> None:
    layer = QLinear(rtn(torch.randn(48, 64), None, Scheme.parse("int8-g32")).q, torch.randn(48))
    x = torch.randn(2, 3, 64)
    assert torch.equal(layer(x).view(6, 48), layer(x.view(6, 64)))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    dense = Dense(torch.randn(48, 64).bfloat16(), torch.randn(48))
    assert distance(dense(x), torch.nn.functional.linear(x, dense.weight.float(), dense.bias)) < 1e-6
    assert distance(dense(x[0]), dense(x)[0]) < 1e-6
    lookup = Lookup(torch.arange(12).view(6, 2), lambda rows: rows * 2, torch.float32, width=2)
    assert lookup(torch.tensor([[5, 0], [5, 5]])).tolist() == [[[20, 22], [0, 2]], [[20, 22], [20, 22]]]


def test_compilers_see_one_operator() -> None:
    layer = QLinear(rtn(torch.randn(48, 64), None, Scheme.parse("int4-g32-asym")).q, torch.randn(48)).eval()
    x = torch.randn(5, 64)
    exported = torch.export.export(layer, (x,))
    assert "bitwright.product" in str(exported.graph)
    assert torch.equal(exported.module()(x), layer(x))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_generate_at_the_command_line(llama: Path) -> None:
    first = cli("generate", str(llama), "--prompt", "The", "--max-tokens", "5", "--json")
    assert first.exit_code == 0
    said = json.loads(first.stdout)
    counted = {"prompt_tokens": 3, "completion_tokens": 5, "finish_reason": "length"}
    assert said == {"prompt": "The", "text": said["text"], **counted}
    drawn = [
        cli("generate", str(llama), "--prompt", "The", "--max-tokens", "9", "--temperature", "2", "--seed", seed).stdout
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    spoken = cli("generate", str(llama), "--prompt", "The", "--chat", "--max-tokens", "5")
    assert spoken.exit_code == 0
    for bad in (["--temperature", "-1"], ["--prompt", "x" * 500], ["--scheme", "int99"], ["--activations", "7"]):
        assert cli("generate", str(llama), "--prompt", "The", *bad).exit_code == 2


def test_text_says_how_much_of_it_there_is_and_why_it_ends() -> None:
    for most, reason in ((3, "stop"), (2, "length")):
        text = Written(iter([72, 105]), lambda ids: bytes(ids).decode(), prompt_tokens=7, most=most)
        assert next(text) == "H" and text.completion_tokens == 1 and text.finish_reason is None
        assert list(text) == ["i"] and text.completion_tokens == 2 and text.finish_reason == reason


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_named(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "small", "llama", vocab_size=40)
    done = cli("generate", str(model), "--prompt", "zebra", "--max-tokens", "5", "--json")
    assert done.exit_code == 2 and "vocabulary ends at 39" in json.loads(done.stdout)["error"]


def test_an_interrupted_answer_ends_the_process(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", eos_token_id=None, max_position_embeddings=100_000)
    options = [
        "--prompt",
        "The",
        "--max-tokens",
        "99000",
        "--room",
        "100000",
        "--temperature",
        "1",
        "--scheme",
        "int4-g32",
    ]
    command = [sys.executable, "-m", "bitwright", "generate", str(model), *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may be deaf to it
    with subprocess.Popen(command, **pipes, preexec_fn=heard) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it has begun
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)  # threads that stayed would keep it
    assert process.returncode == 0
    assert "interrupted" in said


def test_chat_remembers_and_ends(llama: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(llama), "--max-tokens", "3"], input="hello\nagain\n\n")
    assert done.exit_code == 0


def test_a_chat_goes_on_when_its_context_is_full(llama: Path) -> None:
    told = ["chat", str(llama), "--system", "Be brief.", "--max-tokens", "4", "--context", "60"]
    done = CliRunner().invoke(app, told, input="hello\n" * 9 + "\n")
    assert done.exit_code == 0 and "the oldest messages are forgotten" in done.output
    done = CliRunner().invoke(app, told, input="hello " * 99 + "\n\n")
    assert done.exit_code == 2 and "in a context of 60" in done.output


def test_bench_says_how_fast(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.inference.speed.PROBE_BYTES", 1 << 20)
    done = cli("bench", str(llama), "--prompt", "8", "--decode", "3", "--repeat", "1", "--json")
    found = json.loads(done.stdout)
    assert {"prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token", "peak_rss_bytes"} <= set(
        found
    )
    assert found["bandwidth_fraction"] > 0
    assert cli("bench", str(llama), "--prompt", "100").exit_code == 2


@pytest.mark.parametrize("to", ["float", "double", "half", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int4-g32-asym", "nf4-g64-dq", "q4_k", "int8-channel"])
def test_a_model_can_be_converted_and_its_weights_stay(llama: Path, scheme: str, to: str) -> None:
    model, ids = load(llama, scheme=scheme, dtype=torch.float32), torch.arange(12)[None]
    before = model(ids).logits
    parts = {name: b.clone() for name, b in model.named_buffers() if name.endswith((".scale", ".unit", ".minimum"))}
    after = getattr(model, to)()(ids).logits
    assert after.dtype == {"float": torch.float32, "double": torch.float64}.get(to, getattr(torch, to, None))
    assert distance(after.float(), before) < (0.02 if to == "bfloat16" else 2e-3)
    assert parts and all(torch.equal(b, parts[name]) for name, b in model.named_buffers() if name in parts)


def test_a_scheme_in_memory_is_that_of_rows_that_fill_no_block_too(llama: Path) -> None:
    """Blocks of 256 and rows of 64: nothing takes the scheme's place."""
    model = load(llama, scheme="q4_k")
    found = [(str(m.scheme), m.in_features) for m in model.modules() if isinstance(m, QLinear)]
    assert len(found) == 21 and {scheme for scheme, _ in found} == {"q4_k"} and any(K % 256 for _, K in found)
