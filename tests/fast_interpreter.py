"""Importing this makes Triton's interpreter several times faster, and sets right what versions of it get wrong."""

from triton import language as tl
from triton.runtime import interpreter

from mnet_kernels import backends

assert backends.triton.INTERPRETED, "run with TRITON_INTERPRET=1"


def patch_once():
    """Let the interpreter patch triton.language once: it does so at every call of a device function, most of its time.

    The process only interprets, so nothing needs to be put back.
    """
    patch, done = interpreter._patch_lang, set()

    def patch_lang(fn):
        languages = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if languages not in done:
            done.add(languages)
            patch(fn)
            # triton 3.6 converts arrays to numbers in a way that NumPy 2.4 refuses
            tl.core.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def keep_conditions():
    """Let a condition stay one as it is spread over a tile: triton 3.9's interpreter takes no other values as masks."""
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, kind, value):
        found = splat(self, kind, value)
        if value.data.dtype == bool:
            found.data = found.data.astype(bool)
        return found

    interpreter.InterpreterBuilder.create_splat = create_splat


keep_conditions()
if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
    patch_once()
