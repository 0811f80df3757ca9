"""On-policy self-distillation: what the training programs and the trainer at the root are built from."""
