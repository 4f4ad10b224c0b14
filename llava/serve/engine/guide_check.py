"""Whether a grammar can be built at all: a program of its own, since building a hostile one may take hours, all memory, or the process.

`guides.py` runs it by its path, isolated, with a JSON object in its input: `path` (where to import from), `grammar`, `limits` (those of
`LLParserLimits`) and `bytes` (memory at most). It writes what is wrong with the grammar, or nothing. Being killed by a signal also
counts as a refusal.
"""

import contextlib
import json
import resource
import sys
import threading

SECONDS = 1
"""Of computing, at most."""
STACK_BYTES = 1_000_000
"""Of the stack; less than the threads of a server have, so that what fits here fits there."""


def main() -> None:
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    from llguidance import LLMatcher, LLParserLimits

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.suppress(ValueError):  # macOS knows no such limit; that of the time bounds it there
        resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
    found: list[str] = []
    threading.stack_size(STACK_BYTES)
    checking = threading.Thread(
        target=lambda: found.append(LLMatcher.validate_grammar(asked["grammar"], limits=LLParserLimits(**asked["limits"])))
    )
    checking.start()
    checking.join()
    sys.stdout.write(found[0])


if __name__ == "__main__":
    main()
