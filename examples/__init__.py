"""Programs and verifiers to start from."""
