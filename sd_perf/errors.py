"""Errors that a user can mend. The command line prints the message and exits with code 2."""


class UserError(Exception):
    """Base of these errors. The message is one sentence: what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A key or value of the config that cannot be used, or a missing package that it needs."""


class DataError(UserError):
    """A data file or folder that cannot be used as it is."""


class BadSampleError(DataError):
    """A sample that cannot be used. The loader may replace it (`data.max_bad_samples`)."""


class CheckpointError(UserError):
    """A checkpoint or weight file that is missing, damaged, or of another model or run."""


class RankLostError(UserError):
    """Another process of the run died or fell silent."""

    exit_code = 76
