"""The errors Penstock raises for its users, and nothing else.

Every layer raises these; only `cli.py` turns them into exit codes. A `UserError` is a user's
mistake: one line, exit code 2, no traceback. Everything else is our fault: exit code 1.
"""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and what to do about it.

    The message reads "WHAT (WHERE): DO". `where` names a configuration key, a file or a
    position in one; `do` is an action the user can take.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        """Compose the one-line message from its three parts."""
        self.what = what
        self.where = where
        self.do = do
        message = what if where is None else f"{what} ({where})"
        super().__init__(" ".join((message if do is None else f"{message}: {do}").split()))


class ConfigError(UserError):
    """A configuration key or value is wrong; `where` names the key, and the file if any."""


class DataError(UserError):
    """Input data or a dataset is missing, damaged or of the wrong kind."""


class ExecutableError(UserError):
    """An executable is missing, damaged, untrusted, or made for something else."""


class CheckpointError(UserError):
    """A run folder or checkpoint is missing, damaged, locked or does not fit the job."""


class MissedTargetError(UserError):
    """A result is below what the user asked for; it was recorded all the same."""


class DoesNotFitError(UserError):
    """The plan needs more of a resource than the target has."""


class BenchmarkError(UserError):
    """A command that is measured failed, or did not tell a figure it was asked for."""
