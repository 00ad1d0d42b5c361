# The GPU environment: NVIDIA's PyTorch image brings CUDA, its own torch, Transformer Engine and apex.
# Not built yet; tests/test_versions.py runs its lines that call pip, with --dry-run, beside NVIDIA's versions.
#
#   docker build -t compactlm .
#   docker run --gpus all --ipc=host -v /data:/data compactlm model.source=/data/llama run.dir=/data/run dry_run=true
#   docker run --gpus all --ipc=host -v /data:/data --entrypoint torchrun compactlm --nproc-per-node=8 -m recipes.compress ...
#
# The tag can be pinned: --build-arg DIGEST=sha256:...  An image that has Megatron-Core (NeMo's) keeps that too:
# --build-arg IMAGE=nvcr.io/nvidia/nemo --build-arg TAG=...
ARG IMAGE=nvcr.io/nvidia/pytorch
ARG TAG=25.09-py3
ARG DIGEST=
FROM ${IMAGE}:${TAG}${DIGEST:+@${DIGEST}}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/compactlm-nemo

# The image sets PIP_CONSTRAINT to a list of every version it was made with, some older than what is needed here. This
# list replaces it: what is compiled against each other and must stay, and for the rest the versions that were tested.
COPY requirements/python3.12.txt tested.txt
RUN pip list --format=freeze \
    | grep -iE '^(torch|torchvision|triton|pytorch[-_]triton|numpy|apex|flash[-_]attn|transformer[-_]engine|megatron[-_]core)==' \
    > image.txt \
 && awk -F '==' '{ name = tolower($1); gsub("_", "-", name) } /==/ && !seen[name]++' image.txt tested.txt > constraints.txt
ENV PIP_CONSTRAINT=/workspace/compactlm-nemo/constraints.txt

# Dependencies first: this layer is made anew only when they change. Without sources the package itself is empty.
COPY setup.py pyproject.toml ./
RUN pip install --no-cache-dir .

COPY README.md ./
COPY compactlm_nemo compactlm_nemo
COPY recipes recipes
COPY conf conf
COPY slurm slurm
RUN pip install --no-cache-dir --no-deps --editable . \
 && python -c "import torch, transformer_engine, megatron.core, compactlm_nemo"

RUN useradd --no-log-init --create-home --uid 10001 compactlm \
 && install --directory --owner=compactlm runs
USER 10001

ENTRYPOINT ["python", "-m", "recipes.compress"]
CMD ["--help"]
