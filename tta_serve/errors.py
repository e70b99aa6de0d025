"""Every error that the server raises on purpose. None knows HTTP; `http.py` has the table.

TTAError
├── ConfigError
├── InvalidInput
│   └── TooLarge
├── Unauthorized
├── Forbidden
├── NotFound
├── Overloaded
├── Unavailable
└── DemoError (in `demo.py`: a client's, never the server's)

A message names the offending value, the limit and the remedy. All arguments are positional and handed to
`super().__init__`, so that an error survives pickling between processes.
"""


class TTAError(Exception):
    """Root. `str(error)` is what a user reads."""


class ConfigError(TTAError):
    """The configuration cannot be used; one line for each problem."""


class InvalidInput(TTAError):
    """The request is wrong, and would be wrong again."""


class TooLarge(InvalidInput):
    """The request is over a configured limit."""


class Unauthorized(TTAError):
    """No token, or a wrong one."""


class Forbidden(TTAError):
    """This is closed, whatever the token."""


class NotFound(TTAError):
    """No such model, stream or path."""


class Overloaded(TTAError):
    """The server has no room now.

    Args:
        message: what is full.
        retry_after_s: when to come back.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Unavailable(TTAError):
    """The server is starting, stopping or broken; not the caller's fault."""
