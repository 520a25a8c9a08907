"""The errors fastvkd shows to a user: one line naming what was found, where, and how to mend it.

Every command catches `FastVKDError`, prints it on one line and exits with code 2. A programming error is never one.
"""

import errno
import re


def printable(text: str) -> str:
    """A text with every character that a terminal would obey, or that would break the line, written as its escape."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class FastVKDError(Exception):
    """An input, setting or environment that the user can mend. The message is one line, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingsError(FastVKDError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(FastVKDError):
    """A data file, row or image cannot be used."""


class ModelError(FastVKDError):
    """A model folder or family cannot be used, or a site does not exist in it."""


class TrainingError(FastVKDError):
    """Training cannot go on: a loss that is not finite, no space on disk, an empty forget set."""


class AlreadyForgotten(FastVKDError):
    """Whom a run is to make a model forget was forgotten by earlier requests: there is nothing to do, and no error."""


class Terminated(BaseException):
    """SIGTERM came. No handler of errors takes it for one; what is open is closed on the way out."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error of another library says, on one line, without the addresses of objects in memory."""
    text = re.sub(r"<?_?io\.BytesIO object at 0x[0-9a-fA-F]+>?", "these bytes", " ".join(str(error).split()))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)[:limit] or type(error).__name__


def gpu_memory_is_full(error: BaseException) -> bool:
    """Whether a GPU had no memory left: torch's own error, or what CUDA or cuBLAS said.

    torch is not imported to ask for it: most commands that fail never needed it.
    """
    said = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in said)


def host_memory_is_full(error: BaseException) -> bool:
    """Whether the machine itself had no memory left, as Python says it or torch's allocator."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def disk_is_full(error: BaseException) -> bool:
    """Whether writing failed for want of space, of quota, or at a limit on the size of a file.

    safetensors reports the system's error as text alone.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
