"""Turning exceptions into one or two lines on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from moekit.core.errors import UserError

REFUSED = 2
INTERRUPTED = 130

# typer exports only this subclass, and newer versions carry click's classes inside.
UsageError: Any = typer.BadParameter.__base__

ADVICE = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some space or choose another --out",
    errno.EACCES: "check the permissions or choose another path",
    errno.EPERM: "check the permissions or choose another path",
    errno.EROFS: "choose another --out",
}


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Print what a user can act on as `error: ...` and exit; let programming errors through."""
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "moekit"
        message = " ".join(error.format_message().split()).rstrip(".")
        _fail(f"{message[:1].lower()}{message[1:]}\n`{path} --help` shows how it is used")
    except KeyboardInterrupt as error:
        print(f"\n{error}" if str(error) else "\ninterrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error
    except BrokenPipeError as error:
        # The reader of our output (`| head`) has gone; flushing at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except OSError as error:
        _fail(describe_os_error(error))
    except MemoryError as error:
        _fail(f"not enough memory: {error}\n`moekit inspect MODEL` shows what it needs")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        _fail("not enough memory\n`moekit inspect MODEL` shows what it needs")


def describe_os_error(error: OSError) -> str:
    """One line with the file, the system's words, and what to do where that is known."""
    if error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    advice = ADVICE.get(error.errno)
    return f"{where}{os.strerror(error.errno).lower()}{f'; {advice}' if advice else ''}"


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(REFUSED)
