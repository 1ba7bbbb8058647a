"""From a risk to its operators."""
