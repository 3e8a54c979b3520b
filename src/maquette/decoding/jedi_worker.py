"""A process that answers completions with jedi, one JSON line per question.

It is run by path and imports nothing of this library, so that it starts fast. A process of its
own is the only place where an analysis can be cut off in time, and where modules that the
analyser imports do no harm.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def names(jedi: Any, parso: Any, project: Any, environment: Any, ask: dict[str, Any]) -> list[str]:
    """Completions at the end of the text, and with what is open closed behind the cursor."""
    text, closers = ask["text"], ask["closers"]
    lines = parso.split_lines(text)
    found: set[str] = set()
    for code in [text, text + closers] if closers else [text]:
        script = jedi.Script(code, path=ask["path"], project=project, environment=environment)
        for completion in script.complete(len(lines), len(lines[-1])):
            if completion.type != "keyword" and completion.name.isidentifier():
                found.add(completion.name)
    return sorted(found)


def main() -> None:
    # Imported modules may print: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import jedi
    import parso

    folder = sys.argv[1] if len(sys.argv) > 1 else None
    project = jedi.Project(folder or os.getcwd(), smart_sys_path=folder is not None)  # noqa: PTH109
    environment = jedi.InterpreterEnvironment()
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {
                "names": names(jedi, parso, project, environment, json.loads(line))
            }
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
