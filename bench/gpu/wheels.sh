#!/usr/bin/env bash
# wheels.sh [FOLDER]: downloads to FOLDER (default .whl) what a machine without network lacks beside Python 3.12, torch and transformers: 24 MB.
# There: python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$HOME/site" .whl/*.whl; export PYTHONPATH="$HOME/site"
set -euo pipefail
folder=${1:-.whl}
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17; do platforms+=(--platform "${tag}_x86_64"); done
rm -rf "$folder"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 -d "$folder" \
  megatron-core==0.19.2 hydra-core==1.3.8 omegaconf==2.3.1 wandb==0.31.0 gguf==0.19.0 liger-kernel==0.8.5
python3 -m pip wheel -q --no-deps -w "$folder" antlr4-python3-runtime==4.9.3
du -ch "$folder"/*.whl
