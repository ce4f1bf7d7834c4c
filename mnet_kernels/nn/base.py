"""What all fused modules share: fused where the children allow it, else the children themselves, said once."""

import logging

from ..log import say_once
from . import fusable


class FusedModule:
    """Mixin. A subclass gives ``why_native()``, ``run_native(x)`` and ``run_fused(x)``.

    ``backend`` and ``mode`` pin the module's choice (``mnet_kernels.backend`` for what the names mean); None leaves
    it open.
    """

    backend = None
    mode = None

    def why_native(self):
        """Why this module must call its children one by one, or None if it can run fused."""
        raise NotImplementedError

    def forward(self, x):
        if fusable.is_traced(x):
            return fusable.as_leaf(self, x)
        why = fusable.global_hooks() or self.why_native()
        if why:
            say_once(f"{type(self).__name__} runs its children one by one: {why}", logging.WARNING)
            return self.run_native(x)
        return self.run_fused(x)
