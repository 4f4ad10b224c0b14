"""LLaVA's place for the projector."""
