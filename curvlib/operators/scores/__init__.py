"""Gradients of examples, and their products with directions."""
