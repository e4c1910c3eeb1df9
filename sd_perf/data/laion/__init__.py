"""From LAION-400M's metadata to moments, as the benchmark's training set was made.

`metadata` keeps the rows that name a licence, `download` has img2dataset fetch their pictures into
raw shards, and `convert` encodes these, shard by shard.
"""
