"""Random programs of what users do to a model, on a plain model and on its accelerated copy side by side.

After every step both must be the same: outputs, gradients, statistics, state, structure, what hooks saw, what raises.
test_drop_in_program.py lets hypothesis write the programs; from the command line they are drawn at random:

    python tests/drop_in_program.py --steps 20000 --seed 0 --json bench/results/drop-in-programs.json
"""

import argparse
import collections
import json
import logging
import random
import time
import warnings
from contextlib import contextmanager

import drop_in_state  # noqa: F401  its rules join those of drop_in_edits
import torch
from drop_in_compare import (
    Clearance,
    Disagreement,
    Nothing,
    Seen,
    no_less_exact,
    outcome,
    same_objects,
    same_outcome,
    same_seen,
    same_structure,
    same_tensors,
)
from drop_in_edits import EDITS
from drop_in_models import FAMILIES, SIZE, build
from drop_in_probes import PROBES, step
from torch import nn

import mnet_kernels as mk

RULES = EDITS | PROBES
LAYOUTS = {
    "NCHW": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 2)[:, :, ::2],
}
# Nearer to a kink rounding may turn a mask round, and one value's whole gradient with it.
CLEAR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}


class Draw:
    """Draws at random; test_drop_in_program.py has one that draws from hypothesis."""

    def __init__(self, seed):
        self.number = random.Random(seed).randrange

    def pick(self, options):
        """One of the options."""
        if not len(options):
            raise Nothing
        return options[self.number(len(options))]


def _tensors_of(module):
    return {k: t for k, t in vars(module).items() if isinstance(t, torch.Tensor)}


