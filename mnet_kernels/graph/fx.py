"""Rows of layers in a torch.fx.GraphModule, whose code calls modules one by one: traced models, feature extractors.

A row of which only the end is used becomes one call, :func:`fused_row` of the modules themselves, which the graph takes
from where they are: what is put in their place later counts, and the state_dict is what it was.  Traced again, pickled
or quantised, it is the modules.
"""

import torch
from torch import fx

from .. import context
from . import eligibility
from .plan import steps
from .read import row

LONGEST_ROW = 9  # modules: three layers, each a convolution, a batch norm and an activation


def fused_row(x, *modules, backend=None, mode=None):
    """What modules called one after another give, fused where it may be."""
    looked_at = not isinstance(x, torch.Tensor) or eligibility.global_hooks() or context.why_native(x)
    if not (looked_at or context.watched()):
        block = row(modules)
        if block is not None and block.why_native() is None:
            (step,), _ = steps([block._replace(pins=(backend, mode))])
            return step.run(x)
    for module in modules:
        x = module(x)
    return x


def fuse_rows(graph_module, pins):
    """Put :func:`fused_row` in the place of every row; returns each one's first and last module's targets and op."""
    found = {}
    for graph in _graphs(graph_module):
        for chain in _chains(graph):
            while chain:
                taken = _longest([graph_module.get_submodule(node.target) for node in chain[:LONGEST_ROW]])
                if taken is None:
                    chain = chain[1:]
                    continue
                block, count = taken
                nodes, chain = chain[:count], chain[count:]
                _replace(graph, nodes, pins)
                found[nodes[0].target, nodes[-1].target, block.op] = None
    if found:
        graph_module.recompile()
    return list(found)


def _longest(modules):
    """(the longest Block at the start of a list of modules, how many it takes), or None.

    A graph may call a whole layer, a sequence, as one.
    """
    for end in range(len(modules), 0, -1):
        block = row(modules[:end])
        if block is not None and block.why_native() is None:
            return block, end
    return None


def _graphs(graph_module):
    """Its graph and, of torchvision's extractors, those of training and eval mode."""
    found = [graph_module.graph, *(g for g in vars(graph_module).values() if isinstance(g, fx.Graph))]
    return list({id(graph): graph for graph in found}.values())


def unfuse_rows(graph_module):
    """Undo it; returns whether there was anything to undo."""
    nodes = _rows(graph_module)
    for node in nodes:
        graph, (x, *modules) = node.graph, node.args
        with graph.inserting_before(node):
            for module in modules:
                x = graph.call_module(module.target, (x,))
        node.replace_all_uses_with(x)
        graph.erase_node(node)
        for module in modules:
            graph.erase_node(module)
    if nodes:
        graph_module.recompile()
    return bool(nodes)


def fused_convolutions(graph_module):
    """The convolutions that rows of the graph run now."""
    found = []
    for node in _rows(graph_module):
        block = row([graph_module.get_submodule(module.target) for module in node.args[1:]])
        if block is not None and block.why_native() is None:
            found += block.convolutions
    return found


def called(graph_module):
    """The names of the modules that its graphs call."""
    nodes = (node for graph in _graphs(graph_module) for node in graph.nodes)
    return list(dict.fromkeys(node.target for node in nodes if node.op == "call_module"))


def _rows(graph_module):
    nodes = (node for graph in _graphs(graph_module) for node in graph.nodes)
    return [node for node in nodes if node.op == "call_function" and node.target is fused_row]


def _is_call(node):
    alone = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
    return node.op == "call_module" and alone


def _chains(graph):
    """Lists of calls of modules, each of the one before alone, which nothing else uses."""
    seen = set()
    for node in graph.nodes:
        if not _is_call(node) or node in seen:
            continue
        chain = [node]
        while len(chain[-1].users) == 1:
            (follower,) = chain[-1].users
            if not _is_call(follower):
                break
            chain.append(follower)
        seen.update(chain)
        yield chain


def _replace(graph, nodes, pins):
    last = nodes[-1]
    with graph.inserting_before(last):
        modules = [graph.get_attr(node.target) for node in nodes]
        options = {name: pin for name, pin in zip(("backend", "mode"), pins, strict=True) if pin is not None}
        fused = graph.call_function(fused_row, (nodes[0].args[0], *modules), options)
    fused.meta.update(last.meta)
    last.replace_all_uses_with(fused)
    for node in reversed(nodes):
        graph.erase_node(node)
