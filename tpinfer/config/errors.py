"""What tpinfer raises on purpose. A message names the value, the constraint and the remedy.

TpinferError
├── ConfigError (also ValueError)   a setting, a request or a config.json
│   └── TopologyError               a topology file
├── CheckpointError                 files of a checkpoint
└── RankError                       another rank is late, dead or gone
"""


class TpinferError(Exception):
    """Root of the tree; its message is fit for a user."""


class ConfigError(TpinferError, ValueError):
    """A value that cannot work."""


class TopologyError(ConfigError):
    """A topology file that says something impossible."""


class CheckpointError(TpinferError):
    """A checkpoint whose files are missing, damaged or of the wrong shape."""


class RankError(TpinferError):
    """Another rank did not do its part in time."""
