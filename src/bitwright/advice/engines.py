"""Which engine runs what on which hardware: a table, with its sources and the day they were read, where they were."""

from dataclasses import dataclass

READ, UNREAD = "2026-11-29", "not checked"
VLLM = "https://docs.vllm.ai/en/latest/features/quantization/"
LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md"
TRANSFORMERS = "https://huggingface.co/docs/transformers/main/en/quantization/overview"
ONNX = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
MODELOPT = "https://nvidia.github.io/Model-Optimizer/guides/0_support_matrix.html"
CPUS = ("x86", "arm")
VOLTA, TURING, AMPERE, ADA, BLACKWELL = (7, 0), (7, 5), (8, 0), (8, 9), (10, 0)


@dataclass(frozen=True)
class Support:
    """One row: an engine runs files of a format, with weights in these schemes, on this hardware.

    format       as `quantize --format` has it; "" for files of language models that bitwright does not write
    schemes      beginnings of scheme names; activations: what the engine rounds inputs to
    cpus, least  which CPUs; CUDA's least compute capability, None for no GPU
    read         the day the row was checked against its source; UNREAD: it has not been
    """

    engine: str
    what: str
    format: str
    schemes: tuple[str, ...]
    cpus: tuple[str, ...]
    least: tuple[int, int] | None
    source: str
    activations: str = ""
    read: str = READ


TABLE = (
    Support("llama.cpp", "GGUF, 2 to 8 bits", "gguf", ("q", "iq"), CPUS, (5, 0), LLAMA_CPP, read=UNREAD),
    Support("vLLM", "FP8 weights and inputs", "compressed-tensors", ("fp8",), (), ADA, VLLM, "fp8-token"),
    Support("vLLM", "int8 weights and inputs", "compressed-tensors", ("int8",), CPUS, TURING, VLLM, "int8-token"),
    Support("vLLM", "4 and 8 bits, compressed-tensors", "compressed-tensors", ("int4", "int8"), (), TURING, VLLM),
    Support("vLLM", "4 and 8 bits, GPTQ", "gptq", ("int4", "int8"), ("x86",), VOLTA, VLLM),
    Support("vLLM", "4 bits, AWQ", "awq", ("int4-g128-asym",), ("x86",), TURING, VLLM),
    Support("vLLM", "NF4, bitsandbytes", "bitsandbytes", ("nf4",), (), VOLTA, VLLM),
    Support("transformers", "compressed-tensors", "compressed-tensors", ("int", "fp8"), CPUS, VOLTA, TRANSFORMERS, read=UNREAD),
    Support("transformers", "GPTQ, through GPTQModel", "gptq", ("int",), CPUS, VOLTA, TRANSFORMERS, read=UNREAD),
    Support("transformers", "NF4, bitsandbytes", "bitsandbytes", ("nf4",), CPUS, (6, 0), TRANSFORMERS, read=UNREAD),
    Support("bitwright", "GGUF, its own kernels", "gguf", ("q", "iq"), CPUS, None, ""),
    Support("bitwright", "every format, its own kernels", "bitwright", ("int", "nf4"), CPUS, None, ""),
    Support("ONNX Runtime", "4 bits (MatMulNBits), int8 (QDQ)", "", ("int4", "int8"), CPUS, VOLTA, ONNX, read=UNREAD),
    Support("TensorRT-LLM", "FP8", "", ("fp8",), (), ADA, MODELOPT),
    Support("TensorRT-LLM", "4 bits, AWQ and GPTQ", "", ("int4",), (), AMPERE, MODELOPT),
    Support("TensorRT-LLM", "NVFP4", "", ("nvfp4",), (), BLACKWELL, MODELOPT),
)  # fmt: skip
ENGINES = tuple(dict.fromkeys(row.engine for row in TABLE))


def runs(row: Support, cpu: str, capability: tuple[int, int] | None) -> bool:
    """Whether a row is of this hardware: of a GPU of that compute capability, or without one of a CPU ("x86", "arm")."""
    if capability is None:
        return cpu in row.cpus
    return row.least is not None and capability >= row.least
