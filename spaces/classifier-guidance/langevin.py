"""The tab of score networks: annealed Langevin dynamics, its noise levels as a film."""

import math
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from checks import MOST_IMAGES, MOST_SEED, choice, whole
from drawing import Frame
from exhibit import Exhibit, seed_control
from film import Panel
from opening import Opened

from hfdiff.sampling import image_generators
from hfdiff.schedulers.scheduling_annealed_langevin import SAMPLINGS

MOST_STEPS = 250


@dataclass(frozen=True)
class Settings:
    """Images of the score network.

    Args:
        count: how many.
        steps: model calls.
        sampling: kind of annealed Langevin dynamics.
        seed: of the noise.
    """

    count: int
    steps: int
    sampling: str
    seed: int


class Langevin(Exhibit):
    """Images from noise, through falling noise levels.

    Args:
        ncsn: the score network's pipeline.
    """

    endpoint = "langevin"
    plot_count = 1

    def __init__(self, ncsn: Opened) -> None:
        super().__init__()
        self.ncsn = ncsn

    def check(self, count: Any, steps: Any, sampling: Any, seed: Any) -> Settings:
        """Draws images from a score network by annealed Langevin dynamics.

        Returns a picture of the images, an npz file of them (uint8, in arr_0), and a report with the code that draws
        the same.

        Args:
            count: how many, 1 to 10.
            steps: model calls, up to 250.
            sampling: consistent, langevin or predictor_corrector.
            seed: of the noise.
        """
        return Settings(
            whole("Images", count, 1, MOST_IMAGES),
            whole("Steps", steps, 1, MOST_STEPS),
            choice("Sampler", sampling, list(SAMPLINGS)),
            whole("Seed", seed, 0, MOST_SEED),
        )

    def opened(self, settings: Settings) -> Opened:
        return self.ncsn

    def pipeline(self, settings: Settings) -> Any:
        return self.ncsn.with_scheduler(type(self.ncsn.pipe.scheduler), sampling=settings.sampling)

    def arguments(self, settings: Settings) -> dict[str, Any]:
        return {
            "batch_size": settings.count,
            "num_inference_steps": settings.steps,
            "generator": image_generators(settings.seed, settings.count),
        }

    def snippet(self, settings: Settings) -> str:
        preamble = "".join(f"{line}\n" for line in self.ncsn.preamble)
        return f"""import torch
from hfdiff import AnnealedLangevinScheduler, NCSNPipeline
from hfdiff.sampling import image_generators

{preamble}pipe = NCSNPipeline.from_pretrained({self.ncsn.name!r})
pipe.scheduler = AnnealedLangevinScheduler.from_config(pipe.scheduler.config, sampling={settings.sampling!r})
images = pipe(
    batch_size={settings.count},
    num_inference_steps={settings.steps},
    generator=image_generators({settings.seed}, {settings.count}),
).images
"""

    def panels(self, settings: Settings) -> list[Panel]:
        names = tuple(map(str, range(settings.count)))
        return [Panel(f"{settings.sampling.replace('_', '-')}, seed {settings.seed}", names, slice(None))]

    def plots(self, settings: Settings, frames: list[Frame]) -> list[pd.DataFrame]:
        levels = [(frame.step, math.log10(frame.sigma)) for frame in frames if frame.sigma is not None]
        return [pd.DataFrame(levels, columns=["model call", "log₁₀ σ"])]

    def controls(self) -> list[gr.components.Component]:
        return [
            gr.Slider(1, MOST_IMAGES, 5, step=1, label="Images"),
            gr.Slider(5, MOST_STEPS, 100, step=1, label="Steps (model calls)"),
            gr.Radio(list(SAMPLINGS), value=self.ncsn.pipe.scheduler.config.sampling, label="Sampler"),
            seed_control(MOST_SEED),
        ]

    def plot_components(self) -> list[gr.LinePlot]:
        with gr.Row():
            return [gr.LinePlot(x="model call", y="log₁₀ σ", height=230, label="The noise level by model call")]
