"""Curvature of a loss that a training loop has just computed."""
