"""The APIs: bodies of OpenAI's API and of LLaVA's worker protocol parsed into requests, events written as answers, and a worker's app.

It knows an engine only by the interface in `llava.serve.protocol`: no model, no torch, no other server. Controllers know it too, because
they parse requests as a worker does. Start at `endpoints.py`, the table of endpoints; each `openai_*.py` and `llava.py` is one API as data,
`*_fields.py` what several of them share, `request_handler.py` the way from a body to its answer, `worker_app.py` the app around that.
"""
