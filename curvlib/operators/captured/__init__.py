"""Products of batches as captured graphs."""
