"""How often a model answers right: samples with one true answer, whatever runs the model, shares with their uncertainty."""
