#!/bin/sh
# Renews requirements.lock and tools/uv.lock: every package of `make test` by version and SHA-256, for Linux, macOS and
# Windows and each Python. Usage: tools/lock.sh [--upgrade]; without it, versions change only where they must.
# torch and what only its CUDA build brings stay out: each build has other hashes. tools/torch.txt has its version.
set -eu
cd "$(dirname "$0")/.."

compile() {
    "${UV:-.venv/bin/uv}" pip compile --quiet --no-config --universal --python-version 3.11 --no-annotate --no-header "$@"
}
everything() { compile --constraint tools/torch.txt --extra all --extra dev "$@" pyproject.toml; }

echo 'uv>=0.7,<1' | compile "$@" --generate-hashes --output-file tools/uv.lock - >/dev/null
out="--no-emit-package torch"
for name in $(everything | sed -n 's/^\(nvidia-[a-z0-9-]*\|cuda-[a-z0-9-]*\|triton\)==.*/\1/p'); do
    out="$out --no-emit-package $name"
done
# shellcheck disable=SC2086  # Words on purpose.
everything "$@" $out --generate-hashes --output-file requirements.lock >/dev/null
