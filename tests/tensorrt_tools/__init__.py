"""TensorRT in tests without a GPU: the plugin library, the mini host, and NVIDIA's runtimes from the package index."""
