"""Progress of long steps: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Shows how far one long step is; use as a context manager.

    On a terminal a tqdm bar; elsewhere, to keep logs short, a line at the start, every `every` seconds and at the end.
    """

    def __init__(self, label: str, every: float = 15.0):
        self.label, self.every = label, every
        self._bar: tqdm | None = None
        self._tty = sys.stderr.isatty()
        self._started = self._printed = time.monotonic()
        self._done, self._total, self._text = 0, 0, ""

    def __enter__(self) -> "Progress":
        if not self._tty:
            print(f"{self.label} ...", file=sys.stderr, flush=True)
        return self

    def __call__(self, done: int, total: int, text: str = "") -> None:
        self._done, self._total, self._text = done, total, text
        if self._tty:
            if self._bar is None:
                self._bar = tqdm(total=total, desc=self.label, leave=False, dynamic_ncols=True)
            self._bar.total = total  # a run may find its own end
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._printed >= self.every:
            self._printed = time.monotonic()
            left = (self._printed - self._started) * (total - done) / max(done, 1)
            print(f"{self.label}: {done}/{total} {text} ({left:.0f} s left)", file=sys.stderr, flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            took = time.monotonic() - self._started
            print(f"{self.label}: done in {took:.1f} s {self._text}".rstrip(), file=sys.stderr, flush=True)
