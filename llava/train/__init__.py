"""Training: four stages from a language model and a vision tower to a model that chooses its visual granularity."""
