"""The errors that kvpref raises for causes outside its own code.

InputError and RunError derive from standard exceptions, so library users can catch what they already catch; the CLI
maps them to exit codes (2 for input and usage, 1 for a run that failed).
"""


class InputError(ValueError):
    """Bad input or usage: the message says where (``file:line`` for data), what was found, and what to do."""


class UnsupportedModelError(InputError):
    """The model, or a setting of it, cannot be run exactly; the message names the reason and what works instead."""


class RunError(RuntimeError):
    """A run failed after it started (NaN loss, full disk); the message says what is saved and how to continue."""


class SharedRunError(RunError):
    """A failure that all ranks of a run know of; the message says on which rank it happened."""


class Interrupted(BaseException):
    """A signal stopped a command-line run; the message says what is saved and how to continue.

    Like KeyboardInterrupt, it is not an Exception, so that no handler of failures catches it.

    Args:
        message: The message for the user.
        signal_number: The number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
