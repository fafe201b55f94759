"""Runs an engine folder with TensorRT or TensorRT-RTX.

What needs no GPU is apart from what does: `binding_table`, `buffer_plan`, `profiles`, `requirements` and `embedding_rows` compute
with plain numbers; `cuda` and `library` are the only modules that touch CUDA's and TensorRT's Python interfaces.
"""
