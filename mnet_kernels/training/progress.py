"""The progress bar of one epoch (tqdm on a terminal) and the lines printed between epochs."""

import sys


class Progress:
    """Counts steps on a bar where that makes sense, and prints lines without tearing the bar.

    Without a terminal, without tqdm, or with ``enabled=False`` only the lines appear; with ``silent`` nothing does.
    """

    def __init__(self, enabled=True, stream=None, silent=False):
        self._silent = silent
        enabled = enabled and not silent
        self._stream = stream or sys.stderr
        self._tqdm = None
        if enabled and self._stream.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                self.line("tqdm is not installed: no progress bar")
            else:
                self._tqdm = tqdm

    def line(self, text):
        """Print one line to standard output."""
        if not self._silent:
            print(text, flush=True)

    def steps(self, iterable, total, label):
        """Iterate over ``iterable`` (``total`` steps), advancing the bar; the bar is gone when the loop is left."""
        if self._tqdm is None:
            yield from iterable
            return
        with self._tqdm(total=total, desc=label, unit="step", leave=False, file=self._stream) as bar:
            for item in iterable:
                yield item
                bar.update()
