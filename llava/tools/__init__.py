"""Tools that turn one checkpoint folder into another: to and from transformers' LLaVA-NeXT, and an adapter into a whole model."""
