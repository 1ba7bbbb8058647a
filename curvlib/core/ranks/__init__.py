"""Processes that work together: their group, shards of data, and parameters that are sharded."""
