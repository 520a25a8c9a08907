"""Commands of fastvkd as processes that start at once, each with a fault at a chosen moment.

This file is also the server behind `Server`: it imports what a command needs, and then forks a process for each.

A *point* is a moment at which a command is about to change a watched folder: to open a file for writing, or to make,
rename or remove something. Points are counted from 1 within a command. Between two of them nothing changes but the
content of a file that is open already, and `torn` ends a process within such a write.
"""

import ctypes
import errno
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
_CLONE_NEWNS = 0x00020000


@dataclass(frozen=True)
class Fault:
    """What happens to a command.

    kind: `kill` is SIGKILL at point `at`, `term` is SIGTERM there; with `after` seconds instead of a point the signal
    comes then, whatever the command does. `torn` is a kill within the first write after the point that goes beyond
    `room` bytes more than the file has by then. `full` is a disk on which from the point on no file can be made, or,
    with `room`, none can get more than so many bytes more than the point's file has by then.
    """

    kind: Literal["kill", "term", "torn", "full"]
    at: int = 0
    after: float | None = None
    room: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, or minus the signal; what it printed; the points that it passed."""

    code: int
    out: str
    err: str
    points: list[str]
    seconds: float

    @property
    def error(self) -> str:
        """The one line of an error that the user can mend."""
        assert self.code == 2, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("fastvkd: error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


class Server:
    """Runs commands one at a time, each in a process of its own. To be left as a context.

    disk: a folder that is to be a small disk of its own for all commands, where the system allows that (`has_disk`).
    """

    def __init__(self, disk: Path | None = None) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, __file__, *([] if disk is None else [str(disk)])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.given_disk = Path() if disk is None else disk  # the disk as commands see it
        self.has_disk = self._reply()["has_disk"]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the server of commands ended with {self._process.wait()}"
        reply: dict[str, Any] = json.loads(line)
        return reply

    def run(self, arguments: Sequence[str | Path], watched: Path, fault: Fault | None = None) -> Ended:
        """`fastvkd ARGUMENTS...`, or with `@name` as the first of them a function of `_OTHER`."""
        told = None if fault is None else fault.__dict__
        return Ended(**self._ask(arguments=[str(each) for each in arguments], watched=str(watched), fault=told))

    def together(self, commands: Sequence[Sequence[str | Path]], watched: Path) -> list[Ended]:
        """Several commands that begin at the same moment."""
        reply = self._ask(together=[[str(each) for each in one] for one in commands], watched=str(watched))
        return [Ended(**one) for one in reply["ended"]]

    def resize(self, size: int) -> None:
        """Give the disk so many bytes. What lies on it stays."""
        self._ask(size=size)

    @property
    def disk(self) -> Path:
        """The disk as this process sees it."""
        return Path(f"/proc/{self._process.pid}/root{self.given_disk}")


# --- within the server -----------------------------------------------------------------------------------------------


class _Points:
    """Counts the points of a command, and lets the fault happen."""

    def __init__(self, watched: Path, fault: Fault | None) -> None:
        self._watched, self._fault = f"{watched}{os.sep}", fault
        self.passed: list[str] = []
        self._full = False
        self._quiet = False

    def watch(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._pass(event, arguments[0], makes=bool(arguments[2] & os.O_CREAT))
        elif event in _CHANGES:
            path = arguments[0]
            if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # named within an open folder
                path = Path(os.readlink(f"/proc/self/fd/{arguments[1]}")) / os.fsdecode(path)
            self._pass(event, path, makes=event in ("os.mkdir", "os.link", "os.symlink"))

    def _pass(self, what: str, path: Any, makes: bool) -> None:
        if self._quiet or not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.abspath(os.fsdecode(path))
        if not f"{name}{os.sep}".startswith(self._watched):
            return
        if what == "os.mkdir" and os.path.isdir(name):  # that changes nothing
            return
        self.passed.append(f"{what} {name.removeprefix(self._watched)}")
        fault = self._fault
        if fault is not None and fault.after is None and len(self.passed) == fault.at:
            self._happen(fault, name)
        if self._full and makes and not os.path.lexists(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def _happen(self, fault: Fault, name: str) -> None:
        self._quiet = True
        size = os.path.getsize(name) if os.path.isfile(name) else 0
        self._quiet = False
        if fault.kind in ("kill", "term"):
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
        if fault.kind == "full" and fault.room is None:
            self._full = True
        if fault.kind == "torn":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if fault.kind in ("torn", "full"):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + (fault.room or 0), hard))


def _demo_data(world: str, folder: str) -> int:
    """Writes a world's pictures and questions as the demo writes what it has drawn."""
    from fastvkd.data import mllmu
    from fastvkd.data.jsonl import read_split
    from fastvkd.demo.data import write_photos

    for split in ("forget", "retain"):
        profiles = read_split(world, split)
        mllmu.write_split(folder, split, profiles)
        write_photos(Path(folder) / "photos", profiles)
    return 0


