"""Edits of pictures: sampling that begins with a noised picture, or draws a part of it anew (inpainting).

SDEdit (Meng et al. 2022) begins in the middle of the sampling, at the noised picture. Inpainting replaces the known
pixels at every step by the picture's own with the noise of that step (Song et al. 2021, appendix I.2); RePaint (Lugmayr
et al. 2022, algorithm 1) makes stretches of the sampling several times, noising the picture again in between, so that
the drawn pixels come to fit the known ones.

Every scheduler's state is x_t = a x_0 + s ε; a and s are asked of its `add_noise`. Steps are counted by their index in
`scheduler.timesteps`, which runs from noise to image.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .components import config_of
from .inputs import check_integer

Pictures = Image.Image | list[Image.Image] | np.ndarray | Tensor
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL, for so many channels
USUAL_STRENGTH = 0.8  # diffusers' own


class Editing:
    """What one call keeps of a picture.

    Without a mask the sampling begins with the noised picture and is free from there. With a mask, known pixels are the
    picture's own: noised at each step, as they are at the end.

    - Replacing alone is biased: each step draws the unknown pixels for a noised copy of the known ones, not for these.
    - With `num_resamples` r > 1, every `jump_length` steps are made r times. The bias falls, since at low noise the
      copy is nearly the known pixels, but how modes are weighed is decided at high noise, and mends slowly.
    - With particles, which share one path of noise of the known pixels, the conditional distribution is exact in the
      limit of many particles and small steps, for a model whose steps are the true ones. At large steps the weights add
      up what these are off by; with many known pixels few particles bear all the weight.

    Args:
        image: in the model's range, (B or 1, C, H, W).
        known: where the image is kept, (B or 1, 1, H, W); None without a mask.
        strength: the share of the steps to make, in (0, 1].
        num_resamples: r, how often each stretch of the sampling is made.
        jump_length: j, steps of a stretch.
        num_particles: K, of each image, side by side in the batch.
    """

    def __init__(
        self,
        image: Tensor,
        known: Tensor | None,
        strength: float,
        num_resamples: int = 1,
        jump_length: int = 10,
        num_particles: int = 1,
    ) -> None:
        self.image, self.known, self.strength = image, known, strength
        self.num_resamples, self.jump_length, self.num_particles = num_resamples, jump_length, num_particles

    def begin(
        self, scheduler: Any, noise: Tensor, generator: Any, set_timesteps: Callable[[], Tensor]
    ) -> tuple[Tensor, list[int]]:
        """The state to begin with, and the steps to make, by their indices.

        Args:
            scheduler: whose timesteps are set.
            noise: unit normal, (B K, C, H, W).
            generator: source of the noise of known pixels and of jumps.
            set_timesteps: sets them again, which forgets the steps made.

        Raises:
            ValueError: when no step is left.
        """
        self._scheduler, self._generator, self._set_timesteps = scheduler, generator, set_timesteps
        count = len(scheduler.timesteps)
        first = first_step(scheduler, self.strength)
        self._levels, self._index = noise_levels(scheduler), first
        begin_at(scheduler, first)
        if self.known is not None and self.num_particles > 1:
            self._draw_path(first, count, noise)
        if self.known is not None and self.strength == 1:  # what lies under the mask is not read
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = self._noised(self._spread(self.image), noise, first)
        return latents, resampled(first, count, self.jump_length * scheduler.order, self.num_resamples)

    def enter(self, latents: Tensor, index: int) -> Tensor:
        """The state that a step begins with: noised again at a jump, and with the known pixels at its level.

        Args:
            latents: which the last step gave.
            index: of the step to make.
        """
        if index < self._index:
            self._set_timesteps()
            begin_at(self._scheduler, index)
            latents = self._jump(latents, self._index, index)
        self._index = index + 1
        if self.known is None or index % self._scheduler.order:  # inside of a step of higher order
            return latents
        if self.num_particles > 1:
            return torch.where(self._spread(self.known), self.path_at(index), latents)
        return torch.where(self.known, self._noised(self.image, self._draw(latents), index), latents)

    def end(self, latents: Tensor) -> Tensor:
        """The images, with the known pixels as they were given."""
        return latents if self.known is None else torch.where(self.known, self.image, latents)

    def landing(self, mean: Tensor, std: Tensor, noise: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The noise with which each particle's step lands on the known pixels' path, and where it was so chosen.

        Args:
            mean: of the step's Gaussian, (B K, C, H, W).
            std: its standard deviation.
            noise: unit normal, for the unknown pixels.
            index: of the step.
        """
        assert self.known is not None
        known = self._spread(self.known)
        return torch.where(known, (self.path_at(index + 1) - mean) / std, noise), known

    def path_at(self, index: int) -> Tensor:
        """The image on the path of noise that each image's particles share, (B K, C, H, W)."""
        return self._path[index].repeat_interleave(self.num_particles, dim=0)

    def _draw_path(self, first: int, end: int, noise: Tensor) -> None:
        """Draws from q(x_first, ..., x_end-1 | x_0) of each image, backwards from the image."""
        state = self.image.expand(len(noise) // self.num_particles, -1, -1, -1)
        self._path = {end: state}
        for index in reversed(range(first, end)):
            self._path[index] = state = self._jump(state, index + 1, index)

    def _spread(self, images: Tensor) -> Tensor:
        """One for all, or each image's own for each of its particles."""
        return images if len(images) == 1 else images.repeat_interleave(self.num_particles, dim=0)

    def _noised(self, image: Tensor, noise: Tensor, index: int) -> Tensor:
        """a x_0 + s ε, what the image is at a step."""
        a, s = self._levels[index]
        return a * image + s * noise

    def _jump(self, latents: Tensor, start: int, end: int) -> Tensor:
        """A draw from q(x_end | x_start), from the state of a step back to that of a noisier one."""
        (a, s), (noisier_a, noisier_s) = self._levels[start], self._levels[end]
        ratio = noisier_a / a
        return ratio * latents + max(noisier_s**2 - (ratio * s) ** 2, 0.0) ** 0.5 * self._draw(latents)

    def _draw(self, like: Tensor) -> Tensor:
        return randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)


