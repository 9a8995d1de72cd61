"""A few processes that stay: each runs one rank of whatever world a test asks for.

torch and transformers are imported once per process, and a case pays for a process group and its
own work only.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from stillness import Stillness, with_descendants

RANKS = 4
HANGS = (1.0, 60.0)  # CPU seconds of all ranks together in so many; gloo's waits take 0.3
LOOK_SECONDS = 0.5
GRACE_SECONDS = 10  # for the other ranks, once one has failed
# a segmentation fault in a thread of gloo's, which runs no Python: once in some fifteen runs of all
# tests with torch 2.13, in no case in particular (what stands between is the stack of that thread)
IN_GLOO = re.compile(
    r"died \(exit code -11\)\n((?!Fatal Python|.*omitting python).*\n)*?.*(gloo::|ProcessGroupGloo)"
)


class RankError(Exception):
    """A rank failed, died or hung: what it was doing."""


class RankPool:
    """Runs functions as the ranks of gloo worlds of up to `size`, in processes that are started
    once.
    """

    def __init__(self, size: int = RANKS, hangs: tuple[float, float] = HANGS) -> None:
        self.size, self.hangs = size, hangs
        self.directory = Path(tempfile.mkdtemp(prefix="rank-pool-"))
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.cases = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `function(*args)` on the first `world` ranks, with a fresh default process
        group of them.

        Args:
            function: of a module's top level; it and its arguments and results are pickled.

        Raises:
            RankError: with the traceback of the first rank that failed, or the stack of those that
                hang: all ranks stand still. The processes are then started anew.
        """
        try:
            return self._once(world, function, *args)
        except RankError as error:
            if not IN_GLOO.search(str(error)):
                raise
            warnings.warn(f"gloo crashed by itself, the case runs again: {error}", stacklevel=2)
            return self._once(world, function, *args)
        except BaseException:  # a test's time limit, say
            self.stop()  # the next case would read this one's answers
            raise

    def _once(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._start()
        self.cases += 1
        store = str(self.directory / f"store-{self.cases}")
        for pipe in self.pipes[:world]:
            pipe.send_bytes(pickle.dumps((world, store, function, args)))
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        still, deadline = self._stillness(), math.inf
        while len(results) + len(failed) < world:
            pending = [rank for rank in range(world) if rank not in results and rank not in failed]
            ready = wait([self.pipes[rank] for rank in pending], LOOK_SECONDS)
            for rank in pending:
                if self.pipes[rank] in ready:
                    try:
                        ok, value = pickle.loads(self.pipes[rank].recv_bytes())
                    except (EOFError, OSError):
                        ok, value = False, self._death(rank)
                    (results if ok else failed)[rank] = value
                    if not ok:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            # out of time: with a failed rank the others can't go on, without one they hang
            if not ready and (still() or time.monotonic() > deadline):
                hung = "".join(f"\n--- rank {rank} hangs\n{self._stack(rank)}" for rank in pending)
                self.stop()
                if not failed:
                    raise RankError(f"no answer, {still}{hung}")
                break
        if failed:
            if any("died" in value for value in failed.values()):
                self.stop()
            raise RankError(
                "".join(f"\n--- rank {rank}\n{text}" for rank, text in sorted(failed.items()))
            )
        return [results[rank] for rank in range(world)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        if self.processes:
            return
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, theirs, str(self.directory / f"stack-{rank}")),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        still = self._stillness()
        for rank, pipe in enumerate(self.pipes):
            while not pipe.poll(LOOK_SECONDS):
                if still():
                    self.stop()
                    raise RankError(f"rank {rank} did not start, {still}")
            pipe.recv_bytes()

    def _stillness(self) -> Stillness:
        pids = [process.pid for process in self.processes]
        return Stillness(lambda: with_descendants(pids), *self.hangs)

    def _death(self, rank: int) -> str:
        """How a rank's process ended, and where it was if a signal ended it."""
        self.processes[rank].join(GRACE_SECONDS)  # its pipe closes a little before it is gone
        python = (self.directory / f"stack-{rank}").read_text()
        native = (self.directory / f"native-{rank}").read_text()
        # of all threads' stacks, that of the thread which was hit
        hit = [each for each in native.split("\n\n") if "fatalSignalHandler" in each]
        code = self.processes[rank].exitcode
        return "\n".join([f"died (exit code {code})", *hit, python])

    def _stack(self, rank: int) -> str:
        """Where a rank is right now."""
        path = self.directory / f"stack-{rank}"
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return path.read_text()


def _serve(rank: int, pipe: Connection, stack_file: str) -> None:
    """A rank's life: take a case, make the group, run it, answer."""
    with Path(stack_file).open("w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        from tp_trainer.driver.ray_cluster import no_collections

        with no_collections():
            import torch
            import torch.distributed as dist
            import transformers

            import tp_trainer.loop
            import tp_trainer.models.build  # noqa: F401

        torch.set_num_threads(1)
        native = os.open(
            f"{Path(stack_file).parent}/native-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        os.dup2(native, 2)  # where torch writes the stacks of threads that run no Python
        torch._C._set_print_stack_traces_on_fatal_signal(True)
        # of gathering whole tensors: slow, it says
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        transformers.utils.logging.set_verbosity_error()
        pipe.send_bytes(b"ready")
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:
                return
            try:
                world, store, function, args = pickle.loads(message)
                dist.init_process_group(
                    "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world
                )
                answer = (True, function(*args))
                dist.barrier()  # nobody leaves while another still reads from it
            except BaseException:
                answer = (False, traceback.format_exc())
            # what a case leaves goes while its groups are there, and not amid another case
            gc.collect()
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_meshes()
            pipe.send_bytes(pickle.dumps(answer))


def _forget_meshes() -> None:
    """DTensor remembers what it worked out for a mesh, with the groups of the mesh that was equal
    to it in an earlier case; as long as it does, their threads go on.
    """
    from torch.distributed.tensor import DTensor, _collective_utils, _redistribute, debug

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    else:
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    if hasattr(_redistribute, "clear_redistribute_planner_cache"):
        _redistribute.clear_redistribute_planner_cache()
    for each in (
        _redistribute._gen_transform_infos,
        _collective_utils.MeshTopoInfo.build_from_mesh,
    ):
        each.cache_clear()
