"""Calibration: from a bundle and prompts to measured ranges, and from those to a quantized bundle."""
