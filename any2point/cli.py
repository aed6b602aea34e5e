"""The command `any2point`: demo, train, eval, predict, convert, sources, bench, info.

Mistakes of the user end in one line on stderr and exit code 2 (where files are missing, the tree that is
expected follows); ANY2POINT_DEBUG=1 shows where they arose.
Ctrl-C ends with 130. torch and the rest are imported by the command that needs them, so that --help and info
are quick.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: without the program's name; `sys.argv` by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that wait spin for so many turns before they sleep. OpenMP's own choice, 300,000, makes a step
    # up to a hundred times slower when another process wants the cores; this one costs nothing when none
    # does.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    with warnings.catch_warnings():
        warnings.showwarning = _warn  # type: ignore[assignment]
        return _main(given)


def _main(given: list[str]) -> int:
    try:
        if given[:1] == ["info"]:  # has to run where nothing else is installed
            from any2point.info import main as info

            return info(given[1:])
        try:
            from any2point.commands import app
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("any2point"):
                raise
            return _fail(f"the command line needs {error.name}: pip install 'any2point[train]'")
        return app(given)
    except KeyboardInterrupt as error:
        _say("interrupted", error)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("ANY2POINT_DEBUG"):
            raise
        text, _, tree = str(error).partition("\n\n" if isinstance(error, FileNotFoundError) else "\0")
        line = " ".join(text.split()) or type(error).__name__
        return _fail(f"{line}\n\n{tree.rstrip()}" if tree else line, error)


def _warn(message: Warning | str, *_: object) -> None:
    """Warnings as lines of their own, without the line of code, and of several processes only the first's."""
    if _rank() == "0":
        print(f"any2point: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"


def _fail(message: str, error: BaseException | None = None) -> int:
    _say(message, error)
    return 2


def _say(message: str, error: BaseException | None) -> None:
    """Print an error, unless other processes of the same run have the same one and the first will tell."""
    elected = getattr(error, "rank", None)  # set where one process failed first and ends the others
    if elected is None and _rank() != "0":
        time.sleep(2)  # a launcher ends all when the first one exits
        return
    where = f"process {elected}: " if elected else ""
    print(f"any2point: {where}{message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