def first_step(scheduler: Any, strength: float) -> int:
    """The index of the first step to make, as diffusers' image-to-image pipelines cut them.

    Raises:
        ValueError: when no step is left.
    """
    steps = scheduler.num_inference_steps or len(scheduler.timesteps)
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise ValueError(
            f"`strength` must leave a step to make, got {strength} of {steps} steps; raise it to {1 / steps:.3g} at "
            "least, or `num_inference_steps`."
        )
    return (steps - kept) * scheduler.order


def begin_at(scheduler: Any, index: int) -> None:
    """Tells a scheduler that counts its steps which comes next."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """(a, s) of x_t = a x_0 + s ε at each step of a scheduler, as its own `add_noise` has them; at the end (1, 0).

    No step may have been made since its timesteps were set.
    """
    one, zero, levels = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), []
    for index, t in enumerate(scheduler.timesteps.cpu()):
        begin_at(scheduler, index)
        parts = (scheduler.add_noise(x0, noise, t.reshape(1)) for x0, noise in ((one, zero), (zero, one)))
        a, s = (float(part) for part in parts)
        levels.append((a, s))
    return [*levels, (1.0, 0.0)]


def resampled(first: int, end: int, jump_length: int, num_resamples: int) -> list[int]:
    """The steps from `first` up to `end`, in stretches of `jump_length`, each made `num_resamples` times in turn.

    Differs from RePaint, whose first stretch and last step are made once.
    """
    stretches = [list(range(start, min(start + jump_length, end))) for start in range(first, end, jump_length)]
    return [index for stretch in stretches for _ in range(num_resamples) for index in stretch]


# --- what a call is given --------------------------------------------------------------------------------------------


def check_edit(
    scheduler: Any,
    image: Any,
    strength: float | None,
    mask_image: Any,
    num_resamples: int,
    jump_length: int,
    num_particles: int,
) -> float:
    """The strength of an edit, the usual one where none is given.

    Raises:
        ValueError: for arguments out of their range, that need one another, or that the scheduler cannot follow.
    """
    if mask_image is not None and image is None:
        raise ValueError("`image` and `mask_image` go together, got no `image`; give both or none.")
    check_integer("num_resamples", num_resamples, remedy="1 makes each step once")
    check_integer("jump_length", jump_length)
    if num_resamples > 1 and mask_image is None:
        raise ValueError(
            f"`num_resamples` needs a `mask_image`, got {num_resamples} without; leave it out, or say what to draw."
        )
    if num_resamples > 1 and num_particles > 1:
        raise ValueError(
            f"`num_resamples` and `num_particles` exclude each other, got {num_resamples} and {num_particles}; leave "
            "one out."
        )
    if strength is not None:
        if image is None:
            raise ValueError(f"`strength` needs an `image` to begin with, got {strength!r} without; give one.")
        if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be in (0, 1], the share of the steps to make, got {strength!r}.")
    if image is not None:
        _check_scheduler(scheduler, num_resamples)
    usual = USUAL_STRENGTH if mask_image is None else 1.0
    return usual if strength is None else float(strength)


def _check_scheduler(scheduler: Any, num_resamples: int) -> None:
    name = type(scheduler).__name__
    counts_alone = hasattr(scheduler, "counter") and not hasattr(scheduler, "set_begin_index")  # PNDM
    if not hasattr(scheduler, "add_noise") or counts_alone:
        raise ValueError(
            f"`image` needs a scheduler with `add_noise` whose steps can begin anywhere, got {name}; use another, such "
            "as DDIMScheduler."
        )
    if num_resamples > 1 and config_of(scheduler, "steps_per_level") is not None:
        raise ValueError(
            f"`num_resamples` must be left out for a {name}, which updates each level several times by itself, got "
            f"{num_resamples}; raise its `steps_per_level`."
        )


def read_pixels(image: Any, shape: tuple[int, ...], from_zero: bool) -> Tensor:
    """An image, or one each, in the model's range, (B or 1, C, H, W): [0, 1] where `from_zero`, else [-1, 1]."""
    pixels = read_pictures("image", image, shape)
    return pixels if from_zero else 2 * pixels - 1


