"""Training runs: data, models, the loop, checkpoints, plots. Everything the command line does, as
functions."""
