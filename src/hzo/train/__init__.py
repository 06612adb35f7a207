"""Training runs: data, models, the loop, checkpoints, plots. What the command line does, as functions."""
