"""A micro-batch's forward and backward pass, on GPUs replayed as a CUDA graph.

Launching the kernels of a layer takes the host some milliseconds, with few tokens longer than the GPU needs for them. A
graph has all of them, collectives included, launched at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tp_trainer.config import Unrecoverable

WARM_UP = 3  # steps before the capture, in which compilers, FSDP and NCCL set themselves up

Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class MicroStep:
    """Calls a pass over the model, or replays it once it has been captured.

    Args:
        run: (input_ids, labels, count) -> loss; adds to the gradients of `parameters`. Nothing in it waits for the device.
        parameters: all of the model's.
        replayed: whether to capture at all; then everything must run on one stream that is not the default one.
    """

    def __init__(self, run: Pass, parameters: Sequence[nn.Parameter], replayed: bool) -> None:
        self.run, self.parameters, self.replayed = run, parameters, replayed
        self.steps = 0
        self.inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # of a step's first micro-batch, of the others
        self.gradients: list[torch.Tensor | None] = []  # where the graphs write them

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor, first: bool) -> torch.Tensor:
        """
        Args:
            input_ids, labels: int64 [micro_batch, seq] on the device; the shape and the number of micro-batches never change.
            count: float32 scalar on the device, label tokens of the global batch.
            first: of the step's micro-batches; there are no gradients yet.

        Returns:
            The micro-batch's part of the mean loss, float32 scalar, valid until the next call.
        """
        self.steps += first
        if not self.replayed or self.steps <= WARM_UP:
            return self.run(input_ids, labels, count)
        if self.inputs is None:
            self.inputs = input_ids.clone(), labels.clone(), count.clone()
        for static, given in zip(self.inputs, (input_ids, labels, count), strict=True):
            static.copy_(given)
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
        pool = None if first else self.graphs[True][0].pool()  # never at the same time as the first one's
        # other threads (a checkpoint being written, NCCL's watchdog) go on with what a capture forbids
        try:
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                loss = self.run(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what the model, or this release of torch, does in a pass
            reason = str(error).strip().splitlines()[0]
            what = f"the micro-batch can't be captured as a CUDA graph ({reason}); give parallelism.cuda_graphs=false"
            raise Unrecoverable(what) from error
        self.graphs[first] = graph, loss
        if first:
            self.gradients = [parameter.grad for parameter in self.parameters]
