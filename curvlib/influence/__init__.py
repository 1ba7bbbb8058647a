"""Influence functions: which training examples a prediction rests on."""
