"""The ledger of the reliability suite: what each case of a fault came to, one JSON line at a time.

`benchmarks/reliability.py` names the file by FASTVKD_LEDGER and adds the lines up. Elsewhere nothing is written.
"""

import json
import os


def note(fault: str, case: str, outcome: str, count: int = 1) -> None:
    """Add a line to the ledger. Lines of several processes never mix: each is one write at the file's end."""
    ledger = os.environ.get("FASTVKD_LEDGER")
    if not ledger:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "")  # by which its seconds are found
    line = json.dumps({"fault": fault, "case": case, "outcome": outcome, "count": count, "test": test}) + "\n"
    file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
