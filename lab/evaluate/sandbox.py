"""Runs a model's code in a child process with limits, and says whether it passes its tests.

The child has an empty folder, no environment, few seconds, little memory, and a hook that forbids it files, processes and the
network. This stops accidents. It is no prison for code that wants to break out: run only answers of models you trust so far.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import tempfile
from typing import Any

import msgspec

from lab.corpus.manifest import CodeTask

SECONDS = 10.0
"""How long a child may take, with its start."""

_CHILD = r"""
import json, resource, sys, types
given = json.loads(sys.stdin.read())
for what, most in ((resource.RLIMIT_CPU, 5), (resource.RLIMIT_AS, 1 << 29), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (most, most))
write = sys.stdout.write
package, module = types.ModuleType(given["package"]), types.ModuleType(given["package"] + "." + given["module"])
package.__path__ = []
setattr(package, given["module"], module)
sys.modules.update({package.__name__: package, module.__name__: module})
exec(given["spec"], module.__dict__)
forbidden = ("open", "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "sys.settrace", "resource.")
def guard(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so")) and "w" not in str(arguments[1]):
        return  # an import of the standard library
    if event in ("os.listdir", "os.scandir"):
        return  # so is this
    if event.startswith(forbidden):
        raise PermissionError(event + " is forbidden here")
sys.addaudithook(guard)
names = {k: v for k, v in module.__dict__.items() if not k.startswith("__")}
exec(given["answer"], names)
done = 0
for case in given["cases"]:
    done += names[given["function"]](*case["arguments"]) == case["expected"]
write("\n" + given["secret"] + " " + str(done) + "\n")
"""
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def code_of(answer: str) -> str:
    """Return the code in an answer: its first fenced block, or all of it if it has none."""
    found = _BLOCK.search(answer)
    return answer if found is None else found[1]


def passes(task: CodeTask, answer: str, seconds: float = SECONDS) -> bool:
    """Run an answer's code against the task's tests; True if it passes all of them in time.

    Args:
        task: the task
        answer: what the model wrote
        seconds: how long it may take
    """
    # What an answer prints is not mistaken for the verdict.
    secret = secrets.token_hex(16)
    given: dict[str, Any] = {
        "package": task.package, "module": task.module, "spec": task.spec, "function": task.function,
        "answer": code_of(answer), "cases": msgspec.to_builtins(task.cases), "secret": secret,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-I", "-S", "-c", _CHILD], input=msgspec.json.encode(given), cwd=folder, env={},
                capture_output=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return f"\n{secret} {len(task.cases)}\n".encode() in done.stdout and done.returncode == 0
