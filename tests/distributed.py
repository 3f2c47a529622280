"""Runs a function in several processes that are the ranks of a gloo group.

The processes are forked from a server that has imported everything once, so that starting them costs little.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "transformers.models.llama.modeling_llama", "longmem", "pytest"])


def start_ranks(
    world: int | None, function: Callable[..., Any], folder: Path, *arguments: Any
) -> list[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """Start `function(rank, *arguments)` in `world` processes, or in one without a group. The group meets over a file
    in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    ranks = []
    for rank in range(world or 1):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_run, args=(rank, world, str(meeting), sender, function, arguments), daemon=True
        )
        process.start()
        sender.close()
        ranks.append((process, receiver))
    return ranks


def run_ranks(
    world: int, function: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 100
) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank. An exception of any of them fails the test."""
    ranks = start_ranks(world, function, folder, *arguments)
    results = []
    try:
        for rank, (_, receiver) in enumerate(ranks):
            if not receiver.poll(seconds):
                raise AssertionError(f"rank {rank} did not answer within {seconds} s")
            try:
                error, result = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert error is None, f"rank {rank}:\n{error}"
            results.append(torch.load(io.BytesIO(result), weights_only=False))
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return results


def _run(
    rank: int,
    world: int | None,
    meeting: str,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if world is not None:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        result = io.BytesIO()
        torch.save(function(rank, *arguments), result)
        sender.send((None, result.getvalue()))
        if world is not None:
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        sender.send((traceback.format_exc(), None))
