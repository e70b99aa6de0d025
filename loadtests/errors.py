"""What can go wrong in a load test, and how a script ends.

LoadTestError
├── MissingTool       a program or library that the script needs is not installed
├── MissingFile       the data folder lacks a file
├── RequestFailed     the server refused, answered something unexpected, or could not be reached
└── ServerFailed      the script's own server did not start
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType


class LoadTestError(Exception):
    """Root of the errors that a script reports in one line."""


class MissingTool(LoadTestError):
    """The message names what to install."""


class MissingFile(LoadTestError):
    """The message names the file and the option that says where to look."""


class RequestFailed(LoadTestError):
    """The message holds the status and the server's own words."""


class ServerFailed(LoadTestError):
    """The message holds the end of the server's log."""


def run(main: Callable[[], int]) -> None:
    """End the process with `main`'s exit code, or with 2 and one line on an error.

    SIGTERM ends it as Ctrl-C does, so that a server which the script has started is stopped too.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        sys.exit(main())
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(143)
