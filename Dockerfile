# The GPU environment: NVIDIA's PyTorch image brings CUDA, its own torch, Transformer Engine and apex.
# It has not been built yet.
# The default's torch is older than the 2.13 the tests run with; pass --build-arg TAG=... for a newer one.
ARG TAG=25.09-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

WORKDIR /workspace/compactlm-nemo

# The image's torch must stay: a torch from the package index does not match its Transformer Engine and apex. So
# the package and Megatron-Core go in without their dependencies, and the rest, none of which needs another torch,
# is resolved under a constraint that names the torch that is there.
COPY setup.py pyproject.toml README.md ./
COPY compactlm_nemo compactlm_nemo
COPY recipes recipes
COPY conf conf
COPY slurm slurm
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/keep.txt \
 && pip install --no-cache-dir --no-deps 'megatron-core>=0.16.1,<0.17' \
 && pip install --no-cache-dir --constraint /tmp/keep.txt \
      einops psutil packaging 'hydra-core>=1.3,<1.4' 'omegaconf>=2.3,<2.4' 'wandb>=0.31,<0.32' \
      'transformers>=5,<6' safetensors 'gguf>=0.17,<0.20' rich matplotlib scipy \
 && pip install --no-cache-dir --no-deps -e . \
 && python -c "import torch, transformer_engine, megatron.core, compactlm_nemo"

CMD ["bash"]
