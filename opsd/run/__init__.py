"""What every training run needs, whatever its method: flags, data sets, checks, checkpoints, start and end."""

from opsd.run.quiet import silence_libraries

silence_libraries()  # before any library is imported that says something then