_OTHER = {"@demo-data": _demo_data}


def _child(arguments: list[str], points: _Points) -> int:
    from fastvkd import cli

    other = _OTHER.get(arguments[0])
    points.watch()
    if other is None:
        return cli.main(arguments)
    with _as_a_command():
        return other(*arguments[1:])
    return 2


@contextmanager
def _as_a_command() -> Iterator[None]:
    """Errors as the command line says them."""
    from fastvkd.errors import FastVKDError, disk_is_full

    try:
        yield
    except FastVKDError as error:
        print(f"fastvkd: error: {error}", file=sys.stderr)
    except OSError as error:
        if not disk_is_full(error):
            raise
        print(f"fastvkd: error: {error.filename}: no space left on disk", file=sys.stderr)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    fault = None if request["fault"] is None else Fault(**request["fault"])
    return _ended(_begin(request["arguments"], Path(request["watched"]), fault), fault)


@dataclass(frozen=True)
class _Begun:
    pid: int
    pipes: list[int]
    since: float


def _begin(arguments: list[str], watched: Path, fault: Fault | None) -> _Begun:
    pipes = [os.pipe() for _ in range(3)]  # its output, its errors, its points: no files, which a limit would end
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for descriptor, (_, write) in zip((1, 2), pipes, strict=False):
                os.dup2(write, descriptor)
            points = _Points(watched, fault)
            try:
                code = _child(arguments, points)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.write(pipes[2][1], json.dumps(points.passed).encode()[:60_000])
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            raise
        finally:
            os._exit(code)
    for _, write in pipes:
        os.close(write)
    return _Begun(pid, [read for read, _ in pipes], began)


def _ended(begun: _Begun, fault: Fault | None) -> dict[str, Any]:
    said = _read(begun.pipes, begun.pid, fault, begun.since)
    _, status = os.waitpid(begun.pid, 0)
    seconds = time.monotonic() - begun.since
    out, err, points = (text.decode(errors="replace") for text in said)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": out, "err": err, "points": json.loads(points or "[]"), "seconds": seconds}


def _read(descriptors: list[int], pid: int, fault: Fault | None, began: float) -> list[bytes]:
    """All that comes out of pipes, and meanwhile the signal whose time has come."""
    said = dict.fromkeys(descriptors, b"")
    due = None if fault is None or fault.after is None else began + fault.after
    with selectors.DefaultSelector() as ready:
        for descriptor in descriptors:
            ready.register(descriptor, selectors.EVENT_READ)
        while ready.get_map():
            waiting = None if due is None else max(0.0, due - time.monotonic())
            for key, _ in ready.select(waiting):
                data = os.read(key.fd, 1 << 16)
                said[key.fd] += data
                if not data:
                    ready.unregister(key.fd)
                    os.close(key.fd)
            if due is not None and time.monotonic() >= due and ready.get_map():
                assert fault is not None
                os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
                due = None
    return [said[descriptor] for descriptor in descriptors]


def _mount(disk: Path, size: int, *, again: bool) -> bool:
    options = f"{'remount,' if again else ''}size={size}"
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True).returncode == 0


def _own_disk(disk: Path) -> bool:
    """Whether a disk of this process's own could be mounted: root may, where it is allowed to at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
    return _mount(disk, 1 << 26, again=False)


def _serve(disk: Path | None) -> None:
    has_disk = disk is not None and _own_disk(disk)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but replies may come out where the replies do
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    torch.set_num_threads(1)
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava  # noqa: F401

    import fastvkd.attacks.run
    import fastvkd.cli
    import fastvkd.data.jsonl
    import fastvkd.data.mllmu
    import fastvkd.demo.data
    import fastvkd.evaluation.run
    import fastvkd.reporting
    import fastvkd.reporting.model_card
    import fastvkd.unlearning.loop  # noqa: F401

    def reply(**told: Any) -> None:
        print(json.dumps(told), file=replies, flush=True)

    reply(has_disk=has_disk)
    for line in sys.stdin:
        request = json.loads(line)
        if "size" in request:
            assert disk is not None
            reply(done=_mount(disk, request["size"], again=True))
        elif "together" in request:
            begun = [_begin(arguments, Path(request["watched"]), None) for arguments in request["together"]]
            reply(ended=[_ended(one, None) for one in begun])
        else:
            reply(**_run(request))
    os._exit(0)  # nothing is open, and taking torch apart takes seconds


if __name__ == "__main__":
    _serve(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
