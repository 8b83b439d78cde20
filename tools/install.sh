#!/bin/sh
# Makes the virtual environment from requirements.lock. Usage: tools/install.sh PYTHON VENV
set -eu
python=$1
venv=$2
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lusifer needs Python 3.11 or newer; call make with PYTHON=/path/to/python" >&2
    exit 2
}
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
fi
# Each package by version and hash, none built or resolved anew.
"$venv/bin/python" -m pip install --quiet --require-hashes --no-deps -r tools/uv.lock
install() { "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"; }
install --require-hashes --no-deps -r requirements.lock

# Without an NVIDIA GPU the CPU build saves gigabytes. uv knows where it is; elsewhere (macOS, Arm,
# a closed network) the ordinary build is taken, which is a CPU build there anyway or works on a CPU.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ] && ! command -v nvidia-smi >/dev/null; then
        UV_HTTP_TIMEOUT=30 install --quiet --torch-backend cpu -r tools/torch.txt ||
            echo "no separate CPU build of torch to be had; taking the ordinary one"
    fi
    "$venv/bin/python" -m pip install -r tools/torch.txt
fi
install --no-deps --no-build-isolation -e .
