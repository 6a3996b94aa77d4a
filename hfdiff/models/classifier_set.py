"""Several classifiers of the same noisy images side by side: of the kind of thing, of its style, of its colour."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .noisy_classifier import NoisyClassifier, NoisyClassifierOutput


class ClassifierSet(ModelMixin, ConfigMixin):
    """log p(k | x_t) of each of several classifiers, one after the other.

    Args:
        classifiers: the config of a [`NoisyClassifier`] by name; None for another network, which [`join`] puts in.
    """

    @register_to_config
    def __init__(self, classifiers: dict[str, Any]) -> None:
        super().__init__()
        self.members = nn.ModuleDict()
        for name, config in classifiers.items():
            if config is not None:
                self.members[name] = NoisyClassifier.from_config(config)

    @classmethod
    def join(cls, classifiers: Mapping[str, nn.Module]) -> "ClassifierSet":
        """A set of classifiers that are there already, which it shares.

        Raises:
            ValueError: for none.
        """
        if not classifiers:
            raise ValueError("`classifier` must name at least one classifier, got an empty dictionary.")
        joined = cls({name: _settings(classifier) for name, classifier in classifiers.items()})
        joined.members.update(classifiers)
        return joined.train(next(iter(classifiers.values())).training)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves all of them, as of `ModelMixin`.

        Raises:
            ValueError: where some are no NoisyClassifier.
        """
        others = [name for name, config in self.config["classifiers"].items() if config is None]
        if others:
            raise ValueError(
                f"`classifier` can be saved where all are of hfdiff.NoisyClassifier, got others: {others}."
            )
        super().save_pretrained(*args, **kwargs)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[Tensor]:
        """Classifies noisy images.

        Returns:
            log-probabilities as logits, (B, ΣK), those of each classifier sum to 1.
        """
        parts = []
        for member in self.members.values():
            output = member(sample, timestep)
            logits = output if isinstance(output, Tensor) else output.logits
            parts.append(logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1))
        logits = torch.cat(parts, dim=-1)
        return NoisyClassifierOutput(logits=logits) if return_dict else (logits,)


def _settings(classifier: nn.Module) -> dict[str, Any] | None:
    """The arguments that make such a classifier."""
    if not isinstance(classifier, NoisyClassifier):
        return None
    return {name: value for name, value in classifier.config.items() if not name.startswith("_")}
