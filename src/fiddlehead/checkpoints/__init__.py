"""Weights on disk: the folder of a checkpoint, its tensors and their shards, and other formats in and out.

- shard: what one rank has of a parameter. A `Layout` knows where the shards lie; a `ParameterShard` is one.
- local slice: a block of a shard, with its place in the shard and in the whole tensor (`LocalSlice`).
- replica: one of several ranks' equal copies of the same rows.
- `ShardedTensor`, `StoredTensor`, `LazyTensor`: a tensor over ranks, one in a file, and one to be written to a file.
- `MappedTensor`: one of our parameters, with the tensors of a Hugging Face checkpoint that hold the same numbers.
- chunk: some of the bytes of a tensor, a few MB at most. A `FileChecksum` is the size and CRC-32 of a file.
"""
