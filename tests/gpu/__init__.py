"""Tests of the compiled kernels on CUDA tensors, against float64 on the same device.

They run under plain pytest with torch and numpy, and skip with a reason where there is no CUDA device or no library.
MMM_KERNEL_LIBRARY names the library; MMM_KERNEL_DEVICE=cpu runs what it can on the CPU reference of the same library.
"""
