"""The noise conditional score network, conditioned on the level by its normalisations (Song & Ermon 2019).

Time runs from clean to noisy: `timestep` t is the index of σ_t, and σ_0 = σ_min. (The original numbers its levels the
other way; its checkpoints are turned round by [`hfdiff.convert.ncsn.load_model`].)
"""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from .noise import geometric_sigmas
from .refinenet import RefineNet
from .score import ScoreOutput, as_levels, check_sample, level_indices, shrink_factor


class NCSNModel(ModelMixin, ConfigMixin):
    """Score network s(x, t) ≈ ∇ log p_σ(x) with an InstanceNorm++ of each noise level's own: NCSN.

    Reference: Song & Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, section 4.1
    and appendix A. The defaults are the network for CIFAR-10; MNIST's has 28 px, one channel and 64 `model_channels`.

    Args:
        sample_size: height and width of the images.
        in_channels: C, channels of the images.
        model_channels: base width; level i has `channel_mult[i] * model_channels` channels.
        channel_mult: one factor per level.
        dilations: of each level's convolutions; a level after the first halves height and width where it is 1.
        num_levels: L, number of noise levels.
        sigma_min: σ_0, in data units; the levels between it and σ_max are geometric.
        sigma_max: σ_{L-1}.
        trained_sigmas: σ_0 to σ_{L-1} themselves, ascending, where they are not geometric.
        nonlinearity: elu, relu, lrelu (slope 0.2) or swish.
        rescaled: the data are in [-1, 1] already; else they are in [0, 1] and the network maps them to 2x - 1.
        logit_transform: the data are logits, which the network takes as they are.

    `sigmas` holds the levels σ_0 < ... < σ_{L-1}, (L,), float32 whatever the weights are.

    Raises:
        ValueError: for an unknown nonlinearity, lists of different lengths, or sizes and levels out of their range.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        dilations: tuple[int, ...] = (1, 1, 2, 4),
        num_levels: int = 10,
        sigma_min: float = 0.01,
        sigma_max: float = 1.0,
        trained_sigmas: list[float] | None = None,
        nonlinearity: str = "elu",
        rescaled: bool = False,
        logit_transform: bool = False,
    ) -> None:
        super().__init__()
        widths = [mult * model_channels for mult in channel_mult]
        self.factor = shrink_factor(sample_size, widths, dilations)
        if trained_sigmas is None:
            self.sigmas = geometric_sigmas(sigma_min, sigma_max, num_levels).float()
        else:
            self.sigmas = as_levels(trained_sigmas, num_levels).float()
        self.net = RefineNet(in_channels, widths, dilations, nonlinearity, num_levels)

    def forward(self, sample: Tensor, timestep: Tensor | int, return_dict: bool = True) -> ScoreOutput | tuple[Tensor]:
        """Predicts the score.

        Args:
            sample: x_t = x_0 + σ_t ε, (B, C, H, W), x_0 in the config's range.
            timestep: t in [0, L), one for all or (B,).
            return_dict: return a [`ScoreOutput`] instead of a tuple.

        Returns:
            ∇ log p_σ(x_t), (B, C, H, W).

        Raises:
            ValueError: for a shape or a timestep that does not fit.
        """
        check_sample(sample, self.config.in_channels, self.factor)
        t = level_indices(timestep, sample, self.config.num_levels)
        centred = sample if self.config.rescaled or self.config.logit_transform else 2 * sample - 1
        score = self.net(centred.to(self.dtype), t)
        return ScoreOutput(sample=score) if return_dict else (score,)
