#!/usr/bin/env bash
# Make the virtual environment of a peer that bitwright is compared with.
#
#     bench/peers/install.sh NAME
#
# The environment lands in bench/peers/envs/NAME (ignored by git). A finished environment is left as it is; an
# unfinished one is made anew. PYTHON names the interpreter to use (default: python3).
set -euo pipefail

torch="torch==2.13.0"

case "${1:-}" in
    llmcompressor) packages=("llmcompressor==0.14.0.1") ;;
    *)
        echo "usage: $0 NAME    with NAME one of: llmcompressor" >&2
        exit 2
        ;;
esac

env="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/envs/$1"
done_mark="$env/.installed" # what was asked for, written when everything is in
wanted="$torch ${packages[*]}"

if [[ -f "$done_mark" && "$(<"$done_mark")" == "$wanted" ]]; then
    echo "$env: already there"
    exit 0
fi

"${PYTHON:-python3}" -m venv --clear "$env"
"$env/bin/python" -m pip install "$torch"
# torch is named again so that no dependency can move it.
"$env/bin/python" -m pip install "$torch" "${packages[@]}"
echo "$wanted" >"$done_mark"
echo "$env: done"
