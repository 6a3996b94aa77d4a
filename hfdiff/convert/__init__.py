"""Converters of the original authors' checkpoints."""
