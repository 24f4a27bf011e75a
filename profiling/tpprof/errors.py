"""What tpprof raises on purpose: messages that name the value, the constraint and the remedy."""

from tpinfer.config.errors import TpinferError


class TraceError(TpinferError):
    """A trace, a manifest or a report that cannot be read, or that does not fit what was asked."""
