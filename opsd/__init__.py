"""The parts of OPSD: losses, teacher, rollouts, rewards, grading, and what a run needs around them."""
