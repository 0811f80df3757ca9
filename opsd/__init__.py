"""On-policy self-distillation: the rooms behind the programs at the root."""
