"""CUDA C without a GPU: a kernel's source compiled for the CPU, called as CuPy calls it, and watched while it runs.

    cpu_kernel.py   CpuKernel(source, name)(grid, block, args): the call of cupy.RawKernel, on NumPy arrays
    cuda_cpu.h      the language: threads as fibres, barriers, shared memory, shuffles, atomics, half precision
    exercise.py     kernels of the library as exercises
"""
from .cpu_kernel import CpuKernel, KernelError

__all__ = ["CpuKernel", "KernelError"]
