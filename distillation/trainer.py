"""The loop of a stage: passes, the optimizer's step, the log, snapshots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from mmm_export.distillation.batch import Batch
from mmm_export.distillation.network import Network
from mmm_export.distillation.optimizer import adamw, scale_gradients, set_rate
from mmm_export.distillation.order import SampleOrder
from mmm_export.distillation.parallel import SINGLE, Processes
from mmm_export.distillation.stage import OBJECTIVES, StageName, StageOptions, learning_rate, trained_parameters
from mmm_export.errors import MmmError, OptionError

Record = dict[str, float | int | str]


class TrainingError(MmmError):
    """Training cannot go on."""


class Data(Protocol):
    """Samples by index, in batches."""

    def __len__(self) -> int: ...

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Give a batch for each list of indices, in order."""
        ...


@dataclass(frozen=True)
class LoopOptions:
    """How a loop runs; none of it changes what is computed.

    Attributes:
        seed: of the order of samples.
        log_steps: steps between two looks at the loss; each look waits for the device.
        snapshot_steps: steps between two snapshots, 0 for none but the last.
        compile: whether torch.compile compiles the layers.
        cuda_graph: whether pass and update are recorded once and replayed: for small models, whose kernels are shorter than
            their launch. All batches must have one shape, on one GPU.
    """

    seed: int = 0
    log_steps: int = 10
    snapshot_steps: int = 0
    compile: bool = False
    cuda_graph: bool = False


