"""Networks and pipelines of 8 pixels and three classes with random weights."""

import diffusers
import torch

from hfdiff import ClassifierGuidedPipeline, DDPMScheduler, NoisyClassifier

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 3,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "attention_downsamples": (2,),
    "num_head_channels": 16,
    "norm_num_groups": 8,
}
CLASSIFIER = {
    **SMALL,
    "id2label": {0: "cat", 1: "dog", 2: "fox"},
    "noise_schedule": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
}
# An untrained network that predicts v leaves x_t about unit normal, so few pixels are clipped.
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def make_pipeline(channels: int = 1, **unet) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **unet,
    )
    classifier = NoisyClassifier(**CLASSIFIER)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = DDPMScheduler(**SCHEDULE, variance_type="learned_range" if channels == 2 else "fixed_small")
    pipe = ClassifierGuidedPipeline(model.eval(), classifier.eval(), scheduler, default_guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_judge():
    """A classifier of grey images of 8 pixels, in three classes, with random weights."""
    return NoisyClassifier(
        sample_size=8, in_channels=1, num_classes=3, model_channels=8, channel_mult=(1,), norm_num_groups=4,
        num_head_channels=8, attention_downsamples=()
    )  # fmt: skip
