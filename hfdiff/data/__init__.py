"""Pictures and labels as tensors; files that are whole or absent; what processes agree on."""
