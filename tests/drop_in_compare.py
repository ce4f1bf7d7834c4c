"""What must be equal between a plain model and its accelerated copy, and how equal."""

import torch
from precision import ulp

EXACT = 1e-9  # float64, relative: both compute the same sums in another order
MISSING = object()
SPOILT = "modified by an inplace operation"
SIMPLE = (int, float, bool, str, tuple, type(None))
KINKS = {"ReLU": (0,), "ReLU6": (0, 6), "Hardswish": (-3, 3), "Hardsigmoid": (-3, 3)}


class Disagreement(AssertionError):
    """The accelerated model did something else than the plain one."""


class Nothing(Exception):
    """There is nothing to draw from."""


def agree(condition, what, got=None, want=None):
    if not condition:
        raise Disagreement(what if got is want is None else f"{what}: {got!r}, plain {want!r}")


def outcome(call):
    """(result, None) or (None, what it raised)."""
    try:
        return call(), None
    except Exception as exc:  # noqa: BLE001  whatever it is: the plain model's decides what is right
        return None, exc


def same_outcome(got, want, what):
    """Both gave something, or both raised, of one family; returns whether they gave something.

    An activation in place may spoil what plain torch keeps for the backward, and not what a fused block keeps; and
    torch has no second derivative of its own hardsigmoid, where a fused block has.
    """
    (_, ours), (_, plain) = got, want
    if plain is None and ours is None:
        return True
    if ours is None and any(text in str(plain) for text in (SPOILT, "derivative for aten::hardsigmoid_backward")):
        return False
    agree(plain is not None, f"{what} raises {ours!r}, plain does not")
    agree(ours is not None, f"{what} does not raise, plain raises {plain!r}")
    # the public ops say what does not fit as ValueError or TypeError, where torch raises RuntimeError
    misfit = isinstance(ours, (ValueError, TypeError)) and isinstance(plain, RuntimeError)
    related = misfit or isinstance(ours, type(plain)) or isinstance(plain, type(ours))
    agree(related, f"{what} raises another type", ours, plain)
    return False


# ---- what hooks see -------------------------------------------------------------------------------------------------


class Seen:
    """What hooks saw during one run of one model: rows (tag, tensors), in order."""

    now = None  # the Seen of the run that is on
    names = {}  # id of a module -> its name, for hooks on all modules
    whole = True  # whether tensors are ordinary ones, whose values can be kept

    @classmethod
    def run(cls, model, call, whole=True):
        cls.now, cls.names, cls.whole = [], {id(m): n for n, m in model.named_modules()}, whole
        try:
            return call(), cls.now
        finally:
            cls.now = None


def see(tag, values, module=None):
    """Called by hooks; ``module`` tells one hook's many modules apart: those of copies and of parts are not told."""
    if Seen.now is None or (module is not None and id(module) not in Seen.names):
        return
    tag = tag if module is None else (*tag, Seen.names[id(module)])
    flat = [t for v in values for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, torch.Tensor)]
    Seen.now.append((tag, [t.detach().clone() if Seen.whole else t.shape for t in flat]))


def same_seen(got, want, what, exact=True):
    agree(
        [t for t, _ in got] == [t for t, _ in want], f"{what}: hooks called", [t for t, _ in got], [t for t, _ in want]
    )
    for (tag, mine), (_, theirs) in zip(got, want, strict=True):
        agree(len(mine) == len(theirs), f"{what}: hook {tag} saw", len(mine), len(theirs))
        if exact and Seen.whole:
            pairs = [dict(enumerate(some)) for some in (mine, theirs)]
            same_tensors(*({f"d {i}": t for i, t in some.items()} for some in pairs), f"{what}: hook {tag} saw")


def loss_of(out):
    """A loss with another weight for each value, the same for the same shape in every dtype."""
    generator = torch.Generator().manual_seed(out.numel())
    return (out * torch.randn(out.shape, generator=generator, dtype=torch.bfloat16).to(out.dtype)).sum()


# ---- tensors --------------------------------------------------------------------------------------------------------


def same_tensors(got, want, what, tolerance=EXACT):
    """{name: tensor or None}: equal to ``tolerance`` of the tensor's largest value.

    Gradients that are zero but for rounding (a bias before a batch norm's) are held against the largest of them all.
    """
    agree(got.keys() == want.keys(), f"{what}, names", sorted(got.keys() ^ want.keys()), [])
    sizes = {k: _largest(v) for k, v in want.items()}
    least = 1e-4 * max((v for k, v in sizes.items() if k.startswith("d ")), default=0.0)
    for name, w in want.items():
        g = got[name]
        agree((g is None) == (w is None), f"{what}, {name} is None", g is None, w is None)
        if w is None:
            continue
        agree(g.shape == w.shape and g.dtype == w.dtype, f"{what}, {name}", (g.shape, g.dtype), (w.shape, w.dtype))
        if not w.is_floating_point():
            agree(torch.equal(g, w), f"{what}, {name}", g, w)
            continue
        agree(torch.equal(g.isfinite(), w.isfinite()), f"{what}, {name}: other values are finite")
        error = _largest(g.double().nan_to_num(0, 0, 0) - w.double().nan_to_num(0, 0, 0))
        scale = max(sizes[name], least if name.startswith("d ") else 0.0, 1e-6)
        agree(error <= tolerance * scale, f"{what}, {name} is off by {error / scale:.1e}")


