"""Weights on disk: the folder of a checkpoint, its tensors and their shards, import and export of other formats.

- shard: one rank's part of a parameter. A `Layout` knows the places of the shards; a `ParameterShard` is one.
- local slice: a block of a shard, with its place in the shard and in the whole tensor (`LocalSlice`).
- replica: one of several ranks' equal copies of the same rows.
- `ShardedTensor`, `StoredTensor`, `LazyTensor`: a tensor over ranks, one in a file, and one to be written to a file.
- `MappedTensor`: one of our parameters, with the tensors of a Hugging Face checkpoint that hold the same numbers.
- chunk: a part of a tensor's bytes, a few MB at most. A `FileChecksum` is the size and CRC-32 of a file.
"""