class Program:
    """A plain model, its accelerated copy, and what was done to both."""

    def __init__(self, family, seed, compilations=1):
        self.family, self.seed, self.compilations, self.log = family, seed, compilations, []
        self.patched, self.global_handles = {}, []
        self.fused = collections.Counter()  # stages that ran
        self.begin()

    def begin(self):
        """With fresh models."""
        self.end()
        self.dtype = self.running = torch.float64
        self.backend, self.handles, self.raised = ("reference", None), [], False
        self.plain, self.ours = build(self.family, self.seed), build(self.family, self.seed)
        self.accelerate("")

    def end(self):
        """Put back what is not the models' own."""
        while self.global_handles:
            self.global_handles.pop().remove()
        for cls in list(self.patched):
            self.unpatch(cls)

    def unpatch(self, cls):
        original = self.patched.pop(cls)
        if original is None:
            del cls.forward
        else:
            cls.forward = original

    # ---- what rules draw from

    def names(self, matches, root=False):
        """Names of the modules that match; of those of a parametrization none."""
        named = [(n, m) for n, m in self.plain.named_modules() if "parametrizations" not in n.split(".")]
        return [n for n, m in named if (n or root) and matches(m)]

    def parameters(self):
        return [n for n, _ in self.plain.named_parameters()]

    def trains(self):
        """Whether a batch norm takes the batch's own statistics."""
        norms = (m for m in self.plain.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        return any(m.training or m.running_mean is None for m in norms)

    def may_compile(self):
        self.compilations -= 1
        return self.compilations >= 0

    def backends(self):
        """Those to choose from: in float64 the reference has them all."""
        names = ["reference"]
        if mk.backends.whole("cpu", "chain"):
            names.append("cpu")
        return [(name, mode) for name in names for mode in (None, "chain", "algebraic")]

    def variant(self, d, empty=False):
        """(layout, images, whether it requires a gradient)."""
        # torch 2.14's own batch norm gives wrong gradients to one image in channels_last if it has a backward hook: the
        # grad_output then has other strides than the input.  Fused blocks give channels_last where plain ones may not.
        hooked = any(m._backward_hooks or m._backward_pre_hooks for m in self.plain.modules())
        sizes = [4, 4, 4, 4 if hooked else 1] + [0] * (empty and not self.trains())
        return d.pick(sorted(LAYOUTS)), d.pick(sizes), d.pick([True, True, False])

    def input(self, variant):
        layout, images, grad = variant
        return LAYOUTS[layout](self.tensor((images, 3, SIZE, SIZE))).requires_grad_(grad)

    def tensor(self, shape):
        """Drawn anew for every step; in the dtype that runs, of values that the models' dtype has."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * len(self.log))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).to(self.running)

    def shapes(self):
        """{name: (shape of its input, of its output)} of the modules that the plain model calls with one tensor."""
        found, names = {}, {id(m): n for n, m in self.plain.named_modules()}

        def look(module, args, out):
            if id(module) in names and len(args) == 1 and isinstance(out, torch.Tensor):
                found[names[id(module)]] = tuple(args[0].shape), tuple(out.shape)

        with self.aside(), torch.no_grad():
            handle = nn.modules.module.register_module_forward_hook(look)
            outcome(lambda: self.plain.eval()(self.tensor((4, 3, SIZE, SIZE))))
            handle.remove()
        return found

    @contextmanager
    def aside(self):
        """A run of the plain model alone, that leaves no trace on it."""
        # a pruned layer's weight is an attribute that every forward computes; torch.fx leaves constants as attributes
        kept = [(m, m.training, _tensors_of(m)) for m in self.plain.modules()]
        state = {n: t.detach().clone() for n, t in self._tensors(self.plain)}
        try:
            yield
        finally:
            for m, m.training, attributes in kept:
                for k in _tensors_of(m):
                    del vars(m)[k]
                vars(m).update(attributes)
            for n, t in self._tensors(self.plain):
                t.data.copy_(state[n])

    # ---- what rules do

    def accelerate(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, raised = outcome(lambda: mk.accelerate(self.ours.get_submodule(name)))
        if raised is not None:
            raise Disagreement(f"accelerate({name!r}) raises {raised!r}")

    def restore(self, name):
        _, raised = outcome(lambda: mk.restore(self.ours.get_submodule(name)))
        if raised is not None:
            raise Disagreement(f"restore({name!r}) raises {raised!r}")
        if name in dict(self.ours.named_modules()):
            same_objects(self.plain.get_submodule(name), self.ours.get_submodule(name))

    def both(self, call, whole=True):
        """Outcomes of (ours, plain), each with what hooks saw."""
        found = []
        for model in (self.ours, self.plain):
            torch.manual_seed(self.seed + len(self.log))
            name = "reference" if self.dtype == torch.float64 else self.backend[0]
            with mk.backend(name, self.backend[1]), mk.count_stages() as counts:
                found.append(outcome(lambda model=model: Seen.run(model, lambda: call(model), whole)))
            self.fused += counts
        return found

    def edit(self, what, call, runs=False):
        """Change both; returns what the change gave for (plain, ours)."""
        if runs and self.dtype != torch.float64:
            self.both_alike(call)
            return None, None
        found = self.both(call)
        if not same_outcome(*found, what):
            self.raised |= runs
            return None, None
        return found[1][0][0], found[0][0][0]

    def both_alike(self, call):
        """A change by numbers that differ in the last places: ours gets the plain model's."""
        if not same_outcome(*self.both(call), "a change"):
            self.raised = True
        self.even_out()

    def replace(self, what, call):
        """Go on with other models, of which no handles are known."""
        found = self.both(call)
        if same_outcome(*found, what):
            (self.ours, _), (self.plain, _) = (result for result, _ in found)
            self.handles.clear()

    def use(self, what, call, fatal=True, whole=True, precision=None):
        """Run both and compare: in float64 to rounding, else by the errors against the plain model in float64."""
        low = precision or self.dtype != torch.float64
        exact, least = self.exactly(call) if low else (None, None)
        got, want = self.both(call, whole)
        if not same_outcome(got, want, what):
            self.raised |= fatal
            if low:
                self.even_out()
            return
        (mine, seen), (theirs, also_seen) = got[0], want[0]
        same_seen(seen, also_seen, what, exact=not low)
        if not low:
            same_tensors(mine, theirs, what)
        else:
            self.judge(mine, theirs, exact, precision or self.dtype, least, what)

    def judge(self, mine, theirs, exact, dtype, least, what):
        """The pass rule of low precision: of gradients only where no mask can turn round."""
        buffers = [{f"out {n}": b for n, b in m.named_buffers()} for m in (self.ours, self.plain)]
        buffers = [{n: b for n, b in some.items() if b.is_floating_point()} for some in buffers]
        if exact is not None:
            results = [some | own for some, own in zip((mine, theirs), buffers, strict=True)]
            if least < CLEAR[dtype]:
                results = [{n: t for n, t in some.items() if n.startswith("out")} for some in (*results, exact)]
                exact = results.pop()
            no_less_exact(*results, exact, dtype, what)
        self.even_out()

    def exactly(self, call):
        """What the plain model gives in float64, buffers included; and how near to a kink it came."""
        self.plain.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed + len(self.log))
        with self.aside():
            self.plain.double()
            self.running = torch.float64
            with Clearance() as clearance:
                found, raised = outcome(lambda: call(self.plain))
            if raised is None:
                named = self.plain.named_buffers()
                found = found | {f"out {n}": b.clone() for n, b in named if b.is_floating_point()}
            self.plain.to(self.dtype)
            self.running = self.dtype
        return found, clearance.least

    def even_out(self):
        """Give ours the plain model's numbers, where theirs were rightly rounded otherwise."""
        for (_, ours), (_, plain) in zip(self._tensors(self.ours), self._tensors(self.plain), strict=True):
            if ours.shape == plain.shape and not torch.equal(ours, plain):
                ours.data.copy_(plain.data)

    @staticmethod
    def _tensors(model):
        return [*model.named_parameters(), *model.named_buffers()]

    # ---- one step of the program

    def run(self, rule, d):
        """One step: the rule, then everything compared."""
        self.log.append(rule)
        self.running = self.dtype
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    done = RULES[rule](self, d)
                except Nothing:
                    done = None
                self.running = self.dtype
                self.log[-1] = done or f"{rule}: nothing to do"
                self.check(self.variant(d) if rule in EDITS and done else None)
        except Disagreement as exc:
            raise Disagreement(f"{exc}\n{self}") from exc
        return done is not None

    def check(self, variant):
        """The invariant; ``variant`` of an input, or None where both have just been run."""
        same_structure(self.plain, self.ours)
        if variant is not None:
            self.use("the step after it", lambda model: step(model, self.input(variant)))
            same_structure(self.plain, self.ours)
        if self.raised:  # part of a forward has been done, and torch does not say which
            self.log.append("both raised: fresh models")
            self.begin()

    def __str__(self):
        return "\n".join([f"program on {self.family!r}, seed {self.seed}:", *(f"  {line}" for line in self.log)])


