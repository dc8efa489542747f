"""train.py and test.py as processes of their own, without each of them importing torch anew.

A server process has imported everything and forks: a child is what `python train.py` is after its imports, with its
own process id, arguments, working folder and files for its output. `faults` is code that the child runs first.
"""

import atexit
import json
import os
import pwd
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HANGS = 600  # seconds after which what should long be over counts as hanging


class Process:
    """A running script."""

    def __init__(self, server: "Server", pid: int, folder: Path):
        self.server, self.pid, self.folder, self.returncode = server, pid, folder, None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = HANGS) -> int:
        """Until it ends."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"still running: {self.stderr}"
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:  # only ever a child of the server that has not been waited for
            os.kill(self.pid, signum)

    def wait_for(self, text: str, path: Path, timeout: float = HANGS) -> None:
        """Until `text` stands in the file at `path`."""
        end = time.monotonic() + timeout
        while not (path.exists() and text in path.read_text(encoding="utf-8", errors="replace")):
            assert self.poll() is None, f"it ended before {text}: {self.stderr}"
            assert time.monotonic() < end, f"no {text} in {path}"
            time.sleep(0.002)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")


class Server:
    """The process that forks, and a folder for what the scripts print."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)
        self.folder, self.count = tempfile.TemporaryDirectory(), 0

    def ask(self, **command: Any) -> Any:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server has ended: the scripts cannot be imported"
        return json.loads(answer)

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


@cache
def _server() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


def start(script: str, *flags: str, cwd: Path, stdin: str = "", faults: str = "", user: str | None = None) -> Process:
    """Start a script. user: run it as this one, when the tests run as root."""
    server = _server()
    server.count += 1
    folder = Path(server.folder.name) / str(server.count)
    folder.mkdir()
    (folder / "stdin").write_text(stdin, encoding="utf-8")
    command = {"script": script, "flags": flags, "cwd": str(cwd), "out": str(folder), "faults": faults, "user": user}
    return Process(server, server.ask(start=command), folder)


def run(script: str, *flags: str, timeout: float = HANGS, **options: Any) -> Process:
    """Start a script and wait for its end."""
    process = start(script, *flags, **options)
    process.wait(timeout)
    return process


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import encodings.utf_8_sig  # noqa: F401  another user may not read where Python is installed

    import train  # noqa: F401  the scripts' imports

    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            answer = os.fork() or _be_the_script(**command["start"])
        else:
            pid, status = os.waitpid(command["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _be_the_script(script: str, flags: list[str], cwd: str, out: str, faults: str, user: str | None) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(f"{out}/{name}", os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for number, mode in enumerate("rww")
        )
        os.chdir(cwd)
        if user:
            entry = pwd.getpwnam(user)
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [script, *flags]
        exec(faults, {})
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
