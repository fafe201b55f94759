"""Distillation: from an attention teacher to linear and hybrid students, and a small task to show it on."""
