"""The embedded engine: answers requests of `llava.serve.protocol` with a model in this process, with iteration-level batching.

It knows the protocol and the model. It knows nothing of HTTP, of APIs, of clients or of other processes. `embedded.py` composes it: a
request is prepared (`prepare.py`), its images are encoded and routed (`encode.py`), and when there is room (`scheduling.py`) its prompt is
prefilled into a slot of the running batch and decoded from there (`batch.py`, `slots.py`). `logits.py`, `guides.py` and `sampling.py` turn
logits into tokens, `scores.py` reports their log probabilities, `outbox.py` carries events to the callers, `caches.py` keeps features and
prefixes, and `failures.py` says what an exception means.
"""
