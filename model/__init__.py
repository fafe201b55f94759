"""mmMamba in plain PyTorch: reading checkpoints, writing them for tests, and the modules that run them.

Nothing is imported here: reading a checkpoint's dimensions must not load torch.
"""
