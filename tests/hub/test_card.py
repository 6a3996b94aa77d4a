"""Model cards, and what goes to the Hub: the client is replaced at its boundary, so nothing leaves the machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard
from jsonargparse.typing import PositiveInt

from hfdiff import NoisyClassifier
from hfdiff.data.labelled import LabelledImages
from hfdiff.hub import repository as hub
from hfdiff.training import card
from hfdiff.training.config import TrainingSettings, parse_settings

DATA = LabelledImages(torch.zeros(1234, 3, 16, 16), torch.zeros(1234, dtype=torch.int64), ["cat", "dog"])


@dataclass(kw_only=True)
class SomeSettings(TrainingSettings):
    """Settings with a tuple.

    Args:
        widths: some numbers.
    """

    widths: tuple[PositiveInt, ...] = (8, 16)


def write(folder: Path, **changes: Any) -> ModelCard:
    arguments = {
        "title": "A title",
        "settings": SomeSettings(dataset_name="someone/some-images", seed=7),
        "data": DATA,
        "numbers": [card.Measurement("accuracy", 0.98765, "500 unseen images")],
        "usage": "import hfdiff",
        "tags": ["ddpm"],
    }
    card.write_card(folder, **{**arguments, **changes})
    return ModelCard.load(folder / "README.md")


def test_a_card_states_data_numbers_seed_versions_and_use(tmp_path: Path) -> None:
    text = write(tmp_path).text
    assert "`someone/some-images`: 1,234 colour images of 16×16 pixels in 2 classes: cat, dog." in text
    assert "| accuracy | 0.9877 | 500 unseen images |" in text
    assert f"Seed 7, Python 3.{torch.sys.version_info.minor}" in text
    assert f"torch {torch.__version__}" in text
    assert "```python\nimport hfdiff\n```" in text


def test_its_metadata_is_the_hubs(tmp_path: Path) -> None:
    metadata = write(tmp_path).data.to_dict()
    assert metadata == {
        "library_name": "hfdiff",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddpm"],
        "datasets": ["someone/some-images"],
    }
    for local in ("digits", str(tmp_path)):
        assert "datasets" not in write(tmp_path, settings=SomeSettings(dataset_name=local)).data.to_dict()


def test_its_recipe_is_that_of_the_run(tmp_path: Path) -> None:
    settings = parse_settings(SomeSettings, ["--widths", "[4,8]", "--mixed_precision", "no", "--learning_rate", "8e-4"])
    recipe = write(tmp_path, settings=settings).text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe)["widths"] == [4, 8]
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert parse_settings(SomeSettings, ["--config", str(tmp_path / "recipe.yaml")]) == settings


def test_a_card_without_numbers_or_labels_says_so(tmp_path: Path) -> None:
    text = write(tmp_path, numbers=[], data=LabelledImages(torch.zeros(5, 1, 8, 8), None, [])).text
    assert "5 grey images of 8×8 pixels, without labels." in text
    assert "None were measured." in text


# --- the Hub ---------------------------------------------------------------------------------------------------------


class StubApi:
    """The Hub's client, which notes its calls."""

    role = "write"
    calls: ClassVar[list] = []

    def __init__(self, token: str | bool | None = None) -> None:
        pass

    def whoami(self) -> dict[str, Any]:
        return {"name": "somebody", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo_id: str, exist_ok: bool, **arguments: Any) -> Any:
        self.calls.append(("create_repo", repo_id, exist_ok))
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **arguments: Any) -> Any:
        self.calls.append(("create_commit", repo_id, [operation.path_in_repo for operation in operations]))
        return type("Commit", (), {"pr_url": None, "commit_url": "address"})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[StubApi]:
    monkeypatch.setattr(StubApi, "calls", [])
    monkeypatch.setattr(hub, "HfApi", StubApi)
    return StubApi


@pytest.fixture
def model(tmp_path: Path) -> Path:
    NoisyClassifier(8, 1, 10, model_channels=8, num_head_channels=8, norm_num_groups=4).save_pretrained(tmp_path)
    write(tmp_path)
    return tmp_path


def test_the_repository_is_made_before_the_training_and_named_like_the_output(api: type[StubApi]) -> None:
    assert card.find_repository(SomeSettings(output_dir="out/some-run")) is None
    assert api.calls == []
    assert card.find_repository(SomeSettings(output_dir="out/some-run/", push_to_hub=True)) == "somebody/some-run"
    named = SomeSettings(output_dir="out/run", push_to_hub=True, hub_model_id="team/model")
    assert card.find_repository(named) == "team/model"
    assert api.calls == [("create_repo", "somebody/some-run", True), ("create_repo", "team/model", True)]


def test_a_token_that_may_not_write_is_refused(api: type[StubApi], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "role", "read")
    with pytest.raises(ValueError, match=r"push_to_hub.*may only read.*hf auth login"):
        card.find_repository(SomeSettings(push_to_hub=True))
    assert api.calls == []


def test_without_a_token_the_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push_to_hub.*[Tt]oken.*hf auth login") as error:
        card.find_repository(SomeSettings(push_to_hub=True))
    assert "\n" not in str(error.value)


def test_a_failed_upload_says_where_the_model_is(
    api: type[StubApi], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    def fail(self: StubApi, *arguments: Any, **named: Any) -> None:
        raise RuntimeError("the line is cut\nonce more")

    monkeypatch.setattr(api, "create_commit", fail)
    with pytest.raises(ConnectionError, match=rf"{model}.*team/model.*the line is cut once more. Try"):
        card.publish(model, "team/model")


def test_checkpoints_and_logs_stay_at_home(api: type[StubApi], model: Path) -> None:
    sent = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "noise_levels.csv", "samples.png"]
    rest = ["checkpoint-10/model.safetensors", "checkpoint-10/manifest.json", "logs/hfdiff/events.out", "log.jsonl"]
    rest += ["validation.jsonl", "checkpoint-20.partial/model.safetensors", "model.partial/unet/config.json"]
    for name in [*sent[3:], *rest, "samples/step-100.png"]:
        path = model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    card.publish(model, "team/model")
    assert api.calls[-1] == ("create_commit", "team/model", [*sent[:4], "samples/step-100.png", sent[4]])
