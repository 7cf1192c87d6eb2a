#!/usr/bin/env bash
# Pins what goes into the images, with hashes: run it after a dependency changed in pyproject.toml.
# Needs uv. Where the index that uv knows has no CPU build of torch, name a folder or page that has one:
#   TORCH_CPU=/folder/with/the/wheel k8s/images/lock.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

lock() { # image, Python, then uv's own arguments
    local image=$1 python=$2
    shift 2
    uv pip compile pyproject.toml --quiet --generate-hashes --no-annotate --python-version "$python" \
        --python-platform x86_64-manylinux_2_28 --custom-compile-command k8s/images/lock.sh \
        --output-file "k8s/images/$image.lock" "$@"
}

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# The oldest pair that is tested on a GPU.
printf 'torch==2.11.0\ntriton==3.6.0\n' > "$constraints"
lock gpu 3.12 --extra server --constraint "$constraints"
printf 'torch==2.13.0+cpu\n' > "$constraints"
lock cpu 3.11 --extra server --constraint "$constraints" ${TORCH_CPU:+--find-links "$TORCH_CPU"}
lock client 3.12
