"""The web page: chat about images, see what each answer cost, compare two models or granularities, and vote.

It knows a controller, or a worker, by its HTTP API alone, and Gradio; it knows no engine, no model and no torch. `app.py` composes it:
conversations are kept in `sessions.py`, what the controls do is in `chat.py` and what they look like in `layout.py`, `render.py` and
`style.py`; `guard.py` and `uploads.py` decide what reaches Gradio.
"""

import os

# Read by Gradio while it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
