"""The command `gpt2`: runs a subcommand and reports its errors.

Only text goes to stdout. A user's mistake is one line on stderr and exit status 2; Ctrl-C exits with 130, a reader that
leaves early with 141.
"""

from __future__ import annotations

import io
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpt2.options import parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    try:
        options = parser().parse_args(arguments)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than a model writes
        try:
            pkgutil.resolve_name(options.run)(options)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (ValueError, OSError) as e:
            fail(options.command, str(e))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only disturb the exit
        sys.exit(130)


def fail(command: str, message: str) -> NoReturn:
    print(f"gpt2 {command}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
