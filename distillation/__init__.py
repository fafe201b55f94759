"""Distillation of mmMamba from its all-attention teacher: seeding, three stages, and the data they read.

Begin reading at `pipeline.py`; `network.py` holds the maths of a pass, `trainer.py` the loop around it.
"""
