"""Checkpoints that survive a full disk, a crash and a damaged file.

A file is written aside in full, flushed to the disk and only then put in the place of the old one, so at every moment
the old or the new one is whole.  Loading checks the archive's checksums and never runs code from the file.
"""

import contextlib
import errno
import io
import os
import shutil
import zipfile
from pathlib import Path

import torch

from . import TrainingError

FORMAT = 2
KEYS = ("model", "ema", "optimizer", "scaler", "epoch", "step", "rng", "history", "config", "inputs")
MODEL_KEYS = ("model", "epoch", "config", "inputs")  # what best.pt and last.pt have in common


def _megabytes(size):
    return f"{size / 1e6:.1f} MB"


def write_error(path, size, exc):
    """The :class:`TrainingError` for an ``OSError`` while ``size`` bytes were being written to ``path``."""
    reason = exc.strerror or str(exc)
    try:
        free = f"{_megabytes(shutil.disk_usage(Path(path).parent).free)} free there"
    except OSError:
        free = "free space unknown"
    advice = "what was there before is untouched"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        advice += "; make room, or write elsewhere with --out"
    return TrainingError(f"cannot write {path}: {reason} ({_megabytes(size)} needed, {free}); {advice}")


def write_atomic(path, content):
    """Put the bytes ``content`` in the place of ``path`` in one step; on any failure the old file stays as it was."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_directory(path.parent)
    except OSError as exc:
        raise write_error(path, len(content), exc) from exc
    finally:
        # Gone after the replace; left over after a failure or an interrupt.
        with contextlib.suppress(OSError):
            aside.unlink()


def _sync_directory(directory):
    """Make the rename itself durable, where the system can (not on Windows, not on every network file system)."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(path, payload):
    """Write a checkpoint: ``payload`` is a dict of tensors and plain values.

    It is serialised in memory first (a few tens of MB): then the size needed is known, and a failing disk shows as a
    plain ``OSError`` rather than as an error of the archive writer.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    write_atomic(path, buffer.getbuffer())


def _damaged(path, why):
    best = Path(path).with_name("best.pt")
    rest = f" (the weights of the best epoch are in {best})" if best.exists() and best != Path(path) else ""
    return TrainingError(
        f"{path} is damaged or not a checkpoint of this program ({why}); restore it from a copy, or start over with "
        f"--overwrite or another --out{rest}"
    )


def load(path, keys=KEYS, missing="nothing to resume: {} does not exist; start without --resume"):
    """Read a checkpoint of :func:`save` that has ``keys``, all tensors on the CPU."""
    path = Path(path)
    try:
        # The reader of torch does not verify the checksums that its writer stores.
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise _damaged(path, f"wrong checksum of {bad}")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise TrainingError(missing.format(path)) from exc
    except TrainingError:
        raise
    except OSError as exc:
        raise TrainingError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except Exception as exc:  # the readers raise half a dozen types for damaged input, all with the same meaning
        raise _damaged(path, str(exc).partition("\n")[0][:120] or type(exc).__name__) from exc
    if not isinstance(payload, dict) or "format" not in payload:
        raise _damaged(path, "entries are missing")
    if payload["format"] != FORMAT:
        raise TrainingError(f"{path} has checkpoint format {payload['format']}, this version reads {FORMAT}")
    if any(key not in payload for key in keys):
        raise _damaged(path, "entries are missing")
    return payload


def check_config(path, saved, current):
    """Raise unless two configurations (dicts) agree: a resumed run must be the run that was interrupted."""
    names = sorted(set(saved) | set(current))
    differing = [name for name in names if saved.get(name) != current.get(name)]
    if differing:
        words = ", ".join(f"{n.replace('_', '-')} (saved {saved.get(n)}, now {current.get(n)})" for n in differing)
        raise TrainingError(
            f"cannot resume {path} with different settings: {words}; give the saved ones, or use another --out"
        )
