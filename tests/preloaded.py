"""Programs of tests in processes whose imports, which take longer than they do, were made once."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

from conftest import watchdog

#: Imports the modules that its arguments name; then forks for every program that it reads. A fork
#: leaves the loop, and runs and ends as ``python -c`` does.
SERVER = """
import importlib, json, os, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
code = ""
while line := requests.readline():
    task = json.loads(line)
    child = os.fork()
    if child:
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n")
        answers.flush()
        continue
    os.close(requests.fileno())
    os.close(answers.fileno())
    for number, file in enumerate([os.devnull, *task["files"]]):
        os.dup2(os.open(file, os.O_WRONLY if number else os.O_RDONLY), number)
    os.chdir(task["folder"])
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.argv = ["-c", *task["arguments"]]
    code = task["code"]
    break
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


class Preloaded:
    """A process that has imported modules; it starts in ``folder``, with ``options`` of Python.

    The imports of a program find its own folder first, as those of ``python -c`` do.
    """

    def __init__(self, files, *modules, folder, options=(), environment=None):
        self.files = [files / name for name in ("stdout", "stderr")]
        self.server = subprocess.Popen(
            [sys.executable, *options, "-c", SERVER, *modules],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.communicate()

    def run(self, code, *arguments, folder, environment=None):
        """Run a program; returns its exit code and its output, as `subprocess.run` does."""
        for file in self.files:
            file.write_text("")
        task = {"code": code, "arguments": arguments, "folder": str(folder)}
        task |= {"files": [*map(str, self.files)], "environment": environment or {**os.environ}}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        everything = SimpleNamespace(kill=lambda: os.killpg(self.server.pid, signal.SIGKILL))
        with watchdog(everything):
            answer = self.server.stdout.readline()
        assert answer, "the process has ended"
        out, err = (file.read_text() for file in self.files)
        return subprocess.CompletedProcess([*arguments], int(answer), out, err)
