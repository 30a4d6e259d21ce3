"""Text in, batches out: GPT-2 tokens, token shards, and a loader whose whole state is one integer."""
