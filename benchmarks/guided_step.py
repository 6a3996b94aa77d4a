"""A guided step (UNet, classifier's gradient, DDPM step) against guided-diffusion's own code on the same weights.

    python benchmarks/guided_step.py --original guided-diffusion [--rounds 15] [--optimize]

`--original` is a clone of https://github.com/openai/guided-diffusion. An ADM of 64 px and reduced width with random
weights, batch 4, float32; the contestants take turns. Then few-step sampling against the original's 250 steps.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from speed import interleaved, report
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, DDIMScheduler, DDPMScheduler
from hfdiff.convert.flags import parse_flags
from hfdiff.convert.guided_diffusion import load_classifier, load_unet
from hfdiff.convert.schedule import ddpm_config
from hfdiff.pipelines.guidance import classifier_gradient

FLAGS = (
    "--attention_resolutions 32,16,8 --class_cond True --image_size 64 --learn_sigma True --noise_schedule cosine "
    "--num_channels 64 --num_head_channels 64 --num_res_blocks 1 --resblock_updown True --use_scale_shift_norm True "
    "--use_new_attention_order True --classifier_width 64 --classifier_depth 1 --timestep_respacing 250"
)
BATCH, STEP = 4, 125
FEW = {"DDIM": (DDIMScheduler, 25), "DPM-Solver++": (DPMSolverMultistepScheduler, 20)}


def randomize(module: torch.nn.Module) -> None:
    """Weights of a scale that keeps activations in range; a network's last layers are zero at first."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2)


def original_step(path: Path, flags: dict[str, Any]) -> tuple[Any, Any, Callable[[Tensor, Tensor], Tensor]]:
    """The original's UNet and classifier, and its guided step as classifier_sample.py makes it."""
    sys.path.insert(0, str(path))
    from guided_diffusion import script_util as scripts

    pick = lambda defaults: {name: flags[name] for name in defaults}  # noqa: E731
    unet, diffusion = scripts.create_model_and_diffusion(**pick(scripts.model_and_diffusion_defaults()))
    classifier = scripts.create_classifier(**pick(scripts.classifier_defaults()))
    for module in (unet.eval(), classifier.eval()):
        randomize(module)

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            selected = F.log_softmax(classifier(x_in, t), dim=-1)[range(len(y)), y]
            return torch.autograd.grad(selected.sum(), x_in)[0]

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            t = torch.full((len(x),), STEP)
            return diffusion.p_sample(unet, x, t, cond_fn=cond_fn, model_kwargs={"y": y})["sample"]

    return unet, classifier, step


def pipeline_step(pipe: ClassifierGuidedPipeline) -> Callable[[Tensor, Tensor], Tensor]:
    """The same step by the pipeline's parts."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps()
    t = scheduler.timesteps.flip(0)[STEP]

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> Tensor:
        output = pipe.unet(x.to(pipe.unet.dtype), t, class_labels=y).sample.to(x.dtype)
        gradient = classifier_gradient(pipe.classifier, x, t, y)
        return scheduler.step(output, t, x, guidance=gradient).prev_sample

    return step


def main() -> None:
    """Compares the numbers first, then the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="folder of guided-diffusion's repository")
    parser.add_argument("--flags", default="", help=f"others than {FLAGS}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step_only", action="store_true", help="leave out whole runs of few steps")
    parser.add_argument("--optimize", action="store_true", help="also after `pipe.optimize()`")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    torch.manual_seed(0)
    flags = parse_flags(f"{FLAGS} {args.flags}")
    unet, classifier, theirs = original_step(args.original, flags)

    def make_pipe() -> ClassifierGuidedPipeline:
        states = ({name: value.clone() for name, value in net.state_dict().items()} for net in (unet, classifier))
        networks = [load(state, flags) for load, state in zip((load_unet, load_classifier), states)]
        return ClassifierGuidedPipeline(*networks, DDPMScheduler(**ddpm_config(flags)))

    pipe = make_pipe()
    pipe.set_progress_bar_config(disable=True)
    ours = pipeline_step(pipe)
    size = flags["image_size"]
    x, y = torch.randn(BATCH, 3, size, size), torch.arange(BATCH)
    images = []
    for step in (theirs, ours):
        torch.manual_seed(1)
        images.append(step(x, y))
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)

    contest = {"guided-diffusion": lambda: theirs(x, y), "hfdiff": lambda: ours(x, y)}
    if args.optimize:
        fast = pipeline_step(make_pipe().optimize())
        contest["hfdiff, optimize()"] = lambda: fast(x, y)
    seconds = interleaved(contest, args.rounds)
    report(f"a guided step, {type(pipe.unet).__name__} of {size} px, batch {BATCH}", seconds, 1e-3, "ms")
    if args.step_only:
        return
    full = 250 * median(seconds["guided-diffusion"])
    print(f"\nguided sampling, batch {BATCH}: the original's 250 steps take {full:.1f} s")
    for name, (kind, count) in FEW.items():
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        (times,) = interleaved({name: lambda count=count: pipe(y, 1.0, count, output_type="pt")}, 1).values()
        print(f"  {name:14s} {count} steps {median(times):7.1f} s   {full / median(times):5.1f} times as fast")


if __name__ == "__main__":
    main()
