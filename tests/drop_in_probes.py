"""How users run a model: every rule uses a plain model and its accelerated copy in one way and compares what comes out.

A use is a function of the model that gives {name: tensor}: "out ..." what it computes, "d ..." gradients.
"""

import copy
import importlib
import inspect
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from drop_in_compare import agree, loss_of, same_structure
from drop_in_edits import at, is_block, sequentials
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

PROBES = {}


def probe(function):
    PROBES[function.__name__] = function
    return function


def step(model, x, call=None):
    """Forward and backward of the model, or of ``call`` with its parameters."""
    model.zero_grad(set_to_none=True)
    out = (call or model)(x)
    found = {"out": out.detach()}
    if out.requires_grad:
        loss_of(out).backward()
        found |= {f"d {n}": q.grad for n, q in model.named_parameters()} | {"d x": x.grad}
    model.zero_grad(set_to_none=True)
    return found | {"out x": x.detach()}  # which an activation in place may have changed


@probe
def plain_step(p, d):
    variant = p.variant(d, empty=True)
    p.use("a step", lambda model: step(model, p.input(variant)))
    return f"a step, {variant}"


@probe
def by_keyword(p, d):
    """The input by its name, which is the class's that the user knows."""
    variant = p.variant(d)
    key = next(iter(inspect.signature(p.plain.forward).parameters))
    p.use("a call by keyword", lambda model: step(model, p.input(variant), lambda x: model(**{key: x})))
    return f"a call with {key}="


@probe
def no_grad(p, d):
    variant, context = p.variant(d, empty=True), d.pick([torch.no_grad, torch.inference_mode])

    def use(model):
        with context():
            return {"out": model(p.input(variant))}

    p.use(context.__name__, use)
    return f"{context.__name__}, {variant}"


@probe
def part(p, d):
    """A module called by itself, or a slice of a Sequential."""
    shapes = p.shapes()
    name = d.pick(p.names(is_block))
    module = p.plain.get_submodule(name)
    first, last = 0, None
    slices = isinstance(module, nn.Sequential) and len(module) > 1 and d.pick([True, True, False])
    if slices:
        first = d.pick(range(len(module)))
        last = d.pick(range(first + 1, len(module) + 1))
        start = f"{name}.{list(module._modules)[first]}".lstrip(".")
    shape, _ = shapes.get(start if slices else name, (None, None))
    if shape is None:
        return None

    def use(model):
        module = at(name)(model)
        module = module[first:last] if slices else module
        return step(model, p.tensor(shape).requires_grad_(), module)

    p.use("a slice" if slices else "a part", use, fatal=False)
    return f"{name}[{first}:{last}](x)" if slices else f"{name}(x)"


@probe
def slice_type(p, d):
    """A slice is of the class that plain torch gives it, and has the same state."""
    name = d.pick(sequentials(p, 2))
    plain, ours = p.edit("a slice", lambda model: at(name)(model)[:-1])
    if plain is not None:
        same_structure(plain, ours)
    return f"{name!r}[:-1]"


