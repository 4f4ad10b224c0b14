"""What every HTTP service of ours shares: a server, middleware, API keys, limits on requests and bodies, strict JSON, errors, metrics.

It knows the protocol's errors and limits; it knows neither models nor endpoints: paths and the meaning of bodies are handed in. A request
meets these files in this order: `server.py` and `connections.py`, then `middleware.py`, whose `guard_app` stacks them all, with
`origins.py`, `keys.py`, `request_limiter.py` and `body_limits.py`, then `strict_json.py`; `errors.py` answers what any of them raises.
`client.py` is the other direction: bounded calls from one of our processes to another, to addresses that `addresses.py` allows.
"""