@contextmanager
def program(*args, **options):
    """A program whose traces on the process are wiped off at the end."""
    found = Program(*args, **options)
    try:
        yield found
    finally:
        found.end()


def random_program(seed, steps, rules=None, compilations=0):
    """(program, steps by rule, the failure or None): only some of the rules, drawn for this program, take part."""
    draw, counts = Draw(seed), collections.Counter()
    family, names = draw.pick(sorted(FAMILIES)), sorted(rules or RULES)
    chosen = [name for name in names if draw.number(2)] or names
    failure = found = None
    try:
        with program(family, seed, compilations) as found:
            for _ in range(steps):
                rule = draw.pick(chosen)
                counts[rule] += 1
                found.run(rule, draw)
    except Exception as exc:  # noqa: BLE001  a Disagreement, or a fault of the program's own: a failure too
        failure = exc
    return found, counts, failure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps in all")
    parser.add_argument("--length", type=int, default=25, help="steps of one program")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the next ones count on from it")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=sorted(RULES), metavar="RULE", help="rules to leave out"
    )
    parser.add_argument("--json", help="file to write the summary to")
    args = parser.parse_args(argv)
    logging.getLogger("mnet_kernels").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    rules = set(RULES) - set(args.without)
    began, seed = time.monotonic(), args.seed
    steps, failures, fused = collections.Counter(), [], 0
    while steps.total() < args.steps:
        found, counts, failure = random_program(seed, args.length, rules, compilations=seed % 20 == 0)
        steps += counts
        if failure is not None:
            failures.append({"seed": seed, "rule": list(counts)[-1], "what": str(failure).splitlines()})
            print(f"seed {seed}: {failure}\n", flush=True)
        fused += 0 if found is None else sum(n for name, n in found.fused.items() if not name.startswith("native"))
        seed += 1
    summary = {
        "command": f"python tests/drop_in_program.py --steps {args.steps} --length {args.length} --seed {args.seed}",
        "without": args.without,
        "torch": torch.__version__,
        "mnet_kernels": mk.__version__,
        "programs": seed - args.seed,
        "steps": steps.total(),
        "equal": steps.total() - len(failures),
        "fused_stages": fused,
        "seconds": round(time.monotonic() - began),
        "steps_by_rule": dict(sorted(steps.items())),
        "failures": failures,
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(summary, file, indent=1)
            file.write("\n")
    print(json.dumps({k: v for k, v in summary.items() if k != "failures"}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
