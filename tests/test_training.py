"""The training side: losses against closed forms, batches, settings, exact resume, and each script's main."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image as PILImage
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hfdiff.models.noisy_classifier import NoisyClassifier
from hfdiff.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from hfdiff.schedulers.scheduling_ddpm import DDPMScheduler
from hfdiff.training.config import TrainingSettings, parse_settings
from hfdiff.training.data import Batch, BatchStream, LabelledImages, load_images, random_shift
from hfdiff.training.loop import find_checkpoint, update
from hfdiff.training.losses import classification_loss, ddpm_loss, guided_denoising_loss

TRAINING = Path(__file__).parent.parent / "training"
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a few operations


def load_script(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def batch_of(size: tuple[int, ...], scheduler: DDPMScheduler, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(size, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return x0, torch.randint(len(scheduler), size[:1], generator=generator), noise


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddpm_loss_is_zero_for_the_target_and_its_energy_for_a_zero_model(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    x0, t, noise = batch_of((4, 2, 3, 3), scheduler)
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    target = {"epsilon": noise, "sample": x0, "v_prediction": v}[kind]
    perfect = ddpm_loss(lambda xt, t: SimpleNamespace(sample=target), scheduler, x0, t, noise)
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), **EXACT)
    zero = ddpm_loss(lambda xt, t: SimpleNamespace(sample=torch.zeros_like(xt)), scheduler, x0, t, noise)
    torch.testing.assert_close(zero, target.square().mean(), **EXACT)


def test_ddpm_loss_refuses_a_prediction_without_a_target() -> None:
    scheduler = DDPMScheduler(prediction_type="prev_sample")
    with pytest.raises(ValueError, match="prediction_type"):
        ddpm_loss(lambda xt, t: None, scheduler, *batch_of((1, 1, 2, 2), scheduler))


def test_classification_loss_of_a_guess_is_log_k() -> None:
    scheduler = DDPMScheduler()
    x0, t, noise = batch_of((6, 1, 2, 2), scheduler)
    loss = classification_loss(
        lambda xt, t: SimpleNamespace(logits=torch.ones(len(xt), 7, dtype=xt.dtype)), scheduler, x0, t, noise, t % 7
    )
    assert loss.item() == pytest.approx(math.log(7))


class GaussianPair:
    """One pixel, x_0 | y ~ N(m_y, s²), y even odds: everything about x_t is known."""

    means = torch.tensor([-0.8, 0.5], dtype=torch.float64)
    std = 0.3

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.scheduler.alphas_cumprod[t].view(-1, 1)
        return alpha_bar, alpha_bar * self.std**2 + 1 - alpha_bar

    def logits(self, xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar, variance = self.levels(t)
        return -((xt.flatten(1) - alpha_bar.sqrt() * self.means) ** 2) / (2 * variance)

    def eps_by_class(self, xt: Tensor, t: Tensor) -> Tensor:
        """E[ε | x_t, y], (B, 2)."""
        alpha_bar, variance = self.levels(t)
        return (1 - alpha_bar).sqrt() * (xt.flatten(1) - alpha_bar.sqrt() * self.means) / variance

    def eps(self, xt: Tensor, t: Tensor) -> Tensor:
        """E[ε | x_t], (B, 1, 1, 1)."""
        return (self.logits(xt, t).softmax(-1) * self.eps_by_class(xt, t)).sum(-1).view_as(xt)

    def unet(self, xt: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.eps(xt, t))

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x0, t, noise = batch_of((count, 1, 1, 1), self.scheduler)
        labels = torch.arange(count) % 2
        return self.means[labels].view_as(x0) + self.std * x0, t, noise, labels


def test_guided_denoising_loss_of_the_exact_classifier_is_that_of_the_conditional_denoiser() -> None:
    pair = GaussianPair(DDPMScheduler())
    x0, t, noise, labels = pair.draw(64)
    loss = guided_denoising_loss(
        lambda xt, t: SimpleNamespace(logits=pair.logits(xt, t)), pair.unet, pair.scheduler, x0, t, noise, labels
    )
    eps = pair.eps_by_class(pair.scheduler.q_sample(x0, t, noise), t).gather(1, labels[:, None])
    torch.testing.assert_close(loss.detach(), (eps - noise.flatten(1)).square().mean(), **EXACT)


def test_guided_denoising_loss_is_least_at_the_exact_gradient() -> None:
    pair = GaussianPair(DDPMScheduler())
    drawn = pair.draw(20_000)

    def loss(scale: float) -> float:
        def classifier(xt: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=scale * pair.logits(xt, t))

        return guided_denoising_loss(classifier, pair.unet, pair.scheduler, *drawn).item()

    losses = {scale: loss(scale) for scale in (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)}
    assert min(losses, key=losses.get) == 1.0, losses


def test_guided_denoising_loss_reads_every_prediction_type() -> None:
    losses = []
    for kind in ("epsilon", "v_prediction"):
        pair = GaussianPair(DDPMScheduler(prediction_type=kind))

        def unet(xt: Tensor, t: Tensor, pair: GaussianPair = pair, kind: str = kind) -> SimpleNamespace:
            eps, alpha_bar = pair.eps(xt, t), pair.levels(t)[0].view_as(xt)
            v = (eps - (1 - alpha_bar).sqrt() * xt) / alpha_bar.sqrt()
            return SimpleNamespace(sample=v if kind == "v_prediction" else eps)

        classifier = lambda xt, t, pair=pair: SimpleNamespace(logits=2 * pair.logits(xt, t))  # noqa: E731
        losses.append(guided_denoising_loss(classifier, unet, pair.scheduler, *pair.draw(64)))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)  # ᾱ near 0 costs digits in the conversion


def test_guided_denoising_loss_reaches_the_classifier_through_attention_and_not_the_unet() -> None:
    torch.manual_seed(0)
    scheduler = DDPMScheduler()
    classifier = NoisyClassifier(
        sample_size=4, in_channels=1, num_classes=3, model_channels=8, channel_mult=(1, 2), attention_downsamples=(1,),
        num_head_channels=8, norm_num_groups=4,
    ).double()  # fmt: skip
    for parameter in classifier.parameters():  # away from the zeros it starts with
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    unet = nn.Conv2d(1, 1, 3, padding=1).double()
    drawn = (*batch_of((5, 1, 4, 4), scheduler), torch.tensor([0, 1, 2, 0, 1]))

    def loss() -> Tensor:
        return guided_denoising_loss(classifier, lambda xt, t: SimpleNamespace(sample=unet(xt)), scheduler, *drawn)

    loss().backward()
    assert unet.weight.grad is None
    direction = [torch.randn_like(parameter) for parameter in classifier.parameters()]
    slope = sum(
        (p.grad * d).sum() for p, d in zip(classifier.parameters(), direction, strict=True) if p.grad is not None
    )
    values = []
    for sign in (1, -1, -1):  # to +h, back to the middle, to -h
        for parameter, d in zip(classifier.parameters(), direction, strict=True):
            parameter.data.add_(sign * 1e-6 * d)
        values.append(loss().item())
    assert slope.item() == pytest.approx((values[0] - values[2]) / 2e-6, rel=1e-4)


# --- data ------------------------------------------------------------------------------------------------------------


def counted_images(count: int) -> LabelledImages:
    return LabelledImages(torch.arange(count).float().view(-1, 1, 1, 1), torch.arange(count), [])


def test_an_epoch_visits_every_image_once_and_the_next_in_another_order() -> None:
    stream = BatchStream(counted_images(20), 5, 10, seed=3)
    epochs = [torch.cat([stream(4 * epoch + i).labels for i in range(4)]) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_is_a_function_of_its_number_and_the_seed() -> None:
    stream = BatchStream(counted_images(20), 5, 10, seed=3)
    later = stream(7)
    stream(0)
    for ours, again in zip(later, stream(7), strict=True):
        assert torch.equal(ours, again)
    for other in (stream(8), BatchStream(counted_images(20), 5, 10, seed=4)(7)):
        assert not torch.equal(later.noise, other.noise)


def test_a_batch_larger_than_the_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train_batch_size.*4 images.*5"):
        BatchStream(counted_images(4), 5, 10, seed=0)


def test_random_shift_moves_whole_images_over_background() -> None:
    images = torch.zeros(400, 2, 5, 5) - 1
    images[:, 0, 2, 2], images[:, 1, 2, 2] = 1, 0.5
    shifted = random_shift(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(shifted.flatten(1).sum(1), images.flatten(1).sum(1))
    places = (shifted[:, 0] == 1).nonzero()[:, 1:]
    assert torch.equal(places, (shifted[:, 1] == 0.5).nonzero()[:, 1:])
    assert len(places.unique(dim=0)) == 25


def test_digits_are_scaled_to_minus_one_and_one() -> None:
    train, test = load_images("digits"), load_images("digits", "test")
    pixels = torch.from_numpy(load_digits().images).float()
    assert torch.equal(torch.cat([train.images, test.images])[:, 0], pixels / 8 - 1)
    assert train.label_names == [str(digit) for digit in range(10)]
    assert load_images("digits", resolution=16).images.shape == (1500, 1, 16, 16)


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_parquet(path: Path, pictures: list[PILImage.Image]) -> str:
    path.parent.mkdir(exist_ok=True)
    features = Features({"picture": Image(), "kind": ClassLabel(names=["cat", "dog"])})
    kinds = [i % 2 for i in range(len(pictures))]
    Dataset.from_dict({"picture": pictures, "kind": kinds}, features=features).to_parquet(str(path))
    return str(path)


@pytest.mark.usefixtures("dataset_cache")
def test_a_parquet_file_and_its_folder_give_pixels_labels_and_names(tmp_path: Path) -> None:
    grey = PILImage.fromarray(np.array([[0, 255], [51, 102]], dtype=np.uint8))
    red = PILImage.new("RGB", (2, 2), "red")
    clear = PILImage.new("RGBA", (2, 2), (0, 0, 0, 0))
    file = write_parquet(tmp_path / "data" / "train.parquet", [grey, red, clear])
    columns = {"image_column": "picture", "label_column": "kind"}
    for source in (file, str(tmp_path / "data")):
        data = load_images(source, **columns)
        assert data.label_names == ["cat", "dog"]
        assert data.labels.tolist() == [0, 1, 0]
        expected = torch.tensor([[-1, 1], [-0.6, -0.2]])
        torch.testing.assert_close(data.images[0], expected.expand(3, 2, 2))
        assert data.images[1, :, 0, 0].tolist() == [1, -1, -1]
        assert (data.images[2] == 1).all()  # transparent on white
    with pytest.raises(ValueError, match=r"image_column.*'picture', 'kind'.*'image'"):
        load_images(file)


@pytest.mark.usefixtures("dataset_cache")
def test_images_of_several_sizes_need_a_resolution(tmp_path: Path) -> None:
    pictures = [PILImage.new("L", (4, 4), 255), PILImage.new("L", (6, 4), 255)]
    file = write_parquet(tmp_path / "data" / "train.parquet", pictures)
    with pytest.raises(ValueError, match="resolution"):
        load_images(file, image_column="picture")
    assert load_images(file, image_column="picture", resolution=2).images.tolist() == torch.ones(2, 1, 2, 2).tolist()


# --- settings --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 8e-4\nseed: 5\nuse_ema: false\n")
    settings = parse_settings(TrainingSettings, ["--learning_rate", "1e-3", f"--config={recipe}", "--use_ema"])
    assert (settings.learning_rate, settings.seed, settings.use_ema) == (1e-3, 5, True)
    assert settings.train_batch_size == TrainingSettings().train_batch_size
    assert not parse_settings(TrainingSettings, ["--no_use_ema"]).use_ema


@pytest.mark.parametrize(
    "flags", [["--learning_rat", "1"], ["--train_batch_size", "0"], ["--dataset_name", "a", "--train_data_dir", "b"]]
)
def test_mistaken_flags_end_the_script(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_settings(TrainingSettings, flags)


def test_an_unknown_key_of_a_recipe_ends_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rates: 1.0\n")
    with pytest.raises(SystemExit, match="2"):
        parse_settings(TrainingSettings, ["--config", str(recipe)])
    assert "learning_rates" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(path.name for path in TRAINING.glob("recipes/*.yaml")))
def test_a_dry_run_of_each_recipe_prints_a_recipe_of_the_same_run(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings = ("train_ddpm", "DDPMSettings") if "ddpm" in recipe else ("train_classifier", "ClassifierSettings")
    script = load_script(name)
    guide = ["--diffusion_model", "folder"] if "classifier" in recipe else []
    flags = ["--config", str(TRAINING / "recipes" / recipe), *guide]
    with pytest.raises(SystemExit, match="0"):
        script.main([*flags, "--dry_run"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = parse_settings(getattr(script, settings), ["--config", str(printed)])
    assert again == parse_settings(getattr(script, settings), flags)


def test_settings_that_a_folder_already_fixes_are_refused() -> None:
    settings = load_script("train_classifier").ClassifierSettings
    with pytest.raises(ValueError, match=r"diffusion_model.*beta_schedule"):
        settings(diffusion_model="folder", beta_schedule="linear")
    with pytest.raises(ValueError, match=r"init_classifier.*model_channels"):
        settings(init_classifier="folder", model_channels=8)
    with pytest.raises(ValueError, match=r"guided_denoising_weight.*diffusion_model"):
        settings(guided_denoising_weight=1.0)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_accumulated_batches_take_one_step_along_their_mean_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = [Batch(torch.full((1, 1), value), *[torch.empty(0)] * 3) for value in (1.0, 3.0)]
    loss = update(accelerator, model, optimizer, lambda model, batch: model(batch.x0).sum(), batches, 10.0)
    assert loss.item() == 2.0
    assert model.weight.item() == pytest.approx(1 - 0.1 * 2.0)


def test_checkpoints_are_found_by_step_and_never_ignored(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "latest") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.partial"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9").name == "checkpoint-9"
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*checkpoint-7"):
        find_checkpoint(tmp_path, "checkpoint-7")
    with pytest.raises(ValueError, match=r"output_dir.*resume_from_checkpoint latest"):
        find_checkpoint(tmp_path, None)


TINY = [
    *("--train_batch_size", "8", "--max_train_steps", "4", "--lr_warmup_steps", "1"),
    *("--checkpointing_steps", "2", "--logging_steps", "1"),
]
TINY_UNET = ["--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--attention_head_dim", "8"]
TINY_CLASSIFIER = [
    *("--model_channels", "8", "--channel_mult", "[1,2]", "--attention_downsamples", "[2]"),
    *("--num_head_channels", "8", "--norm_num_groups", "4", "--dropout", "0.3", "--shift_augmentation", "1"),
]


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    load_script("train_ddpm").main([*TINY, *TINY_UNET, "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def classifier_flags(diffusion_model: Path) -> list[str]:
    return [
        "--diffusion_model",
        str(diffusion_model),
        "--validation_data",
        "digits",
        "--gradient_accumulation_steps",
        "2",
    ]


@pytest.fixture(scope="module")
def guided_pipeline(classifier_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    load_script("train_classifier").main([*TINY, *TINY_CLASSIFIER, *classifier_flags, "--output_dir", str(folder)])
    return folder


def resume_halfway(run: Path, folder: Path) -> list[str]:
    """A run's folder as it was after two of its four steps, and what had been written since; flags to resume it."""
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-4.partial").mkdir()
    shutil.copy(run / "log.jsonl", folder)
    return ["--resume_from_checkpoint", "latest", "--output_dir", str(folder)]


