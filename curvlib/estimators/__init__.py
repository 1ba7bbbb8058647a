"""From an operator to a result."""
