"""What runs in another process: an engine over any server with OpenAI's API (`openai_engine.py`), and the web page's client.

It knows the protocol, the APIs' fields and the wire. It knows no model: prompts and images are passed on as clients sent them, since only
the server behind has the model.
"""
