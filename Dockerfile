# The GPU environment: NVIDIA's PyTorch image brings CUDA, its own torch, Transformer Engine and apex.
# Not built yet; tests/test_versions.py runs its lines that call pip, with --dry-run, beside NVIDIA's versions. The pins of the
# target nemo2 were resolved so on Python 3.12, and not installed there.
#
#   docker build -t compactlm .
#   docker run --gpus all --ipc=host -v /data:/data compactlm model.source=/data/llama run.dir=/data/run dry_run=true
#   docker run --gpus all --ipc=host -v /data:/data --entrypoint torchrun compactlm --nproc-per-node=8 -m recipes.compress ...
#
#   docker build --target nemo2 -t compactlm-nemo2 .     # with NeMo 2 beside it: export.format=nemo2 export.verify=/opt/nemo2/bin/python
#
# The tag can be pinned: --build-arg DIGEST=sha256:...  An image that has Megatron-Core (NeMo's) keeps that too:
# --build-arg IMAGE=nvcr.io/nvidia/nemo --build-arg TAG=...
ARG IMAGE=nvcr.io/nvidia/pytorch
ARG TAG=25.09-py3
ARG DIGEST=
FROM ${IMAGE}:${TAG}${DIGEST:+@${DIGEST}} AS base

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

# NeMo 2 in an environment of its own, as it needs other versions of transformers and Megatron-Core (docs/nemo.md).
FROM base AS nemo2
USER 0
COPY requirements/nemo2.txt nemo2.txt
RUN python -m venv /opt/nemo2 \
 && PIP_CONSTRAINT="" /opt/nemo2/bin/pip install --no-cache-dir --requirement nemo2.txt
USER 10001

# The last one is what `docker build` makes when no target is named.
FROM base AS compactlm
