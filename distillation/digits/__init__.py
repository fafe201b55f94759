"""The demo task: handwritten digits on coloured patches over photographs, and questions about them in English.

Drawn by seed from what scikit-learn and scikit-image ship. Needs numpy alone once those arrays are at hand (`assets.py`).
"""
