"""The errors this library raises and the one warning category it uses.

::

    CkptCallbacksError
    ├── ConfigError          (also ValueError)    wrong arguments, unusable directory
    │   └── MissingExtra     (also ImportError)   an optional library is not installed
    ├── UsageError           (also RuntimeError)  right arguments at the wrong moment
    ├── DirectoryLocked      (also RuntimeError)  another process owns the directory
    ├── CheckpointNotFound   (also LookupError)   no such step, or none at all
    ├── StateMismatch        (also ValueError)    the state and the checkpoint differ
    ├── SaveError            (also RuntimeError)  a checkpoint could not be saved
    ├── ProcessLost          (also RuntimeError)  another process of the run did not come
    ├── CorruptCheckpoint    (also ValueError)    files are not what the record says
    └── RecordError          (also ValueError)    a record that cannot be read
        └── NewerFormat                           it was written by a newer version
    CkptCallbacksWarning     (UserWarning)
"""

__all__ = [
    "CheckpointNotFound",
    "CkptCallbacksError",
    "CkptCallbacksWarning",
    "ConfigError",
    "CorruptCheckpoint",
    "DirectoryLocked",
    "MissingExtra",
    "NewerFormat",
    "ProcessLost",
    "RecordError",
    "SaveError",
    "StateMismatch",
    "UsageError",
]


class CkptCallbacksError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(CkptCallbacksError, ValueError):
    """An argument cannot work: raised where it was given, before any training."""


class MissingExtra(ConfigError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


class UsageError(CkptCallbacksError, RuntimeError):
    """A call came at the wrong moment, such as `on_step` before `run.state` was read."""


class DirectoryLocked(CkptCallbacksError, RuntimeError):
    """Another process, or another run in this process, owns the directory."""


class CheckpointNotFound(CkptCallbacksError, LookupError):
    """The directory holds no checkpoint that answers the request."""


class StateMismatch(CkptCallbacksError, ValueError):
    """The state given and the checkpoint on disk have different leaves."""


class CorruptCheckpoint(CkptCallbacksError, ValueError):
    """A file of a checkpoint is missing or differs from its record in size or digest."""


class SaveError(CkptCallbacksError, RuntimeError):
    """A checkpoint could not be saved, and the run was told to stop then."""


class ProcessLost(CkptCallbacksError, RuntimeError):
    """Another process of the run did not come to where all have to meet, or failed."""


class RecordError(CkptCallbacksError, ValueError):
    """A record or `run.json` is damaged, or was written by a newer version."""


class NewerFormat(RecordError):
    """A record was written by a newer version, so nothing in the directory is touched."""


class CkptCallbacksWarning(UserWarning):
    """Something that training survives and that a person should still see once."""
