"""Calls functions in several processes at once, which communicate through gloo, as in a run."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["fiddlehead.tasks", "omegaconf", "tests.training.conftest", "tokenizers", "torch.distributed.pipelining"]


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """What `function` returns on each of `count` ranks; it is a module's, and it and its arguments can be pickled."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, answers = [], []
    for rank in range(count):
        answer, theirs = context.Pipe(duplex=False)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        process = context.Process(
            target=_call, args=(theirs, {n: str(v) for n, v in variables.items()}, function, arguments, named)
        )
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(answer)
    results: list[Any] = []
    try:
        for rank, (process, answer) in enumerate(zip(processes, answers, strict=True)):
            assert answer.poll(120), f"rank {rank} of {count} did not end"
            try:
                failed, result = answer.recv()
            except EOFError:
                process.join()
                failed, result = True, f"it ended with exit code {process.exitcode}"
            if failed:  # the cause may be another's failure
                said = [f"rank {rank} of {count}: {result}"]
                for other in range(rank + 1, count):
                    with contextlib.suppress(EOFError):
                        said += [f"rank {other}: {answers[other].recv()[1]}"] if answers[other].poll(5) else []
                raise AssertionError("\n".join(said))
            results.append(result)
    finally:
        for process in processes:
            process.kill() if len(results) < count else None
            process.join()
    return results


def _call(
    answer: Connection, variables: dict[str, str], function: Callable, arguments: tuple, named: dict[str, Any]
) -> None:
    os.environ.update(variables)
    gc.freeze()  # or each collection of a training would copy what the ranks share
    import torch

    torch.set_num_threads(1)
    try:
        result = (False, function(*arguments, **named))
    except BaseException:
        result = (True, traceback.format_exc())
    answer.send(result)
    answer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
