"""LLaVA's place for the vision tower."""
