"""Engines that live in another process: an engine over any server with OpenAI's API, and the client that the web page asks with.

It knows the protocol and the wire; prompts and images travel as clients sent them, since only the server behind has the model.
"""
