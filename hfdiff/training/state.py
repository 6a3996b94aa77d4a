"""The state of a run between two steps: weights, their moving average, the optimizer and what else it remembers."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checkpoints import Snapshot
from .config import TrainingSettings
from .power_average import KEPT, PowerAverage, average_name

# Whole tensors under the model's own names, however it is wrapped, compiled or sharded; on the main process alone.
ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)
EVERYWHERE = StateDictOptions(full_state_dict=True)


class Stateful(Protocol):
    """Something a checkpoint holds: its state is of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Takes a state up."""


def make_optimizer(settings: TrainingSettings, model: nn.Module) -> tuple[Optimizer, LRScheduler]:
    """AdamW (Loshchilov & Hutter 2019) and the course of its learning rate, counted in training steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.adam_weight_decay, fused=True
    )
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    return optimizer, schedule


class TrainingState:
    """A model in training and all that changes with it.

    Args:
        settings: of the run.
        accelerator: its device and processes.
        model: is trained in place; where accelerate shards it (FSDP), a copy is trained, and `model` stays whole and
            gets the weights when they are published.
        stateful: further objects to save.
    """

    def __init__(
        self, settings: TrainingSettings, accelerator: Accelerator, model: nn.Module, stateful: Sequence[Stateful] = ()
    ) -> None:
        self.accelerator = accelerator
        self.original = model.to(accelerator.device)
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        trained = copy.deepcopy(model) if self.sharded else model
        trained.train()
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(trained, *make_optimizer(settings, trained))
        self.decay = settings.ema_decay if settings.use_ema else None
        self.powers = KEPT if settings.average_snapshots else ()
        self._start_averages(0)
        self.stateful = [item for item in (self.lr_scheduler, accelerator.scaler, *stateful) if item is not None]

    def _start_averages(self, step: int) -> None:
        """The moving average to publish, if any, and further ones: all start from the present weights."""
        foreach = not self.sharded  # which torch has for whole tensors only
        parameters = list(self.model.parameters())
        self.average = None if self.decay is None else EMAModel(parameters, decay=self.decay, foreach=foreach)
        self.averages: dict[str, EMAModel] = {} if self.average is None else {"average": self.average}
        for sigma_rel in self.powers:
            self.averages[average_name(sigma_rel)] = PowerAverage(parameters, sigma_rel, foreach)
        for average in self.averages.values():
            average.optimization_step = step

    def advance(self) -> None:
        """What follows each update of the weights."""
        self.lr_scheduler.step()
        for average in self.averages.values():
            average.step(self.model.parameters())

    def snapshot(self) -> Snapshot:
        """The whole state, on the main process; all must ask for it."""
        weights = {"model": self._weights()}
        for name, average in self.averages.items():
            weights[name] = self._weights(average)
        optimizer = get_optimizer_state_dict(self.model, self._torch_optimizer, options=ON_MAIN)
        others = [item.state_dict() for item in self.stateful]
        return Snapshot(weights, {"optimizer": optimizer, "stateful": others})

    def restore(self, snapshot: Snapshot, step: int) -> None:
        """Takes up the state after `step` training steps, which every process has whole."""
        self._start_averages(step)
        for name, average in self.averages.items():
            self._load(snapshot.weights[name])
            average.shadow_params = [parameter.clone().detach() for parameter in self.model.parameters()]
        optimizer = snapshot.training["optimizer"]
        set_optimizer_state_dict(self.model, self._torch_optimizer, optimizer, options=EVERYWHERE)
        for group in self._torch_optimizer.param_groups:
            group["betas"] = tuple(group["betas"])  # of which the line above makes a list
        self._load(snapshot.weights["model"])
        for item, state in zip(self.stateful, snapshot.training["stateful"], strict=True):
            item.load_state_dict(state)

    def power_averages(self) -> dict[float, dict[str, Tensor]]:
        """The further averages by length, on the main process; all must ask for them."""
        return {sigma_rel: self._weights(self.averages[average_name(sigma_rel)]) for sigma_rel in self.powers}

    @contextmanager
    def published(self) -> Iterator[None]:
        """The model as it would be published now, in evaluation mode; afterwards it is in training again."""
        with self._swapped(self.average):
            self._show()
            self.original.eval()
            try:
                yield
            finally:
                self.original.train()

    def publish(self) -> None:
        """Leaves the model with the weights to publish, in evaluation mode and without accelerate's wrappers."""
        if self.average:
            self.average.copy_to(self.model.parameters())
        self._show()
        if not self.sharded:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.original.eval()

    @property
    def _torch_optimizer(self) -> Optimizer:
        return self.optimizer.optimizer  # of accelerate's wrapper

    def _weights(self, average: EMAModel | None = None) -> dict[str, Tensor]:
        """Of the model, or of an average."""
        with self._swapped(average):
            weights: dict[str, Any] = get_model_state_dict(self.model, options=ON_MAIN)
            return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}

    def _load(self, weights: dict[str, Any]) -> None:
        set_model_state_dict(self.model, weights, options=EVERYWHERE)

    @contextmanager
    def _swapped(self, average: EMAModel | None) -> Iterator[None]:
        """An average, if any, in the place of the weights."""
        if not average:
            yield
            return
        parameters = list(self.model.parameters())
        average.store(parameters)
        average.copy_to(parameters)
        try:
            yield
        finally:
            average.restore(parameters)

    def _show(self) -> None:
        if self.sharded:
            self.original.load_state_dict(get_model_state_dict(self.model, options=EVERYWHERE))
