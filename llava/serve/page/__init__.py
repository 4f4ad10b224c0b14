"""The web page: chat with pictures, what each answer cost, comparison, votes. It talks to a controller (or a worker) over HTTP only.

conversation.py  what was said: turns, pictures, replies, and the bodies of requests made of them
catalogue.py     which models there are, asked again when the list may have changed
log.py           votes and conversations as lines of JSON
render.py        replies, reports and errors as HTML and SVG
chat.py          what happens when a button is pressed
layout.py        the page's parts and which of them press which button (Gradio)
uploads.py       pictures coming in
flags.py         the flags of the programs that serve it
guard.py         what the page's server answers at all, and the headers it sends
app.py           all of it as one ASGI application
"""

import os

# Read by Gradio while it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
