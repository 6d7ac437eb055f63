"""Experts, the engines that bring tokens to them, `MoEFeedForward`."""
