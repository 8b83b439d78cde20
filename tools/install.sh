#!/bin/sh
# Makes the virtual environment. Usage: tools/install.sh PYTHON VENV
set -eu
python=$1
venv=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lusifer needs Python 3.11 or newer; call make with PYTHON=/path/to/python" >&2
    exit 2
}
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
fi
"$venv/bin/python" -m pip install --quiet 'pip>=25,<27'

# Without an NVIDIA GPU the CPU build saves gigabytes. uv knows where it is; elsewhere (macOS, Arm,
# a closed network) the ordinary build is taken, which is a CPU build there anyway or works on a CPU.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ] && ! command -v nvidia-smi >/dev/null; then
        "$venv/bin/python" -m pip install --quiet 'uv>=0.7,<1'
        UV_HTTP_TIMEOUT=30 "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
            --torch-backend cpu 'torch==2.13.0' ||
            echo "no separate CPU build of torch to be had; taking the ordinary one"
    fi
    "$venv/bin/python" -m pip install 'torch==2.13.0'
fi
"$venv/bin/python" -m pip install -e '.[all,dev]'
