"""One address for many workers: they register, send heartbeats and are probed, and each request is dispatched and relayed to one of them.

It knows workers by their addresses and by what they report, and trusts none of their text; it knows the APIs' bodies well enough to find
the model that is asked for and to explain a refusal. It knows no engine and no model, and keeps nothing on disk.
"""
