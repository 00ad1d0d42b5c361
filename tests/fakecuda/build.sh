#!/usr/bin/env bash
# build.sh DIR VENV [TORCH]: makes DIR, a Python environment whose torch has CUDA and sees eight H100s that compute nothing, for fake tensors on a
# machine without a card. All packages but torch come from VENV, the project's own environment. TORCH is a version. About 3 GB and two minutes, once.
set -euo pipefail
dir=$(realpath -m "$1") project=$(realpath "$2") version=${3:-2.11.0} here=$(dirname "$(realpath "$0")")
if [ ! -e "$dir/env/installed" ]; then
  "$project/bin/python" -m venv "$dir/env"
  "$dir/env/bin/pip" install -q "torch==$version" numpy
  touch "$dir/env/installed"
fi
site=$(echo "$dir"/env/lib/python3*/site-packages)
echo "$(echo "$project"/lib/python3*/site-packages)" > "$site/zz_project.pth"          # after its own: torch is found here first
include=$(dirname "$(find "$site/nvidia" -name cuda_runtime_api.h | head -n 1)")
mkdir -p "$dir/crt/crt" "$dir/driver"
# Some wheels lack the headers of the compiler, of which the runtime's header needs a few words.
if [ ! -e "$include/crt/host_defines.h" ]; then
  {
    for word in __host__ __device__ __global__ __device_builtin__ __device_builtin_texture_type__ __device_builtin_surface_type__ \
      __cudart_builtin__ CUDARTAPI CUDARTAPI_CDECL __CUDA_HOSTDEVICE__ CUDART_CB; do
      echo "#define $word"
    done
    echo '#define __builtin_align__(a) __attribute__((aligned(a)))'
    echo '#define __align__(a) __attribute__((aligned(a)))'
  } > "$dir/crt/crt/host_defines.h"
fi
# What torch wants of the runtime and runtime.c does not define succeeds and does nothing.
nm -D --undefined-only "$site"/torch/lib/libtorch_cuda*.so "$site"/torch/lib/libc10_cuda.so | grep -oE '\bcuda[A-Z][A-Za-z0-9_]*' | sort -u > "$dir/want"
gcc -w -fPIC -c -I"$include" -I"$dir/crt" "$here/runtime.c" -o "$dir/runtime.o"
nm --defined-only "$dir/runtime.o" | grep -oE '\bcuda[A-Z][A-Za-z0-9_]*' | sort -u > "$dir/have"
comm -23 "$dir/want" "$dir/have" | sed 's/.*/int &(){return 0;}/' > "$dir/rest.c"
gcc -w -shared -fPIC -o "$dir/libfakecuda.so" "$dir/runtime.o" "$dir/rest.c"
gcc -w -shared -fPIC -o "$dir/driver/libcuda.so.1" "$here/driver.c"
# Nothing is compiled for a device that is not there.
cat > "$dir/python" <<EOF
#!/bin/sh
exec env TORCH_COMPILE_DISABLE=1 LD_LIBRARY_PATH=$dir/driver LD_PRELOAD=$dir/libfakecuda.so $dir/env/bin/python "\$@"
EOF
chmod +x "$dir/python"
"$dir/python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(0), torch.cuda.device_count())'
