"""Prompts, bundles and calibrations that tests of quantization share."""
