"""What every HTTP service of ours shares: a server, middleware, keys, limits on bodies and addresses, strict JSON, errors, metrics.

It knows the protocol's errors and limits, and neither models nor what a body means. `client.py` is the bounded client for calls between
our own processes.
"""
