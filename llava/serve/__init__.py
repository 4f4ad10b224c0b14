"""Serving: the programs. docs/Operating.md draws who talks to whom.

    __main__.py           a worker and the page in one process, for a laptop
    cli.py                a chat in the terminal (terminal.py)
    model_worker.py       one model over LLaVA's protocol and the OpenAI API
    sglang_worker.py      the same APIs for a model that another server runs: the bridge
    controller.py         forwards requests for many workers from one address
    gradio_web_server.py  the page: chat with served models in a browser

A program's module holds its flags and `main`; worker_flags.py has those that several share, protocol/ what an HTTP process and a model
exchange. What a program runs is in the subpackages and is imported once its flags are read: `--help` loads none of it.
"""
