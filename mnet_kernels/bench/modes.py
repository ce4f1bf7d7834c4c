"""The tables behind the automatic choice, from measured blocks: algebraic mode against chain (``modes.json``), and on a
card the fused backends against the fastest of native's forms (``fastest.json``)."""

import json

from .. import choice
from ..training.checkpoint import write_atomic
from . import BenchError, providers, shapes

DTYPES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by --amp


OPS = {  # class of a block's module -> the functional op that it calls
    "FusedInvertedResidual": "inverted_residual",
    "FusedSeparable": "separable_conv",
    "FusedStemConvBNAct": "stem_conv_bn_act",
    "FusedPointwiseConvBNAct": "pointwise_conv_bn_act",
}


def _times(subject, results, device=None):
    """{(provider, batch, amp): median} of a subject's training steps."""
    return {
        (row["provider"], row["batch"], row["amp"]): row["median_ms"]
        for row in results
        if row["subject"] == subject.name
        and row["direction"] == "train"
        and row.get("launch", "eager") == "eager"
        and "median_ms" in row
        and (device is None or row["device"] == device)
    }


def fastest_rows(subjects, results, card):
    """Rows of ``fastest.json``: every block that ran native and on a fused backend on a card.

    Args:
        subjects, results: as of :func:`rows`.
        card: its name.
    """
    found = []
    for subject in subjects:
        op, times = OPS.get(type(subject.module).__name__), _times(subject, results, "cuda")
        for batch, amp in dict.fromkeys(key[1:] for key in times):
            here = {provider: ms for (provider, *rest), ms in times.items() if rest == [batch, amp]}
            native = [ms for provider, ms in here.items() if provider in providers.NATIVE]
            fused = {}
            for provider, ms in here.items():
                if "/" in provider:
                    fused.setdefault(provider.partition("/")[0], []).append(ms)
            if op is None or not native:
                continue
            place = {"channels": subject.shape[0], "height": subject.shape[1], "width": subject.shape[2]}
            found += [
                {"card": card, "dtype": DTYPES[amp], "op": op, "batch": batch, **place,
                 "backend": backend, "speedup": round(min(native) / min(times), 3)}
                for backend, times in fused.items()
            ]  # fmt: skip
    return found


def rows(subjects, results):
    """Rows of ``modes.json`` from measured ones: every block with an expand layer and both modes of a backend, trained.

    Args:
        subjects: the blocks, as :func:`shapes.blocks` gives them.
        results: rows of :func:`compare.measure`.
    """
    found = []
    for subject in subjects:
        layers, activations = shapes.record(subject.module, subject.shape)
        if [layer.kind for layer in layers] != ["pointwise", "depthwise", "pointwise"]:
            continue
        times = _times(subject, results)
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
    """Put measured rows into ``modes.json``, in the place of those of the same backend and dtype.

    Raises:
        BenchError: there are none.
    """
    if not measured:
        raise BenchError("--write-modes: no block ran in both modes; measure BACKEND/chain and BACKEND/algebraic")
    _replace(header, measured, path, ("backend", "dtype"), ("backend", "dtype", "height", "channels"))


def write_fastest(header, measured, path=choice.FASTEST):
    """Put measured rows into ``fastest.json``, in the place of those of the same card and dtype.

    Raises:
        BenchError: there are none.
    """
    if not measured:
        raise BenchError("--write-backends: no block ran native and fused on a card; --device cuda --backend triton")
    _replace(header, measured, path, ("card", "dtype"), ("card", "dtype", "op", "height", "channels", "backend"))


def _replace(header, measured, path, same, order):
    document = json.loads(path.read_text(encoding="utf-8"))

    def key(row, names=same):
        return tuple(-row[name] if name == "height" else row[name] for name in names)

    fresh = {key(row) for row in measured}
    for group in sorted(fresh):
        told = {name: header[name] for name in ("device", "threads", "torch", "commit")}
        document["measured"][" ".join(group)] = told
    kept = [row for row in document["rows"] if key(row) not in fresh]
    lines = ",\n".join("  " + json.dumps(row) for row in sorted(kept + measured, key=lambda row: key(row, order)))
    text = f'{{"measured": {json.dumps(document["measured"], indent=1)},\n "rows": [\n{lines}\n]}}\n'
    write_atomic(path, text.encode())
