"""The cost of the papers' networks at full size, with random weights: a training step, or a guided sampling step.

    python benchmarks/full_size.py train training/recipes/cifar10-ddpm.yaml --batch 8 [--steps 2]
    python benchmarks/full_size.py sample training/recipes/imagenet64-adm.yaml \
        --classifier training/recipes/imagenet64-adm-classifier.yaml --batch 1 [--steps 2]

Runs on the accelerator where there is one. Prints one JSON line: parameters, seconds of the steps after a first one, by
the clock and of the processor, images a second, by the median of either, and the peak memory, of the device or else of
the process. On a busy machine the processor's seconds, with one thread, are the steadier. `--mixed_precision`,
or `--dtype` for sampling, and `--gradient_checkpointing` are as in a training. Each run should be a process of its own,
for its memory.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfdiff import ClassifierGuidedPipeline, NoisyClassifier
from hfdiff.data.labelled import LabelledImages
from hfdiff.training import train_classifier, train_ddpm, train_ncsn
from hfdiff.training.batches import Batch, BatchStream
from hfdiff.training.config import TrainingSettings, parse_settings
from hfdiff.training.loop import enable_gradient_checkpointing, make_accelerator, step_batches, update
from hfdiff.training.losses import classification_loss, ddpm_losses, score_matching_losses, weighted_mean
from hfdiff.training.settings import SETTINGS, ClassifierSettings, DDPMSettings, NCSNSettings
from hfdiff.training.state import TrainingState
from hfdiff.training.unet import UNet


class Moment(NamedTuple):
    """Seconds, of no fixed origin."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Moment":
        return cls(time.perf_counter(), time.process_time())


CLASSES, SIZE = 1000, 32  # of ImageNet; of CIFAR-10, whose recipes name no resolution


def read_recipe(recipe: Path) -> TrainingSettings:
    """The settings of a recipe, by what its name says it trains."""
    kind = "classifier" if "classifier" in recipe.name else "ncsn" if "ncsn" in recipe.name else "ddpm"
    settings = parse_settings(SETTINGS[kind], ["--config", str(recipe)])
    assert isinstance(settings, TrainingSettings)
    return settings


def noise_images(settings: TrainingSettings, count: int) -> LabelledImages:
    """Images of the recipe's size, and their classes."""
    size = settings.resolution or SIZE
    images = torch.randn(count, 3, size, size).clamp(-1, 1)
    return LabelledImages(images, torch.arange(count), [str(number) for number in range(CLASSES)])


def make(
    settings: TrainingSettings, data: LabelledImages
) -> tuple[nn.Module, Any, Callable[[nn.Module, Batch], Tensor]]:
    """The network, its scheduler and the loss of a batch, as the training has them."""
    if isinstance(settings, DDPMSettings):
        chain = train_ddpm.make_scheduler(settings)
        options = {name: getattr(settings, name) for name in ("loss_type", "snr_gamma", "vlb_weight")}
        told = settings.class_conditional

        def denoising(model: nn.Module, batch: Batch) -> Tensor:
            labels = batch.labels if told else None
            values = ddpm_losses(model, chain, batch.x0, batch.timestep, batch.noise, class_labels=labels, **options)
            return weighted_mean(values)

        return train_ddpm.make_unet(settings, data), chain, denoising
    if isinstance(settings, NCSNSettings):
        levels = train_ncsn.make_scheduler(settings, data)

        def matching(model: nn.Module, batch: Batch) -> Tensor:
            values = score_matching_losses(model, levels, batch.x0, batch.timestep, batch.noise)
            return values.mean() / batch.x0[0].numel()

        return train_ncsn.make_model(settings, levels, data), levels, matching
    assert isinstance(settings, ClassifierSettings)
    scheduler = train_classifier.choose_levels(settings, None)

    def classifying(model: nn.Module, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return classification_loss(model, scheduler, batch.x0, batch.timestep, batch.noise, batch.labels)

    return train_classifier.make_classifier(settings, data, None, scheduler), scheduler, classifying


def time_training(settings: TrainingSettings, steps: int) -> tuple[nn.Module, list[Moment]]:
    """The trained network, and the ends of its steps: forward, backward, AdamW and the average."""
    data = noise_images(settings, settings.train_batch_size)
    accelerator = make_accelerator(settings)
    model, scheduler, loss = make(settings, data)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    state = TrainingState(settings, accelerator, model)
    batches = BatchStream(data, settings.train_batch_size, len(scheduler), settings.seed)
    ends = []
    for step in range(1, steps + 2):
        own = step_batches(step, settings, accelerator, batches)
        update(accelerator, state.model, state.optimizer, loss, own, settings.max_grad_norm).item()
        state.advance()
        ends.append(Moment.now())
    return model, ends


def time_sampling(
    settings: TrainingSettings, guide: TrainingSettings, steps: int, dtype: torch.dtype
) -> tuple[nn.Module, list[Moment]]:
    """Both networks, and the ends of the guided steps: UNet, classifier's gradient, DDPM step."""
    data = noise_images(settings, settings.train_batch_size)
    unet, scheduler, _ = make(settings, data)
    classifier = make(guide, data)[0]
    assert isinstance(unet, UNet)
    assert isinstance(classifier, NoisyClassifier)
    pipe = ClassifierGuidedPipeline(unet.eval().to(dtype), classifier.eval().to(dtype), scheduler)
    pipe.to(torch.accelerator.current_accelerator() or "cpu")
    pipe.set_progress_bar_config(disable=True)
    ends: list[Moment] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["latents"].sum().item()  # waits for the device
        ends.append(Moment.now())
        return tensors

    labels = [0] * settings.train_batch_size
    pipe(labels, num_inference_steps=steps + 1, callback_on_step_end=note, output_type="pt")
    return nn.ModuleList([unet, classifier]), ends


def peak_bytes() -> int:
    """Of memory: the device's allocations, or on CPUs all that the process held."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "sample"))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--classifier", type=Path, help="its recipe, for sampling")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="after a first, which is not timed")
    parser.add_argument("--mixed_precision", default="auto", choices=("no", "bf16", "fp16", "auto"))
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    if (args.what == "sample") != (args.classifier is not None):
        parser.error("`--classifier` is for `sample`, which needs it.")
    change = {
        "train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "mixed_precision": args.mixed_precision,
        "gradient_checkpointing": args.gradient_checkpointing,
        "report_to": "none",
    }
    settings = replace(read_recipe(args.recipe), **change)
    if args.what == "train":
        model, ends = time_training(settings, args.steps)
    else:
        guide = replace(read_recipe(args.classifier), **change)
        model, ends = time_sampling(settings, guide, args.steps, getattr(torch, args.dtype))
    clock = [after.clock - before.clock for before, after in pairwise(ends)]
    processor = [after.processor - before.processor for before, after in pairwise(ends)]
    row = {
        "what": args.what,
        "recipe": args.recipe.stem,
        "batch": args.batch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": [round(second, 2) for second in clock],
        "processor_seconds": [round(second, 2) for second in processor],
        "images_per_second": round(args.batch / median(clock), 4),
        "images_per_processor_second": round(args.batch / median(processor), 4),
        "peak_gib": round(peak_bytes() / 2**30, 2),
        "device": str(torch.accelerator.current_accelerator() or "cpu"),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
