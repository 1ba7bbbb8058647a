"""Derivatives through the minimum of a function, without unrolling what found it."""
