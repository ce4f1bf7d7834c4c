"""The table behind automatic mode: algebraic against chain, block by block (``mnet_kernels/modes.json``)."""

import json

from .. import choice
from ..training.checkpoint import write_atomic
from . import BenchError, shapes

DTYPES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by --amp


def rows(subjects, results):
    """Rows of the table from measured ones: every block with an expand layer and both modes of a backend, trained.

    Args:
        subjects: the blocks, as :func:`shapes.blocks` gives them.
        results: rows of :func:`compare.measure`.
    """
    found = []
    for subject in subjects:
        layers, activations = shapes.record(subject.module, subject.shape)
        if [layer.kind for layer in layers] != ["pointwise", "depthwise", "pointwise"]:
            continue
        times = {
            (row["provider"], row["batch"], row["amp"]): row["median_ms"]
            for row in results
            if row["subject"] == subject.name and row["direction"] == "train" and "median_ms" in row
        }
        for (provider, batch, amp), chain in times.items():
            backend, _, mode = provider.partition("/")
            algebraic = times.get((f"{backend}/algebraic", batch, amp))
            if mode != "chain" or algebraic is None:
                continue
            expand, depthwise, _ = layers
            found.append(
                {
                    "backend": backend,
                    "dtype": DTYPES[amp],
                    "batch": batch,
                    "channels": expand.channels,
                    "expanded": expand.out_channels,
                    "height": expand.height,
                    "width": expand.width,
                    "kernel": depthwise.kernel,
                    "stride": depthwise.stride,
                    "activation": activations[0],
                    "speedup": round(chain / algebraic, 3),
                }
            )
    return found


def write(header, measured, path=choice.MEASURED):
    """Put measured rows in the place of those of the same backend and dtype.

    Raises:
        BenchError: there are none.
    """
    if not measured:
        raise BenchError("--write-modes: no block ran in both modes; measure BACKEND/chain and BACKEND/algebraic")
    document = json.loads(path.read_text(encoding="utf-8"))
    fresh = {(row["backend"], row["dtype"]) for row in measured}
    kept = [row for row in document["rows"] if (row["backend"], row["dtype"]) not in fresh]
    for backend, dtype in sorted(fresh):
        told = {name: header[name] for name in ("device", "threads", "torch", "commit")}
        document["measured"][f"{backend} {dtype}"] = told
    order = sorted(kept + measured, key=lambda row: (row["backend"], row["dtype"], -row["height"], row["channels"]))
    lines = ",\n".join("  " + json.dumps(row) for row in order)
    text = f'{{"measured": {json.dumps(document["measured"], indent=1)},\n "rows": [\n{lines}\n]}}\n'
    write_atomic(path, text.encode())