def _largest(t):
    if t is None or not t.numel() or not t.is_floating_point():
        return 0.0
    return t.detach().double().nan_to_num(0, 0, 0).abs().max().item()


def no_less_exact(got, plain, exact, dtype, what):
    """In low precision: the error of all tensors together is at most 4 times torch's own, plus units in the last place.

    One draw judges here, where precision.Judge has the mean of several: 4 where its factor is 2.  Every tensor is
    weighed by its size, so that small ones count too; one that is zero but for rounding is held against the largest.
    """
    agree(got.keys() == plain.keys() == exact.keys(), f"{what}, names", sorted(got.keys() ^ plain.keys()), [])
    for kind in ("out", "d "):
        names = [k for k, v in exact.items() if k.startswith(kind) and v is not None and v.numel()]
        agree(all(got[k] is not None and got[k].shape == plain[k].shape for k in names), f"{what}, shapes of {kind}")
        agree(all(got[k].dtype == plain[k].dtype for k in names), f"{what}, dtypes of {kind}")
        names = [k for k in names if plain[k].isfinite().all() and exact[k].isfinite().all()]
        norms = {k: exact[k].norm().item() for k in names}
        most = max([*norms.values(), 1e-6])
        weights = {k: most if norm < 1e-6 * most else max(norm, 1e-2 * most) for k, norm in norms.items()}
        ours, torchs = (
            sum(((some[k].double() - exact[k]).norm().item() / weights[k]) ** 2 for k in names) ** 0.5
            for some in (got, plain)
        )
        limit = 4 * torchs + 4 * ulp(dtype, 1.0) * max(1, len(names)) ** 0.5
        agree(ours <= limit, f"{what}, {kind.strip()}: error {ours:.1e}, plain's {torchs:.1e}, limit {limit:.1e}")


class Clearance:
    """Within the context: how near any activation's input came to a kink, where rounding would decide of gradients."""

    def __enter__(self):
        self.least = float("inf")
        self.handle = torch.nn.modules.module.register_module_forward_pre_hook(self._look)
        return self

    def _look(self, module, args):
        for kink in KINKS.get(type(module).__name__, ()):
            if args and args[0].numel():
                self.least = min(self.least, (args[0].detach() - kink).abs().min().item())

    def __exit__(self, *_):
        self.handle.remove()


# ---- structure ------------------------------------------------------------------------------------------------------


def public_class(module):
    """The module's class, without the one that a parametrization puts before it."""
    return next(c for c in type(module).__mro__ if c.__module__ != "torch.nn.utils.parametrize")


def same_structure(plain, ours, tolerance=EXACT):
    """Everything that can be read off the two models without running them."""
    for duplicates in (False, True):
        names = [[n for n, _ in m.named_modules(remove_duplicate=not duplicates)] for m in (ours, plain)]
        agree(names[0] == names[1], "module names", *names)
    theirs, mine = (dict(m.named_modules(remove_duplicate=False)) for m in (plain, ours))
    for name, a in theirs.items():
        b = mine[name]
        agree(isinstance(b, public_class(a)), f"class of {name!r}", type(b), type(a))
        for key, value in vars(a).items():
            if isinstance(value, SIMPLE):
                found = getattr(b, key, MISSING)
                agree(found is not MISSING and found == value, f"{name!r}.{key}", found, value)
    for what in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(m, what)()) for m in (plain, ours))
        agree(list(a) == list(b), what, list(b), list(a))
        for k in a:
            agree(a[k].requires_grad == b[k].requires_grad, f"{k}.requires_grad", b[k].requires_grad)
    states = [m.state_dict() for m in (ours, plain)]
    agree(list(states[0]) == list(states[1]), "keys of state_dict", list(states[0]), list(states[1]))
    same_tensors(*states, "state_dict", tolerance)


def same_objects(plain, ours):
    """After restore: every module is of the very class of the plain model's, and nothing is left on it."""
    for (name, a), (_, b) in zip(plain.named_modules(), ours.named_modules(), strict=True):
        parametrized = type(a).__module__ == "torch.nn.utils.parametrize"
        classes = [type(m).__bases__ if parametrized else (type(m),) for m in (b, a)]
        agree(classes[0] == classes[1], f"class of {name!r} after restore", *classes)
        agree(vars(a).keys() == vars(b).keys(), f"attributes of {name!r} after restore", *map(list, map(vars, (b, a))))
