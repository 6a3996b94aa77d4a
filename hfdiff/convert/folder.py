"""Pipeline folders of the originals' checkpoints: complete or not there, and compared with what they came from."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..data.files import new_folder
from ..models.noisy_classifier import NoisyClassifier
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_ncsn import NCSNPipeline
from ..schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..schedulers.scheduling_ddpm import DDPMScheduler
from .checkpoint import read_state_dict
from .guided_diffusion import load_adm_unet, load_classifier, load_unet
from .imagenet import IMAGENET_CLASSES
from .ncsn import load_model, read_config
from .schedule import beta_config, ddpm_config, langevin_config

TOLERANCE = 1e-5  # of a network's largest output
PROBE_SIZE = 64  # most pixels a side of the images that UNets, which take any size, are compared on

FilePath = str | PathLike[str]
Outputs = dict[str, Tensor]  # of each of a pipeline's networks


def convert_guided_diffusion(
    unet: FilePath,
    output: FilePath,
    flags: Mapping[str, Any],
    classifier: FilePath | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    class_names: Sequence[str] | None = None,
    verify: bool = False,
) -> list[str]:
    """Writes a pipeline's folder from checkpoints of guided-diffusion or improved-diffusion.

    With a classifier it is a [`ClassifierGuidedPipeline`], with the scale of the flags; without, a `DDPMPipeline` of
    diffusers, which takes a classifier later.

    Args:
        unet: the checkpoint.
        output: the folder, new or empty.
        flags: all of the original's, as [`~hfdiff.convert.flags.parse_flags`] gives them.
        classifier: its checkpoint.
        dtype: of the weights.
        class_names: in the order of the classifier's outputs; ImageNet's by default, where there are 1,000.
        verify: open the folder again, and compare its networks with the original's form of them.

    Returns:
        What was written, in lines.

    Raises:
        ValueError: for checkpoints that cannot be read or do not fit the flags; nothing is written then.
    """
    config = ddpm_config(flags)
    guide = None if classifier is None else _cast(_open_classifier(classifier, flags, class_names), dtype)
    state = read_state_dict(unet, "--unet")
    pipe = _pipeline(_cast(load_unet(state, flags), dtype), guide, config, flags["classifier_scale"])
    lines = [_describe(name, module) for name, module in pipe.components.items() if isinstance(module, nn.Module)]
    with new_folder(Path(output)) as folder:
        pipe.save_pretrained(folder)
        if verify:
            before = {"unet": _outputs(_cast(load_adm_unet(state, flags), dtype))}
            if guide is not None:
                before["classifier"] = _outputs(guide)
            kind = type(pipe)
            del state, pipe, guide  # before the folder's own are opened
            lines += _compare(before, kind.from_pretrained(folder, dtype=torch.float32))
    return lines


def convert_ncsn(
    checkpoint: FilePath,
    config: FilePath,
    output: FilePath,
    version: int,
    *,
    ema: bool = True,
    verify: bool = False,
) -> list[str]:
    """Writes an [`NCSNPipeline`]'s folder from a checkpoint of NCSN (version 1) or NCSNv2 (2) and its configuration.

    Args:
        checkpoint: a state dict, or the list that the original's training saves.
        config: the YAML file.
        output: the folder, new or empty.
        version: 1 or 2.
        ema: take the moving average of the weights, where the checkpoint could hold one.
        verify: open the folder again, and compare its network with the one that was converted.

    Returns:
        What was written, in lines.

    Raises:
        ValueError: for files that cannot be read or do not fit each other; nothing is written then.
    """
    scheduler = AnnealedLangevinScheduler(**langevin_config(read_config(config), version))
    model = load_model(checkpoint, config, version, ema)
    lines = [_describe("unet", model)]
    with new_folder(Path(output)) as folder:
        NCSNPipeline(model, scheduler).save_pretrained(folder)
        if verify:
            lines += _compare({"unet": _outputs(model)}, NCSNPipeline.from_pretrained(folder))
    return lines


def _open_classifier(path: FilePath, flags: Mapping[str, Any], class_names: Sequence[str] | None) -> NoisyClassifier:
    """The classifier with its classes' names and its noise."""
    model = load_classifier(read_state_dict(path, "--classifier"), flags)
    count = model.config.num_classes
    if class_names is None and count == len(IMAGENET_CLASSES):
        class_names = IMAGENET_CLASSES
    if class_names is not None and len(class_names) != count:
        raise ValueError(f"`class_names` must have {count} names, one for each class, got {len(class_names)}.")
    names = None if class_names is None else dict(enumerate(class_names))
    model.register_to_config(id2label=names, noise_schedule=beta_config(flags))
    return model


def _pipeline(unet: nn.Module, classifier: nn.Module | None, config: dict[str, Any], scale: float) -> Any:
    """The pipeline to save; without a classifier one of diffusers alone, as far as the UNet is."""
    if classifier is not None:
        return ClassifierGuidedPipeline(unet, classifier, DDPMScheduler(**config), default_guidance_scale=scale)
    known = {name: value for name, value in config.items() if name != "respacing"}
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**known))


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """The module in another dtype, without diffusers' remarks on it."""
    return nn.Module.to(module, dtype)


def _describe(name: str, module: nn.Module) -> str:
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return f"{name}: {type(module).__name__}, {millions:.1f}M parameters"


@torch.no_grad()
def _outputs(module: Any) -> Tensor:
    """What a network makes, in float32, of two noisy images of a fixed seed."""
    config = module.config
    is_unet = config.get("num_classes") is None
    size = min(config.sample_size, PROBE_SIZE) if is_unet else config.sample_size
    sample = torch.randn(2, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([1, (config.get("num_levels") or 500) - 1])
    count = config.get("num_class_embeds")
    classes = {} if count is None else {"class_labels": torch.tensor([0, count - 1])}
    return _cast(module, torch.float32)(sample, timestep, **classes, return_dict=False)[0]


def _compare(before: Outputs, pipe: Any) -> list[str]:
    """Lines that tell how far a pipeline's networks are from what they gave before.

    Raises:
        ValueError: where that is more than the tolerance.
    """
    lines = []
    for name, expected in before.items():
        error = float((_outputs(getattr(pipe, name)) - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise ValueError(
                f"The folder's {name} differs from the checkpoint's by {error:.1g} of its largest output, more than "
                f"{TOLERANCE:g}; please report it. Nothing was written."
            )
        lines.append(f"{name}: opened again, its outputs differ by {error:.1g} of the largest")
    return lines