class StageTrainer:
    """One stage over one network.

    Args:
        network: on its device; which of its parameters train is updated.
        name: of the stage.
        stage: its options.
        data: what it reads.
        loop: how it runs.
        kept: layers that stay attention in stage 3.
        processes: that train together.

    Attributes:
        step: steps done.
        trained: names of the trained parameters.
    """

    def __init__(
        self,
        network: Network,
        name: StageName,
        stage: StageOptions,
        data: Data,
        loop: LoopOptions = LoopOptions(),
        *,
        kept: tuple[int, ...] = (),
        processes: Processes = SINGLE,
    ) -> None:
        if len(data) == 0:
            raise OptionError("the data is empty", found="0 samples", wanted="at least 1")
        self.network, self.name, self.stage, self.data, self.loop = network, name, stage, data, loop
        self.kept = kept
        self.processes = processes
        self.step = 0
        self.order = SampleOrder(len(data), loop.seed)
        self.trained = trained_parameters(network, name, stage, kept)
        named = dict(network.named_parameters())
        self._parameters = [named[n] for n in self.trained]
        self.device = self._parameters[0].device
        self.graph = loop.cuda_graph and self.device.type == "cuda"
        if self.graph and processes.count > 1:
            raise OptionError("CUDA graphs and several processes do not go together", hint="turn cuda_graph off")
        self.optimizer = adamw(zip(self.trained, self._parameters, strict=True), stage, graph=self.graph)
        if loop.compile:
            for layer in network.layers:  # one by one: all layers of a kind then share one compiled function
                layer.compile(dynamic=False if self.graph else None)
        # A sum that is divided when its count is known; this keeps it near 1 meanwhile.
        self._nominal = 1.0 / stage.batch_samples
        self._losses: Tensor | None = None
        self._count = torch.zeros((), device=self.device)
        self._norm = torch.zeros((), device=self.device)
        self._recorded: _Recorded | None = None

    def run(
        self,
        *,
        on_record: Callable[[Record], None] = lambda record: None,
        on_snapshot: Callable[[StageTrainer], None] = lambda trainer: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train from `step` to the stage's last step.

        Args:
            on_record: told the figures of each step, in order, `log_steps` at a time.
            on_snapshot: called when the state should be stored; all losses so far are finite then.
            stop: asked after each step; true ends the loop after a snapshot.

        Raises:
            TrainingError: the loss or the gradient is not finite. `step` is then the step whose batch did it.
        """
        waiting: list[tuple[int, Tensor, Tensor]] = []
        begin, begin_step, tokens = time.perf_counter(), self.step, 0
        stage, world = self.stage, self.processes.count
        steps = range(self.step, stage.steps)
        plans = [stage.batch_samples, stage.samples_per_pass, self.processes.rank, world]
        plan = (one for step in steps for one in self.order.passes(step, *plans))
        batches = self.data.batches(plan)
        count = len(self.order.passes(0, *plans)) if stage.steps else 0
        for step in steps:
            for batch in islice(batches, count):
                self._pass(batch)
                tokens += batch.ids.numel()
            losses, norm = self._update(step)
            waiting.append((step, losses, norm))
            self.step = step + 1
            last = self.step == stage.steps
            ends = self.processes.any(stop(), self.device)
            due = bool(self.loop.snapshot_steps) and self.step % self.loop.snapshot_steps == 0
            if last or ends or due or self.step % self.loop.log_steps == 0:
                seconds = time.perf_counter() - begin
                rate = {"steps_per_s": (self.step - begin_step) / seconds, "tokens_per_s": tokens * world / seconds}
                self._report(waiting, on_record, rate)
                begin, begin_step, tokens, waiting = time.perf_counter(), self.step, 0, []
            if last or ends or due:
                on_snapshot(self)
            if ends:
                return

    def _pass(self, batch: Batch) -> None:
        """Add the gradient of one batch."""
        if self.graph:
            if self._recorded is None:
                self._recorded = _Recorded(self, batch)
            self._recorded.replay_pass(batch)
        else:
            self._accumulate(batch.to(self.device))

    def _accumulate(self, batch: Batch) -> None:
        losses = self.network(batch, OBJECTIVES[self.name], self.stage.positions)
        torch.autograd.backward(losses.sum() * (self._nominal * self.processes.count))
        found = losses.detach().float()
        if self._losses is None:
            self._losses = torch.zeros_like(found)
        self._losses += found
        self._count += self._counted(batch)

    def _counted(self, batch: Batch) -> Tensor | int:
        if self.stage.reduction == "samples":
            return batch.samples
        if OBJECTIVES[self.name] == "answers" or (self.name == "stage-3" and self.stage.positions == "answers"):
            return (batch.targets >= 0).sum()
        return batch.valid.sum()

    def _update(self, step: int) -> tuple[Tensor, Tensor]:
        """Divide and clip the gradient, step, and give the losses (by layer where layers imitate) and the gradient's norm."""
        set_rate(self.optimizer, learning_rate(self.stage, step))
        if self._recorded is not None:
            self._recorded.replay_update()
        else:
            self._finish()
        assert self._losses is not None
        losses = self._losses / self._count.clamp(min=1) * self.stage.loss_scale
        norm = self._norm.clone()
        self._losses.zero_()
        self._count.zero_()
        return losses, norm

    def _finish(self) -> None:
        assert self._losses is not None
        self.processes.add_up(self._losses, self._count)
        parts = self._losses.numel()  # the mean over layers; 1 where the loss is one number
        factor = self.stage.loss_scale / (self._nominal * parts) / self._count.clamp(min=1)
        self._norm.copy_(scale_gradients(self._parameters, factor, self.stage.clip_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graph)

    def _report(
        self, waiting: list[tuple[int, Tensor, Tensor]], on_record: Callable[[Record], None], rate: dict[str, float]
    ) -> None:
        """Read the figures of the steps since the last look, stop at the first that is not finite, tell the others."""
        if not waiting:
            return
        values = torch.stack([torch.cat([losses, norm[None]]) for _, losses, norm in waiting]).tolist()
        for (step, _, _), row in zip(waiting, values, strict=True):
            *losses, norm = row
            loss = sum(losses) / len(losses)
            if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
                self.step = step
                raise TrainingError(
                    f"the loss of step {step + 1} of {self.name} is not finite",
                    found=f"loss {loss}, norm of the gradient {norm}",
                    wanted="numbers",
                    hint="lower learning_rate or clip_norm, or look at the batch that was saved",
                )
            record: Record = {"stage": self.name, "step": step + 1, "loss": loss, "gradient_norm": norm}
            record["learning_rate"] = learning_rate(self.stage, step)
            if len(losses) > 1:
                record |= {"worst_layer": losses.index(max(losses)), "worst_layer_loss": max(losses)}
            if step == waiting[-1][0]:
                record |= {name: round(value, 3) for name, value in rate.items()}
            on_record(record)

    def batches_of(self, step: int) -> list[Batch]:
        """Give this process's batches of a step again."""
        plan = self.order.passes(
            step,
            self.stage.batch_samples,
            self.stage.samples_per_pass,
            self.processes.rank,
            self.processes.count,
        )
        return list(self.data.batches(plan))


class _Recorded:
    """Pass and update of a trainer as CUDA graphs; a batch is copied to where they read."""

    def __init__(self, trainer: StageTrainer, batch: Batch) -> None:
        self._batch = batch.to(trainer.device)._map(torch.clone)
        parameters = trainer._parameters
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        kept = [p.detach().clone() for p in parameters]
        state = _optimizer_state(trainer.optimizer)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate and kernels compile in the first calls
                trainer._accumulate(self._batch)
                trainer._finish()
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                assert parameter.grad is not None
                parameter.grad.zero_()
        _restore_optimizer(trainer.optimizer, state)
        assert trainer._losses is not None
        trainer._losses.zero_()
        trainer._count.zero_()
        self._pass, self._update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._pass):
            trainer._accumulate(self._batch)
        with torch.cuda.graph(self._update, pool=self._pass.pool()):
            trainer._finish()

    def replay_pass(self, batch: Batch) -> None:
        new = batch.tensors()
        for name, place in self._batch.tensors().items():
            if new[name].shape != place.shape:
                raise OptionError(
                    "a CUDA graph needs batches of one shape",
                    found=f"{name} {list(new[name].shape)} after {list(place.shape)}",
                    hint="turn cuda_graph off, or make batch_samples a multiple of samples_per_pass",
                )
            place.copy_(new[name], non_blocking=True)
        self._pass.replay()

    def replay_update(self) -> None:
        self._update.replay()


def _optimizer_state(optimizer: torch.optim.AdamW) -> list[tuple[Any, dict[str, Tensor]]]:
    return [(p, {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)}) for p, s in optimizer.state.items()]


def _restore_optimizer(optimizer: torch.optim.AdamW, kept: list[tuple[Any, dict[str, Tensor]]]) -> None:
    """Update the optimizer's state in place to what it was, or to zeros where it had none: a graph keeps its addresses."""
    earlier = dict(kept)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if parameter in earlier:
                value.copy_(earlier[parameter][name])
            else:
                value.zero_()
