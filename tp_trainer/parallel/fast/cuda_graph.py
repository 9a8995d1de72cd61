"""A micro-batch's forward and backward pass, replayed as a CUDA graph.

Launching the kernels of a layer takes the host some milliseconds, with few tokens longer than the
GPU needs for them. A graph has all of them, collectives included, launched at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tp_trainer.batch import Batch
from tp_trainer.config import OutOfMemory, Unrecoverable

WARM_UP = 3  # steps before the capture, in which compilers, FSDP and NCCL set themselves up

Pass = Callable[[Batch, torch.Tensor], torch.Tensor]


class CudaGraphs:
    """Calls a pass over the model for the first steps, then captures it and replays it.

    Args:
        run: (batch, count) -> loss; adds to the gradients of `parameters`. Nothing in it waits for
            the device, and all of it runs on one stream that is not the default one.
        parameters: all of the model's that are trained.
    """

    def __init__(self, run: Pass, parameters: Sequence[nn.Parameter]) -> None:
        self.run, self.parameters = run, parameters
        self.steps = 0
        self.inputs: tuple[Batch, torch.Tensor] | None = None
        # of a step's first micro-batch, of the others
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.gradients: list[torch.Tensor | None] = []  # where the graphs write them

    def __call__(self, batch: Batch, count: torch.Tensor, first: bool) -> torch.Tensor:
        """
        Args:
            batch: on the device; its shape and the number of micro-batches never change.
            count: float32 scalar on the device, label tokens of the global batch.
            first: of the step's micro-batches; there are no gradients yet.

        Returns:
            The micro-batch's part of the mean loss, float32 scalar, valid until the next call.
        """
        self.steps += first
        if self.steps <= WARM_UP:
            return self.run(batch, count)
        if self.inputs is None:
            self.inputs = batch.clone(), count.clone()
        self.inputs[0].copy_(batch)
        self.inputs[1].copy_(count)
        if first not in self.graphs:
            self._capture(first)
        elif first:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        graph, loss = self.graphs[first]
        graph.replay()
        return loss

    def close(self) -> None:
        """Free the graphs. Before the process groups end: NCCL waits for them."""
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.gradients.clear()

    def _capture(self, first: bool) -> None:
        assert self.inputs is not None
        graph = torch.cuda.CUDAGraph()
        # never at the same time as the first one's
        pool = None if first else self.graphs[True][0].pool()
        # other threads (a checkpoint being written, NCCL's watchdog) go on with what a capture
        # forbids
        try:
            with torch.cuda.graph(
                graph,
                pool=pool,
                stream=torch.cuda.current_stream(),
                capture_error_mode="thread_local",
            ):
                loss = self.run(*self.inputs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error).strip().splitlines()[0]) from error
        except RuntimeError as error:  # what the model, or this release of torch, does in a pass
            reason = str(error).strip().splitlines()[0]
            what = (
                f"the micro-batch can't be captured as a CUDA graph ({reason}); give"
                " parallelism.cuda_graphs=false"
            )
            raise Unrecoverable(what) from error
        self.graphs[first] = graph, loss
        if first:
            self.gradients = [parameter.grad for parameter in self.parameters]
