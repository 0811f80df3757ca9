"""What every training run needs, whatever its method: flags, data sets, checks, checkpoints, start and end."""
