"""The two ways in which the program ends badly. Each is one message: what was wrong, where, what to do."""


class PipelineError(Exception):
    """A run that failed: a program broke, a disk filled, a check was not passed."""

    exit_status = 1


class UserError(PipelineError):
    """A mistake in what the user gave: an option, the configuration, a file, the data."""

    exit_status = 2
