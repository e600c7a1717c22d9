"""``python -m tools.python_sandbox_parts.probe`` says in a line of JSON which isolation is reached here; for ``mmrl doctor``."""

from __future__ import annotations

import json
import statistics
import time

from mmrl.errors import MMRLError
from tools.python_sandbox import PythonSandbox
from tools.python_sandbox_parts.shell import MEANING

CALLS = 10


def outcome() -> tuple[bool, str]:
    try:
        sandbox = PythonSandbox(PythonSandbox.Config())
    except MMRLError as error:
        return False, str(error)
    times = []
    for _ in range(CALLS):
        time.sleep(0.1)  # a model thinks before it calls
        started = time.perf_counter()
        result = sandbox.run("6 * 7")
        times.append(time.perf_counter() - started)
        if result.text != "42":
            return False, f"6 * 7 gave {result.text}"
    return True, f"{MEANING[sandbox.level]}; {1e3 * statistics.median(times):.1f} ms a call"


def main() -> None:
    ok, detail = outcome()
    print(json.dumps({"ok": ok, "detail": detail}))


if __name__ == "__main__":
    main()
