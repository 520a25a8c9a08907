"""What fastvkd knows of its process and machine."""

import subprocess
import sys

ENDS = """
import atexit
from fastvkd.environment import end_process

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
atexit.register(print, "exit handler")
print("all done")
end_process(3)
"""


def test_a_rank_ends_with_its_code_and_handlers_but_is_not_taken_apart() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout.split("\n") == ["all done", "exit handler", ""]