@probe
def call_with_weights(p, d):
    """functional_call with other weights: their gradients, and those of no others."""
    variant = p.variant(d)

    def use(model):
        given = {n: (1.1 * q.detach()).requires_grad_() for n, q in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        out = functional_call(model, given, (p.input(variant),))
        if not out.requires_grad:
            return {"out": out}
        grads = torch.autograd.grad(loss_of(out), list(given.values()), allow_unused=True)
        agree(all(q.grad is None for q in model.parameters()), "functional_call has gradients of other weights")
        return {"out": out.detach()} | {f"d {n}": g for n, g in zip(given, grads, strict=True)}

    p.use("functional_call", use)
    return "functional_call"


@probe
def transforms(p, d):
    """torch.func: vmap, grad, gradients per sample, jvp; in eval, as torch's batch norms demand."""
    if p.trains() or p.dtype != torch.float64:
        return None
    kind = d.pick(["vmap", "grad", "per sample", "jvp"])

    def use(model):
        x, weights = p.tensor((3, 3, 16, 16)), dict(model.named_parameters())

        def loss(weights, x):
            return functional_call(model, weights, (x,)).square().sum()

        if kind == "vmap":
            return {"out": torch.func.vmap(lambda one: model(one[None])[0], randomness="same")(x).detach()}
        if kind == "jvp":
            return {"out": torch.func.jvp(partial(functional_call, model, weights), (x,), (torch.ones_like(x),))[1]}
        if kind == "grad":
            found = torch.func.grad(loss)(weights, x)
        else:
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")
            found = per_sample(weights, x[:, None])
        return {f"d {n}": g.detach() for n, g in found.items()}

    p.use(f"torch.func, {kind}", use, fatal=False, whole=False)
    return f"torch.func, {kind}"


@probe
def checkpointed(p, d):
    variant, reentrant = p.variant(d), d.pick([False, True])
    name = d.pick(["", *p.names(is_block)])

    def use(model):
        if not name:
            return step(model, p.input(variant), lambda x: checkpoint(model, x, use_reentrant=reentrant))
        block = at(name)(model)
        shape = shapes.get(name, (None,))[0]
        return step(model, p.tensor(shape).requires_grad_(), lambda x: checkpoint(block, x, use_reentrant=reentrant))

    shapes = p.shapes()
    if name and name not in shapes:
        return None
    p.use("checkpoint", use)
    return f"checkpoint of {name!r}, use_reentrant={reentrant}"


@probe
def second_derivative(p, d):
    """A gradient penalty: the derivative of the gradients' square, by every parameter and the input."""
    variant, to_input = p.variant(d), d.pick([True, False])
    if p.dtype != torch.float64:
        return None

    def use(model):
        model.zero_grad(set_to_none=True)
        x = p.input(variant).requires_grad_()
        wanted = [x] if to_input else [q for q in model.parameters() if q.requires_grad]
        grads = torch.autograd.grad(loss_of(model(x)), wanted, create_graph=True, allow_unused=True)
        # without the loss's own gradients, which would be much larger
        sum(g.square().sum() for g in grads if g is not None).backward()
        found = {f"d {n}": q.grad for n, q in model.named_parameters()} | {"d x": x.grad}
        model.zero_grad(set_to_none=True)
        return found

    p.use("a second derivative", use)
    return f"a second derivative, of the input's gradient: {to_input}"


@probe
def autocast(p, d):
    if p.dtype != torch.float32:
        return None
    variant = p.variant(d)

    def use(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=p.running != torch.float64):
            return step(model, p.input(variant))

    p.use("autocast", use, precision=torch.bfloat16)
    return "autocast"


@probe
def not_a_number(p, d):
    """One NaN in one image: on copies, whose statistics it spoils.

    Of the gradients only whether they are all finite, as loss scalers ask: torch's activations set those of masked
    values to zero where fused blocks may multiply by zero, so that fewer of plain torch's are NaN.
    """
    variant = p.variant(d)
    if p.dtype != torch.float64:
        return None

    def use(model):
        model, x = copy.deepcopy(model), p.input(variant)
        with torch.no_grad():
            x[0, 0, 5, 5] = float("nan")
        found = step(model, x)
        grads = [g.isfinite().all() for n, g in found.items() if n.startswith("d ") and g is not None]
        buffers = {f"out {n}": b for n, b in model.named_buffers()}
        return {"out": found["out"], "out gradients are finite": torch.tensor(all(grads))} | buffers

    p.use("NaN", use, fatal=False, whole=False)  # what hooks see of gradients is as little told
    return "NaN in the input"


@contextmanager
def _devices():
    """torch's replicate to "devices" that are 1.1 times the weights, all on the CPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[(1.1 * t.detach() if detach else 1.1 * t) if t.is_floating_point() else t for t in tensors]]

    with (
        mock.patch.object(module, "_broadcast_coalesced_reshape", copies),
        mock.patch.object(module, "_get_device_index", lambda device, *_: device),
    ):
        yield module.replicate


@probe
def replica(p, d):
    """A replica as DataParallel's: its weights are others, their gradients the model's."""
    variant, name = p.variant(d), d.pick(["", "", *p.names(is_block)])
    shape = p.shapes().get(name, (None,))[0] if name else None
    if name and shape is None:
        return None

    def use(model):
        with _devices() as replicate:
            copied = replicate(at(name)(model), ["cpu"])[0]
        return step(model, p.input(variant) if not name else p.tensor(shape), copied)

    p.use("a replica", use)
    return f"a replica of {name!r}"


@probe
def traced(p, d):
    """torch.fx sees the same nodes, and what it makes of them computes the same."""
    name, shapes = d.pick(["", *p.names(is_block)]), p.shapes()
    if name not in shapes or p.patched:  # a patch takes *args, which torch.fx cannot trace
        return None
    shape, _ = shapes[name]

    def use(model):
        graph = torch.fx.symbolic_trace(at(name)(model))
        nodes[model] = [(n.op, n.target if isinstance(n.target, str) else n.target.__name__) for n in graph.graph.nodes]
        return step(model, p.tensor(shape), graph)

    nodes = {}
    p.use("a traced block", use, fatal=False)
    if len(nodes) == 2:
        agree(nodes[p.ours] == nodes[p.plain], f"nodes of {name!r}", nodes[p.ours], nodes[p.plain])
    return f"symbolic_trace({name!r})"


@probe
def compiled(p, d):
    """A block under torch.compile: rarely, it takes a second."""
    name, shapes = d.pick(p.names(is_block)), p.shapes()
    if name not in shapes or p.dtype == torch.float16 or not p.may_compile():
        return None
    shape, _ = shapes[name]

    def use(model):
        torch._dynamo.reset()
        return step(model, p.tensor(shape).requires_grad_(), torch.compile(at(name)(model), backend="eager"))

    p.use("torch.compile", use)
    torch._dynamo.reset()
    return f"torch.compile({name!r})"
