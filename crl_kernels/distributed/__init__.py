"""Several processes and sharded parameters: sums over shards, whole models for a block, collective calls."""
