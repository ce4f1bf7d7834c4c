"""``python -m mnet_kernels.cost``: a MobileNet's costs as a table or as JSON."""

import argparse
import dataclasses
import json
import math
import sys

import torch

from ..models import MODELS
from . import Device, cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def as_dict(found, device, **header):
    """A :class:`Cost` as plain values, for JSON."""

    def schemes(layer=None):
        return {
            name: {"bytes": found.bytes(name, layer), "floor_seconds": found.floor(name, device, layer)}
            for name in found.kernels
        }

    rows = [{**dataclasses.asdict(layer), "schemes": schemes(i)} for i, layer in enumerate(found.layers)]
    total = {"parameters": found.parameters, "madds": found.madds, "schemes": schemes()}
    for name, saved in found.saved.items():
        total["schemes"][name]["saved_bytes"] = saved
    return {**header, "batch": found.batch, "device": dataclasses.asdict(device), "layers": rows, "total": total}


def as_table(found, device):
    """A :class:`Cost` as aligned plain text."""
    names = list(found.kernels)
    head = ["layer", "kind", "output", "parameters", "MMAdds", *(f"{n} MB" for n in names), *(f"{n} us" for n in names)]
    rows = []
    for i, layer in enumerate([*found.layers, None]):
        i = None if layer is None else i
        size = found.parameters if layer is None else layer.parameters
        madds = found.madds if layer is None else layer.madds
        what = ("total", "", "") if layer is None else (layer.name, layer.kind, "x".join(map(str, layer.out_shape)))
        row = [*what, f"{size}", f"{madds / 1e6:.3f}"]
        row += [f"{found.bytes(n, i) / 1e6:.1f}" for n in names]
        row += [f"{found.floor(n, device, i) * 1e6:.1f}" for n in names]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in [head, *rows]:
        cells = [c.ljust(w) if j < 3 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(-1, lines[1])
    saved = ", ".join(f"{n} {b / 1e6 / found.batch:.2f}" for n, b in found.saved.items())
    return "\n".join([*lines, f"kept for backward, MB an image: {saved}"])


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def build_parser():
    """The command line."""
    peak = Device()
    parser = argparse.ArgumentParser(
        prog="python -m mnet_kernels.cost",
        description="Parameters, multiply-adds, bytes and time floors of a MobileNet's training step, layer by layer.",
        epilog="Floors are lower bounds from counted work and the peaks given, not measurements.",
    )
    add = parser.add_argument
    add("model", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    add("--width", type=_positive(float), default=1.0, metavar="X", help="width multiplier (default: 1)")
    add("--width-rule", choices=("torchvision", "paper"), help="how v3 applies it (default: torchvision)")
    add("--res", type=_positive(int), default=224, metavar="PX", help="side of the images (default: 224)")
    add("--batch", type=_positive(int), default=256, metavar="N", help="images a step (default: 256)")
    add("--dtype", choices=DTYPES, default="bf16", help="of activations and weights (default: bf16)")
    for name, unit, what in (
        ("bandwidth", 1e12, "memory, TB/s"),
        ("tensor", 1e12, "matrix units, TFLOP/s"),
        ("vector", 1e12, "vector units, 10^12 lane instructions/s"),
    ):
        value = getattr(peak, name) / unit
        add(f"--{name}", type=_positive(float), default=value, metavar="X", help=f"{what} (default: {value:g})")
    add("--json", action="store_true", help="print JSON (bytes, seconds) instead of a table")
    return parser


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    options = {"width_mult": args.width}
    if args.width_rule is not None:
        if not args.model.startswith("v3"):
            parser.error("--width-rule is for v3-large and v3-small")
        options["width_rule"] = args.width_rule
    device = Device(args.bandwidth * 1e12, args.tensor * 1e12, args.vector * 1e12)
    with torch.device("meta"):
        model = MODELS[args.model](**options)
    try:
        found = cost(model, (3, args.res, args.res), args.batch, DTYPES[args.dtype])
    except ValueError as exc:
        parser.error(str(exc))
    if args.json:
        header = {"model": args.model, "width": args.width, "res": args.res, "dtype": args.dtype}
        print(json.dumps(as_dict(found, device, **header), indent=2))
        return 0
    print(f"MobileNet {args.model}, width {args.width:g}, {args.res} px, a training step of {args.batch}, {args.dtype}")
    print(as_table(found, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
