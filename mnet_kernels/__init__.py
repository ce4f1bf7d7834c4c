"""mnet-kernels: MobileNet blocks that train fused (see README.md).

    from mnet_kernels import FusedMobileNetV2
    model = FusedMobileNetV2()          # where you wrote torchvision's mobilenet_v2()

``mnet_kernels.functional`` has the ops, ``mnet_kernels.nn`` the modules, ``accelerate(model)`` makes the blocks of a
model run fused in place, ``backend(...)`` chooses what runs, ``build_info()`` tells what can.
"""

from . import flops, stages
from ._version import __version__
from .backends import compiled

# The ops must be defined before the extension registers its kernels, and both before the tables are bound.
stages.setup()
compiled.load()
stages.bind()
flops.setup()

from . import functional, models, nn  # noqa: E402
from .backends import BackendUnavailableError  # noqa: E402
from .choice import backend, default_fused  # noqa: E402
from .graph.accelerate import AccelerateReport, accelerate, restore  # noqa: E402
from .graph.fold import fold  # noqa: E402
from .info import build_info  # noqa: E402
from .memory import cpu_memory, empty_cache, reset_peak_cpu_memory  # noqa: E402
from .models import (  # noqa: E402
    FusedMobileNetV1,
    FusedMobileNetV2,
    FusedMobileNetV3,
    fused_mobilenet_v1,
    fused_mobilenet_v2,
    fused_mobilenet_v3_large,
    fused_mobilenet_v3_small,
)
from .params import BatchNormParams, SqueezeExciteParams  # noqa: E402
from .stages import count_stages  # noqa: E402

__all__ = [
    "AccelerateReport",
    "BackendUnavailableError",
    "BatchNormParams",
    "FusedMobileNetV1",
    "FusedMobileNetV2",
    "FusedMobileNetV3",
    "SqueezeExciteParams",
    "__version__",
    "accelerate",
    "backend",
    "build_info",
    "count_stages",
    "cpu_memory",
    "default_fused",
    "empty_cache",
    "fold",
    "functional",
    "fused_mobilenet_v1",
    "fused_mobilenet_v2",
    "fused_mobilenet_v3_large",
    "fused_mobilenet_v3_small",
    "models",
    "nn",
    "reset_peak_cpu_memory",
    "restore",
]
