"""timm's models with fused blocks: after ``import mnet_kernels.timm``, ``timm.create_model("fused_mobilenetv2_100")``.

Every model of timm's that is built of the blocks that ``mnet_kernels.accelerate`` knows gets an entry with ``fused_``
before its name, which makes timm's own model (weights, arguments and configuration included) and accelerates it.
"""

import functools

import timm
from timm.models import register_model

from .graph.accelerate import accelerate

PATTERNS = (
    "mobilenetv1_*", "mobilenetv2_*", "mobilenetv3_*", "mnasnet_*", "semnasnet_*", "spnasnet_*", "fbnetc_*",
    "fbnetv3_*", "efficientnet_b*", "efficientnet_lite*", "hardcorenas_*", "lcnet_*", "tinynet_*", "mixnet_*",
)  # fmt: skip


def _register(name):
    def create(pretrained=False, **kwargs):
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
        accelerate(model)
        return model

    create.__name__ = create.__qualname__ = f"fused_{name}"
    create.__doc__ = f"timm's {name}, its blocks run fused."
    # register_model writes down which module a model comes from
    create.__module__ = __name__
    register_model(create)


@functools.cache
def register():
    """Register the models (done on import); returns their names."""
    names = sorted({name for pattern in PATTERNS for name in timm.list_models(pattern)})
    for name in names:
        _register(name)
    return [f"fused_{name}" for name in names]


register()