def read_known(mask_image: Any, shape: tuple[int, ...]) -> Tensor:
    """Where a mask leaves the image as it is, up to 0.5, (B or 1, 1, H, W)."""
    return read_pictures("mask_image", mask_image, (shape[0], 1, *shape[2:])) <= 0.5


def read_pictures(name: str, pictures: Any, shape: tuple[int, ...]) -> Tensor:
    """Pictures in [0, 1] as (B or 1, C, H, W), for a shape (B, C, H, W).

    Raises:
        ValueError: for another kind, count, size or rank, other channels, NaN, or values outside [0, 1].
    """
    batch_size, channels, *size = shape
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, list):
        pictures = _stack(name, pictures, channels, (size[0], size[1]))
    if not isinstance(pictures, np.ndarray | Tensor):
        raise ValueError(
            f"`{name}` must be a PIL image, a list of them, an array (B, H, W, C) or a tensor (B, C, H, W), got "
            f"{type(pictures).__name__}."
        )
    axes = "(B, H, W, C)" if isinstance(pictures, np.ndarray) else "(B, C, H, W)"
    if pictures.ndim != 4:
        raise ValueError(
            f"`{name}` must have 4 axes {axes}, got {pictures.ndim} in the shape {tuple(pictures.shape)}; add those of "
            "length 1."
        )
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures).movedim(-1, 1)
    if list(pictures.shape[1:]) != [channels, *size]:
        raise ValueError(
            f"`{name}` must have {channels} channels and the model's size {tuple(size)}, got the shape "
            f"{tuple(pictures.shape)} of (B, C, H, W); resize it."
        )
    if len(pictures) not in (1, batch_size):
        raise ValueError(
            f"`{name}` must be one for all or one for each of the {batch_size} images, got {len(pictures)}; change "
            "`batch_size`, or the labels."
        )
    if not ((pictures >= 0) & (pictures <= 1)).all():
        raise ValueError(f"`{name}` must be in [0, 1], got {pictures.min():g} to {pictures.max():g}; rescale it.")
    return pictures.clone(memory_format=torch.contiguous_format)  # kernels round by the order of pixels in memory


def _stack(name: str, pictures: list[Any], channels: int, size: tuple[int, int]) -> np.ndarray:
    """PIL images as (B, H, W, C) in [0, 1]."""
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        kinds = sorted({type(picture).__name__ for picture in pictures}) or "an empty one"
        raise ValueError(f"`{name}` as a list must be of PIL images, got {kinds}; stack arrays and tensors.")
    for picture in pictures:
        if picture.size != size[::-1]:
            raise ValueError(
                f"`{name}` must have the model's size {size}, got a PIL image of height and width "
                f"{picture.size[::-1]}; resize it."
            )
    if channels not in MODES:
        raise ValueError(f"`{name}` must be an array or a tensor for a model of {channels} channels, got PIL images.")
    arrays = [np.asarray(picture.convert(MODES[channels]), dtype=np.float32) / 255 for picture in pictures]
    return np.stack(arrays).reshape(len(arrays), *size, channels)
