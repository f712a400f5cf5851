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
    *)
        echo "usage: $0 NAME    with NAME one of: llmcompressor, gptqmodel" >&2
        exit 2
        ;;
esac

env="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/envs/$1"
done_mark="$env/.installed" # what was asked for, written when everything is in
wanted="$torch ${packages[*]}${bare[*]:+ ${bare[*]}}"

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
echo "$wanted" >"$done_mark"
echo "$env: done"
