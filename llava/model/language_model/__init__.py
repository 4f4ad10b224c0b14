"""Language model families: thin classes that mix the multimodal parts into transformers' own."""
