"""Everything gpntk raises on bad input, by kind of failure."""

from __future__ import annotations


class GpntkError(Exception):
    """Root of every error raised on purpose by gpntk."""


class NetworkError(GpntkError, ValueError):
    """The network cannot be frozen or differentiated as it is; the message says what to change."""


class SelectionError(GpntkError, ValueError):
    """The choice of parameters or outputs does not fit the network."""


class InputError(GpntkError, ValueError):
    """Data of the wrong shape, dtype, device or value."""


class FileFormatError(GpntkError, ValueError):
    """A saved file is damaged, foreign, or belongs to another network."""
