"""The errors a user can cause. The command line prints them as one sentence and exits with 2."""


class UserError(Exception):
    """Something the user can mend: the message says what, where, and what to do."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A data file or folder that cannot be used as it is."""


class BadSampleError(DataError):
    """One sample that cannot be used; the loader may replace it (`data.max_bad_samples`)."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model or run."""