def assert_same_files(name: str, *folders: Path) -> None:
    first, second = ((folder / name).read_bytes() for folder in folders)
    assert first == second


def test_a_resumed_diffusion_run_ends_with_the_same_bits(diffusion_model: Path, tmp_path: Path) -> None:
    load_script("train_ddpm").main([*TINY, *TINY_UNET, *resume_halfway(diffusion_model, tmp_path)])
    assert_same_files("unet/diffusion_pytorch_model.safetensors", diffusion_model, tmp_path)
    assert_same_files("checkpoint-4/model.safetensors", diffusion_model, tmp_path)
    assert_same_files("log.jsonl", diffusion_model, tmp_path)


def test_a_resumed_classifier_run_with_dropout_and_accumulation_ends_with_the_same_bits(
    guided_pipeline: Path, classifier_flags: list[str], tmp_path: Path
) -> None:
    flags = [*TINY, *TINY_CLASSIFIER, *classifier_flags, *resume_halfway(guided_pipeline, tmp_path)]
    load_script("train_classifier").main(flags)
    assert_same_files("classifier/diffusion_pytorch_model.safetensors", guided_pipeline, tmp_path)
    assert_same_files("log.jsonl", guided_pipeline, tmp_path)
    assert_same_files("accuracy.json", guided_pipeline, tmp_path)


