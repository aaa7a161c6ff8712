"""Experiments in transfer learning: ours beside the usual ways to use a trained network with few labels."""
