"""Nouns: spaces, operators, risks, results, runs."""
