"""The kernels of the selective scan, the libraries around them, and what compiles, loads and inspects those.

C++ and CUDA sources lie in the folders beside this file; docs/plugins.md is their guide.
"""