def test_the_diffusion_script_saves_a_moving_average_that_diffusers_samples(diffusion_model: Path) -> None:
    pipe = DDPMPipeline.from_pretrained(diffusion_model)
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe.unet.config.down_block_types == ["DownBlock2D", "AttnDownBlock2D"]
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    last = UNet2DModel.from_config(pipe.unet.config)
    last.load_state_dict(load_file(diffusion_model / "checkpoint-4" / "model.safetensors"))
    assert not torch.equal(last.conv_in.weight, pipe.unet.conv_in.weight)
    steps = [json.loads(line) for line in (diffusion_model / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["lr"] for line in steps] == pytest.approx(
        [0.0, 1e-3, 0.75e-3, 0.25e-3]
    )  # a step up, then a half cosine


def test_the_classifier_script_saves_a_guided_pipeline_and_its_accuracy(guided_pipeline: Path) -> None:
    pipe = ClassifierGuidedPipeline.from_pretrained(guided_pipeline)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.classifier.config.noise_schedule["beta_schedule"] == "squaredcos_cap_v2"
    assert pipe.classifier.id2label[7] == "7"
    assert pipe(["7", "1"], num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 8)
    rows = json.loads((guided_pipeline / "accuracy.json").read_text())
    assert [row["timestep"] for row in rows] == list(range(0, 1000, 100))
    assert all(0 <= row["accuracy"] <= 1 and row["cross_entropy"] > 0 for row in rows)


def test_a_second_stage_fits_the_gradient_from_an_earlier_classifier(
    guided_pipeline: Path, diffusion_model: Path, tmp_path: Path
) -> None:
    flags = ["--diffusion_model", str(diffusion_model), "--init_classifier", str(guided_pipeline / "classifier")]
    weights = ["--guided_denoising_weight", "1", "--classification_weight", "0"]
    load_script("train_classifier").main([*TINY, *flags, *weights, "--output_dir", str(tmp_path)])
    before, after = (
        NoisyClassifier.from_pretrained(folder, subfolder="classifier") for folder in (guided_pipeline, tmp_path)
    )
    assert after.config.model_channels == before.config.model_channels
    assert after.config.dropout == 0
    assert not torch.equal(before.time_embed[0].weight, after.time_embed[0].weight)


def test_the_classifier_script_needs_no_diffusion_model(tmp_path: Path) -> None:
    flags = [*TINY, *TINY_CLASSIFIER, "--num_train_timesteps", "100", "--mixed_precision", "no"]
    load_script("train_classifier").main([*flags, "--output_dir", str(tmp_path)])
    classifier = NoisyClassifier.from_pretrained(tmp_path)
    assert classifier.config.noise_schedule["num_train_timesteps"] == 100
    assert classifier(torch.zeros(2, 1, 8, 8), 3).logits.shape == (2, 10)
