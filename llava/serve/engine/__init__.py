"""The embedded engine: from requests of `llava.serve.protocol` to tokens of a model in this process, many at a time.

It knows the protocol and the model, and nothing of HTTP, of clients or of other processes. `embedded.py` composes it: a request is
prepared (`prepare.py`), its images encoded and its granularity decided (`encode.py`), and its rows join a batch (`batch.py`) when there is
room (`scheduling.py`); what follows the model's logits stands in `logits.py`, `sampling.py`, `guides.py` and `scores.py`.
"""
