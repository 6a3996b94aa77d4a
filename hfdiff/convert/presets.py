"""Flags of the published checkpoints of guided-diffusion and improved-diffusion, as their READMEs have them."""

from typing import NamedTuple


class Preset(NamedTuple):
    """A published checkpoint.

    Args:
        flags: of its model, diffusion, sampling and classifier.
        improved: whether it is of improved-diffusion, whose scripts have other defaults.
    """

    flags: str
    improved: bool = False


_ADM = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True "
    "--use_fp16 True --use_scale_shift_norm True "
)
_ADM_256 = "--image_size 256 --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
_LSUN = _ADM + _ADM_256 + "--class_cond False --timestep_respacing 1000 "
_COSINE_4000 = "--learn_sigma True --diffusion_steps 4000 --noise_schedule cosine --timestep_respacing 250 "
_BEDROOM = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
    "--rescale_learned_sigmas False --rescale_timesteps False --timestep_respacing 1000"
)
_IMAGENET_64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 " + _COSINE_4000
_CIFAR = "--image_size 32 --num_channels 128 --num_res_blocks 3 --dropout 0.3 " + _COSINE_4000

PRESETS = {
    "64x64": Preset(
        _ADM + "--class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine --num_channels 192 "
        "--num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True --classifier_depth 4 "
        "--classifier_scale 1.0 --timestep_respacing 250"
    ),
    "128x128": Preset(
        _ADM + "--class_cond True --image_size 128 --noise_schedule linear --num_channels 256 --num_heads 4 "
        "--num_res_blocks 2 --classifier_scale 0.5 --timestep_respacing 250"
    ),
    "256x256": Preset(_ADM + _ADM_256 + "--class_cond True --classifier_scale 1.0 --timestep_respacing 250"),
    "256x256_uncond": Preset(_ADM + _ADM_256 + "--class_cond False --classifier_scale 10.0 --timestep_respacing 250"),
    "512x512": Preset(
        _ADM + _ADM_256.replace("256 --noise", "512 --noise") + "--class_cond True --use_fp16 False "
        "--classifier_scale 4.0 --timestep_respacing 250"
    ),
    "lsun_bedroom": Preset(_LSUN + "--dropout 0.1"),
    "lsun_cat": Preset(_LSUN + "--dropout 0.1"),
    "lsun_horse": Preset(_LSUN + "--dropout 0.1"),
    "lsun_horse_nodropout": Preset(_LSUN + "--dropout 0.0"),
    "imagenet64_uncond_100M_1500K": Preset(_IMAGENET_64, improved=True),
    "imagenet64_uncond_vlb_100M_1500K": Preset(_IMAGENET_64 + "--use_kl True", improved=True),
    "imagenet64_cond_270M_250K": Preset(
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True --rescale_learned_sigmas False "
        "--rescale_timesteps False " + _COSINE_4000,
        improved=True,
    ),
    "cifar10_uncond_50M_500K": Preset(_CIFAR, improved=True),
    "cifar10_uncond_vlb_50M_500K": Preset(_CIFAR + "--use_kl True", improved=True),
    "lsun_uncond_100M_1200K_bs128": Preset(_BEDROOM, improved=True),
    "lsun_uncond_100M_2400K_bs64": Preset(_BEDROOM, improved=True),
}
