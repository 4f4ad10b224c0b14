"""Serving: the programs. docs/Serving.md draws who talks to whom.

    __main__.py           a worker and the page in one process, for a laptop
    cli.py                a chat in the terminal (terminal.py)
    model_worker.py       one model over LLaVA's protocol and the OpenAI API
    sglang_worker.py      the same for a model that another server runs: the bridge
    controller.py         many workers at one address
    gradio_web_server.py  the page

A program's module holds its flags and `main`; worker_flags.py has those that several share, protocol.py what an HTTP process and a model
exchange. What a program runs stands in the rooms and is imported once its flags are read: `--help` loads none of it.
"""
