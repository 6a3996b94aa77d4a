"""Speed as ratios of medians within one interleaved run: the DDPM step, the guided pipeline, and `optimize()`.

    make bench                      # or: python benchmarks/speed.py [--rounds 15] [--no_optimize]

Contestants take turns round by round, so a machine whose speed drifts slows all of them alike.
"""

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median, quantiles

import diffusers
import torch
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, DDPMScheduler
from hfdiff.pipelines.guidance import classifier_gradient

SHAPES = ((16, 1, 32, 32), (64, 1, 32, 32), (64, 3, 64, 64))
PIPELINE = "pipelines/mnist-classifier-guided"
STEPS = 50

Contest = dict[str, Callable[[], object]]


def interleaved(contest: Contest, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after a warm-up; they take turns, each round from another start."""
    for run in contest.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    names = list(contest)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            contest[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], unit: float, label: str) -> None:
    """Medians, and each contestant's time as a ratio of the first one's, round by round: median (quartiles)."""
    print(f"\n{title}")
    base = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, base)]
        low, _, high = quantiles(ratios, n=4)
        print(f"  {name:34s} {median(times) / unit:10.1f} {label}   x {median(ratios):5.2f} ({low:.2f}-{high:.2f})")


def bench_step(shape: tuple[int, ...], rounds: int) -> None:
    """One reverse step: ours, diffusers', and the bare arithmetic with `randn`."""
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
    sample, output = torch.randn(2, *shape)
    timesteps = ours.timesteps[10:30]
    for t in timesteps:
        a, b = (s.step(output, t, sample, generator=torch.Generator().manual_seed(0)) for s in (ours, theirs))
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    coefficients = [bare_coefficients(ours, int(t)) for t in timesteps]

    def bare() -> None:
        for on_xt, on_output, x0_to_mean, xt_to_mean, scale in coefficients:
            x0 = (on_xt * sample + on_output * output).clamp_(-1, 1)
            _ = x0_to_mean * x0 + xt_to_mean * sample + scale * torch.randn(shape, generator=generator)

    def steps(scheduler: diffusers.SchedulerMixin) -> Callable[[], None]:
        def run() -> None:
            for t in timesteps:
                scheduler.step(output, t, sample, generator=generator)

        return run

    contest: Contest = {"hfdiff": steps(ours), "diffusers": steps(theirs), "bare arithmetic and randn": bare}
    title = f"DDPMScheduler.step, {'x'.join(map(str, shape))}"
    report(title, interleaved(contest, rounds), len(timesteps) * 1e-6, "µs")


def bare_coefficients(scheduler: DDPMScheduler, t: int) -> tuple[float, float, float, float, float]:
    """The five numbers of a step, read off the scheduler by feeding it units."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    alpha_bar = scheduler.alphas_cumprod[t].item()
    (on_x0, variance, _), (on_xt, _, _) = scheduler.q_posterior(one, zero, t), scheduler.q_posterior(zero, one, t)
    return alpha_bar**-0.5, -((1 / alpha_bar - 1) ** 0.5), on_x0.item(), on_xt.item(), variance.item() ** 0.5


def by_hand(pipe: ClassifierGuidedPipeline, labels: Tensor, scale: float, seed: int) -> Tensor:
    """Guided sampling as one writes it with diffusers alone: its scheduler, and Σ g added to what `step` returns."""
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randn(len(labels), 1, 28, 28, generator=generator)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipe.unet(xt, t).sample
        gradient = classifier_gradient(pipe.classifier, xt, t, labels, scale)
        xt = scheduler.step(output, t, xt, generator=generator).prev_sample
        if t > 0:
            xt = xt + scheduler._get_variance(t) * gradient
    return xt


def bench_pipeline(rounds: int, batch_size: int, optimize: bool) -> None:
    """Guided sampling of a batch: by hand, with the pipeline, and with the pipeline optimized."""
    pipe = ClassifierGuidedPipeline.from_pretrained(PIPELINE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(batch_size) % 10
    scale = pipe.default_guidance_scale

    def run(which: ClassifierGuidedPipeline) -> Callable[[], Tensor]:
        return lambda: (
            which(
                labels, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent"
            ).images
        )

    contest: Contest = {"by hand with diffusers": lambda: by_hand(pipe, labels, scale, 0), "hfdiff": run(pipe)}
    difference = (contest["hfdiff"]() - contest["by hand with diffusers"]()).abs()
    print(f"\npipeline and loop by hand differ by {difference.max():.1e} at most, median {difference.median():.1e}")
    if optimize:
        fast = ClassifierGuidedPipeline.from_pretrained(PIPELINE, dtype=torch.float32)
        fast.set_progress_bar_config(disable=True)
        contest["hfdiff, optimized"] = run(fast.optimize())
    report(f"guided sampling, {batch_size} images, {STEPS} steps", interleaved(contest, rounds), 1, "s")


def main() -> None:
    """Runs everything and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the step; a fifth of them for the pipeline")
    parser.add_argument("--batch_size", type=int, default=16, help="images of the guided pipeline")
    parser.add_argument(
        "--no_optimize", action="store_true", help="leave out `optimize()`, which compiles for a minute"
    )
    args = parser.parse_args()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, ", end="")
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    for shape in SHAPES:
        bench_step(shape, args.rounds)
    bench_pipeline(max(args.rounds // 5, 2), args.batch_size, not args.no_optimize)


if __name__ == "__main__":
    main()
