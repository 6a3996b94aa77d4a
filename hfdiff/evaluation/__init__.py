"""Measures of models and of generated images."""

from ..lazy import lazy_names

__all__ = lazy_names(
    __name__,
    {
        "..data.image_source": "ImageSource images_in_memory open_images",
        "..sampling.opening": "open_pipeline",
        "..sampling.sample_files": "draw_samples join_processes",
        "..sampling.sampler": "Sampler",
        "..sampling.settings": "SamplingSettings",
        ".accuracy": "ClassAccuracy class_accuracy",
        ".bits_per_dim": "BitsPerDim bits_per_dim spread_timesteps",
        ".copies": "Copies Neighbours copy_ratios copy_threshold measure_copies nearest_neighbours share_of_copies",
        ".evaluate": "Evaluator evaluate",
        ".feature_set": "Reference compute_statistics open_reference",
        ".features": "ImageFeatures ModuleFeatures",
        ".guidance_information": "GuidanceInformation guidance_information plot_guidance_information",
        ".inception_score": "inception_score",
        ".kernel_distance": "clip_maximum_mean_discrepancy kernel_inception_distance",
        ".metrics": "frechet_distance frechet_distance_infinity",
        ".neighbours": "plot_neighbours",
        ".networks": "load_features",
        ".noise_levels": "NoiseBucket evaluate_noise_levels expected_calibration_error",
        ".precision_recall": "DensityCoverage PrecisionRecall density_coverage precision_recall",
        ".settings": "EvaluationSettings",
        ".statistics": "FeatureStatistics RunningStatistics feature_statistics load_statistics save_statistics",
        ".sweep": "SweepTable sweep sweep_points",
    },
)
