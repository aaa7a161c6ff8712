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


class KindError(InputError, TypeError):
    """An argument of the wrong type."""


class KeywordError(InputError, TypeError):
    """A keyword that the function does not have; the message gives the nearest one."""


class FileFormatError(GpntkError, ValueError):
    """A saved file is damaged, foreign, or belongs to another network."""


class UnruledError(NetworkError):
    """Some selected parameters are used in ways that no structured rule covers.

    Attributes:
        reasons: Why, by the parameter's name.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        name, reason = next(iter(reasons.items()))
        others = f" ({len(reasons) - 1} more)" if len(reasons) > 1 else ""
        super().__init__(f"parameter {name!r} has no structured rule: {reason}{others}; use AutodiffBackend for it.")

    def __reduce__(self) -> tuple[type[UnruledError], tuple[dict[str, str]]]:
        return UnruledError, (self.reasons,)


class SolveError(GpntkError, RuntimeError):
    """A linear system could not be solved to the accuracy that was asked for; the message says what to do."""


class DistributedError(GpntkError, RuntimeError):
    """A process of the group failed or saw other data than was expected."""


class UnsupportedLayerError(NetworkError):
    """A layer has no infinite-width limit that is known here; the message names it and the way out."""
