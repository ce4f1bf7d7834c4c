"""Say things once: which backend runs and why.  Everything goes through the logger ``mnet_kernels``."""

import logging

import torch

logger = logging.getLogger("mnet_kernels")
_said = set()


def say_once(message, level=logging.INFO):
    """Log a message the first time it comes up in this process (never while a graph is being traced).

    Returns whether this was the time.
    """
    if torch.compiler.is_compiling() or message in _said:
        return False
    _said.add(message)
    logger.log(level, message)
    return True


def forget():
    """Forget what was said, so that it is said again."""
    _said.clear()
