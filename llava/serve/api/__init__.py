"""The APIs as data: OpenAI's and LLaVA's bodies read into calls, events written as answers, and the app of a worker over any engine.

It knows an engine only by `llava.serve.protocol`, and loads no model and no torch.
"""
