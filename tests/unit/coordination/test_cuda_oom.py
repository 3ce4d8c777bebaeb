"""What processes print when a GPU's memory is full, and what only looks like it."""

from __future__ import annotations

import pytest

from coordination.cuda_oom import is_cuda_oom

# Shortened, from the reports that the module names as its sources.
OUT_OF_MEMORY = {
    "torch 1": "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 5.80 GiB total capacity; …",
    "torch 2": "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.70 GiB. GPU 0 has a total …",
    "torch 2.5": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB.",
    "class alone": "raise torch.cuda.OutOfMemoryError()\ntorch.cuda.OutOfMemoryError",
    "torch, amd": "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB",
    "torch, driver": "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be …",
    "driver": "cuda_driver.cc:764] failed to alloc 2740606464 bytes; result: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "runtime": "thrust::system_error: parallel_for failed: cudaErrorMemoryAllocation: out of memory",
    "ggml": "ggml_cuda_host_malloc: cudaMalloc failed: out of memory",
    "cupy": "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8,589,934,592 bytes",
    "cublas": "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "jax": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes.",
    "jax, old": "Execution of replica 0 failed: Resource exhausted: Out of memory while trying to allocate 5 bytes",
    "jax, pool": "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
    "tensorflow": "OOM when allocating tensor with shape[32,64] on /job:localhost/task:0/device:GPU:0 by GPU_0_bfc",
}
SOMETHING_ELSE = {
    "nothing": "",
    "host memory": "MemoryError: Unable to allocate 74.5 GiB for an array",
    "c++": "terminate called after throwing an instance of 'std::bad_alloc'",
    "tensorflow on the host": "OOM when allocating tensor with shape[1,512] on /device:CPU:0 by allocator cpu",
    "grpc": "grpc._channel: StatusCode.RESOURCE_EXHAUSTED: Received message larger than max",
    "kernel": "Out of memory: Killed process 4711 (python)",
    "another cuda error": "RuntimeError: CUDA error: device-side assert triggered",
    "a flag's name": "expandable_segments avoids running out of memory on CUDA",
}


@pytest.mark.parametrize("text", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_words_of_a_full_gpu_are_recognised(text: str) -> None:
    assert is_cuda_oom(f"step 1\n{text}\nlater words")


@pytest.mark.parametrize("text", SOMETHING_ELSE.values(), ids=SOMETHING_ELSE)
def test_other_failures_are_not_taken_for_it(text: str) -> None:
    assert not is_cuda_oom(text)
