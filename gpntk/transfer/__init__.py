"""Transfer learning in closed form: freeze a source network, fit a GP to what it leaves unexplained, predict."""

from gpntk.transfer.gp import TransferGP

__all__ = ["TransferGP"]
