"""The larger commands of `hfdiff`, one per file."""
