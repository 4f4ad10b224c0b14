"""Our front before a vLLM: images are encoded, routed and pooled in this process, and the language model runs in another one.

    request ─ prepare ─> ids ─ encode (batched, cached) ─> rows (T, D) per image ─ image_embeds ─> vLLM ─ token ids ─> events

`engine.py` composes it. `prompt.py` makes sure that the server reads the ids that we mean, `encode.py` makes the rows, `token_stream.py`
reads the answer, and `child.py` keeps a vLLM running where no address is given. It knows the model's front, the embedded engine's parts
and the backend's; the server is a stock vLLM with this project's plug-in, which holds the decoder layers and takes rows for images.
"""
