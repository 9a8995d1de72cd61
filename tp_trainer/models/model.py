"""A model on the mesh, as everything outside `models` and `parallel` sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tp_trainer.batch import Batch
from tp_trainer.config import Parallelism
from tp_trainer.messages import ModelBuilt
from tp_trainer.parallel import fast
from tp_trainer.parallel.fast import HOLDING, FastPaths
from tp_trainer.parallel.fast.compute_copies import ComputeCopies
from tp_trainer.parallel.fast.cuda_graph import CudaGraphs
from tp_trainer.parallel.gradients import sum_over_tp
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.shard import dtypes
from tp_trainer.parameters import ParameterGroups


def looks_at_positions(module: nn.Module) -> bool:
    """Whether it is a rotary embedding whose frequencies depend on the positions that it is given:
    of type dynamic or longrope, in any layer.
    """
    kinds = str(getattr(module, "rope_type", ""))
    return "dynamic" in kinds or "longrope" in kinds


def modules_in_turn(module: PreTrainedModel) -> list[nn.Module]:
    """Those that run one after the other, and share no parameter: the blocks, and the two tables
    where they aren't one.
    """
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    tables = [] if head.weight is embedding.weight else [embedding, head]
    return [*module.base_model.layers, *tables]


class ParallelModel:
    """A transformers model on the mesh."""

    def __init__(
        self,
        module: PreTrainedModel,
        summed_over_tp: Sequence[nn.Parameter],
        parallelism: Parallelism,
        mesh: Mesh,
        paths: FastPaths,
    ) -> None:
        """
        Args:
            module: gives the loss summed over this rank's label tokens, or its logits; its
                trainable parameters are float32 DTensors with weights.
            summed_over_tp: trainable parameters replicated over tp of whose gradient each rank has
                a part of a sum.
        """
        self.module, self.summed_over_tp, self.mesh = module, summed_over_tp, mesh
        self.fast_paths = paths
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        self.copies = None
        if not mesh.sharded:
            low = set[nn.Parameter]()
            if mesh.device.type == "cuda":
                low = set(self.parameters) - set(summed_over_tp)
            by_block = [] if paths.compute_copies.on else modules_in_turn(module)
            compute, _ = dtypes(parallelism, mesh.device)
            self.copies = ComputeCopies(module, compute, low, by_block)
        # their frequencies follow the longest document, which a graph would not
        self.looks_at_positions = any(map(looks_at_positions, module.modules()))
        self.graphs: CudaGraphs | None = None
        if paths.cuda_graphs.on:
            self.graphs = CudaGraphs(self._forward_backward, self.parameters)
        # called before each pass over the model; whether it is a training pass
        self.before_pass: Callable[[bool], object] = lambda training: None

    def forward_backward(self, batches: Sequence[Batch], count: torch.Tensor) -> torch.Tensor:
        """Forward and backward pass of a step's micro-batches.

        Args:
            batches: this rank's, of one shape.
            count: float32 scalar on the device, the label tokens of the global batch.

        Returns:
            This data rank's part of the mean loss, float32 scalar on the device. Afterwards each
            parameter's gradient is that of the mean loss of the global batch.
        """
        total = torch.zeros((), device=self.mesh.device)
        if self.copies is not None:
            self.copies.refresh()
            self.copies.adding = len(batches) > 1
        for index, batch in enumerate(batches):
            self.before_pass(True)
            given = batch.to(self.mesh.device)
            looks = self.looks_at_positions and batch.document_ids is not None
            if self.graphs is None or looks:
                total += self._forward_backward(given, count)
            else:
                total += self.graphs(given, count, first=index == 0)
        sum_over_tp(self.summed_over_tp, self.mesh)
        return total

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss summed over a micro-batch's label tokens, float32 scalar; without dropout."""
        with self._evaluating():
            return self.module(*batch.to(self.mesh.device).tensors)

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """What the model gives each token of the vocabulary at each position: float32
        [rows, seq, vocab], whole and the same on every rank of the TP group; without dropout.
        """
        ids, _, *rest = batch.to(self.mesh.device).tensors
        with self._evaluating():
            return self.module(ids, None, *rest)

    def parameter_groups(self) -> ParameterGroups:
        return ParameterGroups.of(self.module)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, frozen ones too, under transformers' names; tied ones once."""
        return self.module.named_parameters()

    def changed(self, copies_too: bool = False) -> None:
        """To be called when parameters were written to.

        Args:
            copies_too: and their compute_copy, where they have one.
        """
        if self.copies is not None:
            self.copies.fresh = copies_too

    def close(self) -> None:
        """Give up what must be gone before the process groups are; nothing can be done with the
        model afterwards.
        """
        if self.graphs is not None:
            self.graphs.close()
        fast.close()

    @property
    def matmul_weights(self) -> int:
        """How many weights a token is multiplied with: those of all linears, the head's too."""
        linears = (each for each in self.module.modules() if isinstance(each, nn.Linear))
        return sum(each.weight.numel() for each in linears)

    @property
    def built(self) -> ModelBuilt:
        """What the driver is told of it."""
        paths = self.fast_paths
        return ModelBuilt(paths.entries(), any(map(paths.may_go, HOLDING)))

    @property
    def description(self) -> str:
        """What runs, for the user: the family, its size, and whether the head is the embedding."""
        head, embedding = self.module.get_output_embeddings(), self.module.get_input_embeddings()
        count = sum(parameter.numel() for parameter in self.module.parameters())
        tied = "tied" if head.weight is embedding.weight else "not tied"
        family = self.module.config.model_type
        return f"{family}, {count:,} parameters, head {tied} to the embedding"

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.before_pass(False)
        if self.copies is not None:
            self.copies.refresh()
        self.module.eval()
        try:
            with self._installed():
                yield
        finally:
            self.module.train()
        for module in self.module.modules():
            # what isn't freed after the forward pass waits for a backward pass
            if isinstance(module, FSDPModule):
                module.reshard()

    def _installed(self) -> AbstractContextManager[None]:
        return self.copies.installed() if self.copies is not None else nullcontext()

    def _forward_backward(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """A micro-batch's part of the mean loss. FSDP averages gradients over the data ranks, which
        is made up for here.
        """
        with self._installed():
            loss = self.module(*batch.tensors) / count
            (loss * self.mesh.data.size).backward()
        return loss.detach()
