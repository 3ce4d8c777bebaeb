"""Did a process end for want of GPU memory? Told by what it last wrote to stderr. Pure: text -> yes or no.

There is no other way to know from outside: the exit code is the language's ordinary 1 (or SIGABRT's), and the memory is
free again by the time anybody looks. A wrong yes costs little (the next attempt prefers a larger GPU), a wrong no costs
the attempts that are left, so each pattern is what a library itself prints, and says that it is a *device's* memory:
host memory has other words (``std::bad_alloc``, ``MemoryError``, ``on …/device:CPU:0``).

Sources: the words of pytorch/pytorch ``c10/cuda/CUDACachingAllocator.cpp`` as its issues 16417 and 59778 show them; the
CUDA driver's ``CUDA_ERROR_OUT_OF_MEMORY`` (2), the runtime's ``cudaErrorMemoryAllocation`` (2) and cuBLAS's
``CUBLAS_STATUS_ALLOC_FAILED`` in NVIDIA's references; XLA in jax-ml/jax issues 788 and 13428 and google-deepmind/
jax_privacy issue 10; TensorFlow's ``ResourceExhaustedError`` in tensorflow/tensorflow issue 45238 (there on a CPU).
"""

from __future__ import annotations

import re

# How much of the end of stderr is worth reading: XLA prints a report of its buffers, some 10 KB, behind the sentence.
TAIL_BYTES = 32 << 10

_PATTERNS = (
    r"CUDA out of memory",  # PyTorch, all versions
    r"(?:torch\.|torch\.cuda\.)OutOfMemoryError",  # PyTorch 1.13 and later
    r"HIP out of memory",  # PyTorch on AMD
    r"CUDA error: out of memory",  # PyTorch, when the driver itself refuses
    r"CUDA_ERROR_OUT_OF_MEMORY",  # the driver's name for it: TensorFlow, Numba, PyCUDA, XLA
    r"cudaErrorMemoryAllocation",  # the runtime's: Thrust, RAPIDS, CuPy
    r"cudaMalloc failed: out of memory",  # ggml, llama.cpp
    r"cupy\.cuda\.memory\.OutOfMemoryError",
    r"(?:CUBLAS|CUDNN|CUSOLVER|CUFFT)_(?:STATUS_)?ALLOC_FAILED",  # the libraries' own allocations
    r"(?i:RESOURCE[_ ]?EXHAUSTED): (?:Out of memory|Failed to allocate request)",  # XLA: JAX, TensorFlow
    r"OOM when allocating tensor[^\n]*device:GPU",  # TensorFlow's allocator, and not that of the host
)
_OUT_OF_MEMORY = re.compile("|".join(_PATTERNS))


def is_cuda_oom(text: str) -> bool:
    """Whether these last words of a process name a GPU that ran out of memory."""
    return _OUT_OF_MEMORY.search(text) is not None
