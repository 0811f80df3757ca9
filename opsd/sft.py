"""The trainer of the SFT baseline."""

from trl import SFTTrainer

from opsd.adapters import AdapterTraining
from opsd.run.checkpoints import CompleteCheckpoints


class CompleteSFTTrainer(CompleteCheckpoints, AdapterTraining, SFTTrainer):
    """TRL's `SFTTrainer`, whose checkpoints are complete or not used, and which skips steps that are not finite."""
