"""Short texts that tell one model's weights from another's, for checkpoints that need the weights they began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from fiddlehead.checkpoints.safetensors_files import StoredTensor
from fiddlehead.errors import ConfigError, Problem

_WHOLE = 1 << 16
"""Tensors of at most so many bytes are read whole."""
_SAMPLES, _SAMPLE = 4, 1 << 12
"""How many parts of a larger tensor are read, spread evenly, and their bytes."""


def of_parts(*parts: object) -> str:
    """The fingerprint of JSON values, such as checksums."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def of_tensors(tensors: Iterable[tuple[str, StoredTensor]]) -> str:
    """The fingerprint of tensors in files that nobody vouches for: names, dtypes, shapes, and samples of the bytes.

    Neither where the files are nor how the tensors are divided among them matters. At most 64 KiB of a tensor are
    read, so that a model of 70B parameters takes seconds; a change of a few values of a large tensor may go unseen.

    Raises:
        ConfigError: a file cannot be read.
    """
    ordered = sorted(tensors, key=lambda item: (item[1].file, item[1].start))
    with ThreadPoolExecutor(max_workers=8) as readers:
        digests = list(readers.map(_digest, (tensor for _, tensor in ordered)))
    found = zip(ordered, digests, strict=True)
    return of_parts(sorted((name, tensor.dtype, tensor.shape, digest) for (name, tensor), digest in found))


def _digest(tensor: StoredTensor) -> str:
    ranges = [(0, tensor.nbytes)]
    if tensor.nbytes > _WHOLE:  # the first and the last bytes among them
        last = tensor.nbytes - _SAMPLE
        ranges = [(last * number // (_SAMPLES - 1), _SAMPLE) for number in range(_SAMPLES)]
    digest = hashlib.blake2b(digest_size=16)
    try:
        with tensor.file.open("rb", buffering=0) as file:
            for at, count in ranges:
                file.seek(tensor.start + at)
                digest.update(file.read(count))
    except OSError as error:
        raise ConfigError(Problem.in_file(tensor.file, f"cannot be read: {error.strerror or error}")) from error
    return digest.hexdigest()
