"""The training loop: accumulation, epochs, what the monitor sees and leaves alone, and what is refused."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from diffusers import UNet2DModel
from safetensors.torch import load_file
from tiny_training import TinyModel, loss, make_batches
from torch import nn

from hfdiff.data.process import run_script
from hfdiff.training import log as training_log
from hfdiff.training.batches import Batch
from hfdiff.training.config import TrainingSettings
from hfdiff.training.log import choose_tracker
from hfdiff.training.loop import (
    choose_precision,
    count_steps,
    enable_gradient_checkpointing,
    make_accelerator,
    train,
    update,
)


def settings_of(folder: Path, **changes: object) -> TrainingSettings:
    defaults = {"max_train_steps": 6, "train_batch_size": 4, "report_to": "none", "lr_warmup_steps": 0}
    return TrainingSettings(output_dir=str(folder), **{**defaults, **changes})


def run(settings: TrainingSettings, accelerator: Accelerator | None = None, **options: object) -> TinyModel:
    accelerator = accelerator or make_accelerator(settings)
    torch.manual_seed(settings.seed)
    model = TinyModel()
    if monitor := options.pop("monitor", None):
        options["monitor"] = lambda step: monitor(step, model)
    train(settings, accelerator, model, make_batches(settings), loss, **options)
    return model


def test_accumulated_batches_take_one_step_along_their_mean_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = [Batch(torch.full((1, 1), value), *[torch.empty(0)] * 3) for value in (1.0, 3.0)]
    value = update(accelerator, model, optimizer, lambda model, batch: model(batch.x0).sum(), batches, 10.0)
    assert value.item() == 2.0
    assert model.weight.item() == pytest.approx(1 - 0.1 * 2.0)


def test_epochs_are_counted_in_steps() -> None:
    for epochs, accumulation, steps in ((1, 1, 4), (3, 1, 12), (3, 5, 3)):  # 4 batches an epoch
        settings = TrainingSettings(num_epochs=epochs, gradient_accumulation_steps=accumulation)
        assert count_steps(settings, range(4)).max_train_steps == steps
    assert count_steps(TrainingSettings(max_train_steps=7), range(4)).max_train_steps == 7


def test_the_monitor_sees_the_moving_average_and_does_not_disturb_the_training(tmp_path: Path) -> None:
    seen = {}

    def monitor(step: int, model: TinyModel) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(1000)
        seen[step] = {name: weight.clone() for name, weight in model.state_dict().items()}
        return {"answer": 42.0}

    quiet = run(settings_of(tmp_path / "quiet"))
    watched = run(settings_of(tmp_path / "watched", validation_steps=4, checkpointing_steps=4), monitor=monitor)
    for name, weight in quiet.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name])
    assert list(seen) == [4, 6]
    average = load_file(tmp_path / "watched" / "checkpoint-4" / "average.safetensors")
    weights = load_file(tmp_path / "watched" / "checkpoint-4" / "model.safetensors")
    for name, weight in seen[4].items():
        assert torch.equal(weight, average[name])
        assert not torch.equal(weight, weights[name])
    expected = '{"step": 4, "answer": 42.0}\n{"step": 6, "answer": 42.0}\n'
    assert (tmp_path / "watched" / "validation.jsonl").read_text() == expected


def test_without_an_average_the_weights_themselves_are_published(tmp_path: Path) -> None:
    model = run(settings_of(tmp_path, use_ema=False))
    for name, weight in load_file(tmp_path / "checkpoint-6" / "model.safetensors").items():
        assert torch.equal(weight, model.state_dict()[name])
    assert not (tmp_path / "checkpoint-6" / "average.safetensors").exists()


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    plain = run(settings_of(tmp_path / "plain"))
    settings = settings_of(tmp_path / "compiled")
    compiled = run(settings, Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager")))
    for folder in ("plain", "compiled"):
        for name in ("model", "average"):
            tensors = load_file(tmp_path / folder / "checkpoint-6" / f"{name}.safetensors")
            assert tensors.keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, compiled.state_dict()[name])


def test_gradient_checkpointing_needs_a_model_that_has_it() -> None:
    with pytest.raises(ValueError, match=r"gradient_checkpointing.*TinyModel.*leave it out"):
        enable_gradient_checkpointing(TinyModel())
    unet = UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    enable_gradient_checkpointing(unet)
    assert unet.is_gradient_checkpointing


def test_tensorboard_is_the_default_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_log, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert [choose_tracker(name) for name in (None, "none", "wandb")] == ["tensorboard", None, "wandb"]
    monkeypatch.setattr(training_log, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"report_to.*'none'.*tensorboard"):
        choose_tracker("tensorboard")
    make_accelerator(settings_of(tmp_path, report_to=None))
    assert capsys.readouterr().out.count("\n") == 1


def test_the_trackers_write_to_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(settings_of(tmp_path, report_to="tensorboard", logging_steps=2))
    assert list((tmp_path / "logs").rglob("events.*"))


@pytest.mark.parametrize(
    "error", [ValueError("`a` must be b."), OSError(28, "No space left"), FloatingPointError("nan")]
)
def test_errors_of_the_user_or_the_machine_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match="1"):
        run_script(main, "train.py")
    assert capsys.readouterr().err.partition("error: ")[2] == f"{error}\n"


def test_errors_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0, "train.py")


@pytest.mark.parametrize(("fast", "expected"), [(torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_precision_is_chosen_by_hardware_where_that_is_asked(
    fast: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfdiff.training.loop.fastest_dtype", lambda device: fast)
    assert choose_precision("auto") == expected
    for given in (None, "no", "bf16", "fp16"):
        assert choose_precision(given) == given
