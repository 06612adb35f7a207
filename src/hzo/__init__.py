"""hzo: train deep networks with forward passes only."""
