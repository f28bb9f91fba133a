"""The two ways in which the program ends badly. Each is one message: what was wrong, where, what to do."""

import errno


class PipelineError(Exception):
    """A run that failed: a program broke, a disk filled, a check was not passed."""

    exit_status = 1


class UserError(PipelineError):
    """A mistake in what the user gave: an option, the configuration, a file, the data."""

    exit_status = 2


class NotInstalled(UserError):
    """A program or a file that set-up brings is not there."""


class NoSpace(PipelineError):
    """A disk has too little room: no fault of what was to be written or read."""


def full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no space left, or no more of it for this user or this process."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
