"""Measures of models and of generated images."""

from ..data.image_source import ImageSource, images_in_memory, open_images
from ..sampling.opening import open_pipeline
from ..sampling.sample_files import draw_samples, join_processes
from ..sampling.sampler import Sampler
from ..sampling.settings import SamplingSettings
from .accuracy import ClassAccuracy, class_accuracy
from .bits_per_dim import BitsPerDim, bits_per_dim, spread_timesteps
from .evaluate import Evaluator, evaluate
from .feature_set import Reference, compute_statistics, open_reference
from .features import ImageFeatures, ModuleFeatures, load_features
from .inception_score import inception_score
from .kernel_distance import kernel_inception_distance
from .metric_set import EvaluationSettings
from .metrics import frechet_distance, frechet_distance_infinity
from .noise_levels import NoiseBucket, evaluate_noise_levels, expected_calibration_error
from .precision_recall import PrecisionRecall, precision_recall
from .statistics import FeatureStatistics, RunningStatistics, feature_statistics, load_statistics, save_statistics
from .sweep import SweepTable, sweep, sweep_points

__all__ = [
    "BitsPerDim",
    "ClassAccuracy",
    "EvaluationSettings",
    "Evaluator",
    "FeatureStatistics",
    "ImageFeatures",
    "ImageSource",
    "ModuleFeatures",
    "NoiseBucket",
    "PrecisionRecall",
    "Reference",
    "RunningStatistics",
    "Sampler",
    "SamplingSettings",
    "SweepTable",
    "bits_per_dim",
    "class_accuracy",
    "compute_statistics",
    "draw_samples",
    "evaluate",
    "evaluate_noise_levels",
    "expected_calibration_error",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_infinity",
    "images_in_memory",
    "inception_score",
    "join_processes",
    "kernel_inception_distance",
    "load_features",
    "load_statistics",
    "open_images",
    "open_pipeline",
    "open_reference",
    "precision_recall",
    "save_statistics",
    "spread_timesteps",
    "sweep",
    "sweep_points",
]
