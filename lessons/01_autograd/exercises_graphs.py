"""Lesson 01, the second part: the order of a graph, and the walk back through it."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft.array import asarray, xp
from tinyft.learn.diagnose import close, undo_broadcasting
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import sizes
from tinyft.tensor import Tensor, topological


def tensor(a):
    return Tensor(asarray(np.array(a, np.float64)), requires_grad=True)


# ── topological, backward ─────────────────────────────────────────────────────────────────────────
topological_order = Exercise(
    "tensor:topological", difficulty=3, minutes=20, hints=(
        "A node is a Record, which knows its parents(), or a leaf.  Start at root.node.  A node "
        "may come into the order when all its parents are in it.",
        "Look at a node twice: when it is first met, put its parents on the stack above it; when "
        "it is met again, they are done, and so is it.",
        "The stack holds pairs (node, done).  Push (node, True), then (p, False) for each parent; "
        "keep the ids of the nodes that were met in a set."))


@st.composite
def graphs(draw):
    """[(i, j), ...]: node 0 is a leaf, node k + 1 is made of the nodes i and j before it."""
    return [(draw(st.integers(0, k)), draw(st.integers(0, k))) for k in range(draw(sizes()))]


def built(pairs, x=1.0):
    """All tensors of such a graph: sums where i < j, else products."""
    made = [tensor(x)]
    for i, j in pairs:
        made.append(made[i] + made[j] if i < j else made[i] * made[j])
    return made


def below(node):
    """The ids of a node and of all it was made from."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        if id(node) not in found:
            found.add(id(node))
            todo += [] if isinstance(node, Tensor) else node.parents()
    return found


@topological_order.law("every node that the root was made from stands in the list, once",
                       graph=graphs())
def _(f, graph):
    made = built(graph)
    below_root = below(made[-1].node)
    used = [t.node for t in made if id(t.node) in below_root]
    order = [id(n) for n in f(made[-1])]
    times = np.array([order.count(id(n)) for n in used])
    close(times, np.ones(len(used)), "how often each node is in the list",
          {"the leaf is left out": np.array([0, *np.ones(len(used) - 1)])})


@topological_order.law("the inputs of a node stand before it", graph=graphs())
def _(f, graph):
    order = f(built(graph)[-1])
    seen = set()
    late = []
    for n in order:
        seen.add(id(n))
        late.append(0 if isinstance(n, Tensor) else sum(id(p) not in seen for p in n.parents()))
    last = [0 if isinstance(n, Tensor) else len(list(n.parents())) for n in order]
    guesses = {}
    if late == last:
        guesses["it is the order turned round, outputs before inputs"] = np.array(last)
    close(np.array(late), np.zeros(len(late)), "how many inputs of each node come after it",
          guesses)


@topological_order.law("a graph of 3,000 nodes in a row is no deeper than one of three", x="size")
def _(f, x):
    y = tensor(float(x))
    for _ in range(3000):
        y = y + 1.0
    close(np.array(len(f(y))), np.array(3001), "the length of the list")


def by_recursion(root, after=True):
    order, seen = [], set()

    def visit(node):
        if id(node) not in seen:
            seen.add(id(node))
            if not after:
                order.append(node)
            for p in [] if isinstance(node, Tensor) else node.parents():
                visit(p)
            if after:
                order.append(node)
    visit(root.node)
    return order


@topological_order.wrong_answer("Recursion is how one walks a graph.", says="RecursionError",
                                subtle=True)
def _(root):
    return by_recursion(root)


@topological_order.wrong_answer("A node is done when it is met.", says="come", subtle=False)
def _(root):
    order, seen, todo = [], set(), [root.node]
    while todo:
        node = todo.pop(0)
        if id(node) not in seen:
            seen.add(id(node))
            order.insert(0, node)
            todo += [] if isinstance(node, Tensor) else node.parents()
    return order


@topological_order.wrong_answer(
    "The walk goes from the output to the inputs, so that is the order.",
    says="turned round", subtle=True)
def _(root):
    return topological(root)[::-1]


@topological_order.wrong_answer("Leaves were not computed, so they are no nodes.",
                                says="leaf is left out")
def _(root):
    return [n for n in topological(root) if not isinstance(n, Tensor)]


@topological_order.wrong_answer("A node used twice comes twice.", says="expected")
def _(root):
    return [n for n in topological(root) for _ in (0, 1)]


backward = Exercise(
    "tensor:Tensor.backward", difficulty=4, minutes=30, lines=12, hints=(
        "Keep the gradient of every node in a dict, by id(node).  It starts with {id(self.node): "
        "gradient}; a tensor of one element begins with a one.",
        "Go through topological(self) from its end.  A leaf (a Tensor) adds what arrived to its "
        ".grad; a Record gives node.pull(g), pairs of a parent and what comes back to it.",
        "What comes back has the shape of the result; sum_to(gp, p.shape) brings it to the "
        "parent's.  It is added to what the parent has already."))


@backward.law("y = 3 x sends 3 g back to x", x="n", g="n")
def _(f, x, g):
    x = tensor(x)
    f(x * 3.0, g)
    close(x.grad, 3 * g, "x.grad")


@backward.law("a tensor of one element needs no gradient: it starts with 1", x="size")
def _(f, x):
    x = tensor(x)
    f(x * 3.0)
    close(x.grad, 3.0, "x.grad of 3x")


@backward.law("a tensor that is used twice gets both parts", x="n", g="n")
def _(f, x, g):
    x = tensor(x)
    f(x * 2.0 + x * 3.0, g)
    guesses = {"one of its two uses is lost: parts are added up, the second does not replace the "
               "first":
                   2 * g,
               "one of its two uses is lost: the second": 3 * g}
    close(x.grad, 5 * g, "x.grad of 2x + 3x", guesses)


@backward.law("a node waits until everything made of it has reported:  b = 3a;  y = a + b", x="n",
              g="n")
def _(f, x, g):
    for turned in (False, True):
        leaf = tensor(x)
        a = leaf * 2.0
        b = a * 3.0
        f(b + a if turned else a + b, g)
        guesses = {"a was passed before b had reported to it: outputs must come before inputs "
                   "(topological)": 2 * g,
                   "one of the two ways to a is lost": 6 * g}
        close(leaf.grad, 8 * g, "x.grad of a + 3a, a = 2x", guesses)


@backward.law("what was repeated by broadcasting is summed", a="n m", x="m", g="n m")
def _(f, a, x, g):
    x = tensor(x)
    f(x * Tensor(asarray(a)), g)
    close(x.grad, (g * a).sum(axis=0), "x.grad")


@backward.law("any graph: the slope that dual numbers give", graph=graphs(), x=st.integers(-2, 2))
def _(f, graph, x):
    made, duals = built(graph, float(x)), [(float(x), 1.0)]
    for i, j in graph:
        (u, du), (v, dv) = duals[i], duals[j]
        duals.append((u + v, du + dv) if i < j else (u * v, u * dv + du * v))
    f(made[-1])
    close(np.zeros(()) if made[0].grad is None else made[0].grad, np.array(duals[-1][1]), "x.grad")


@backward.law("a second backward adds to .grad", x="n", g="n", h="n")
def _(f, x, g, h):
    x = tensor(x)
    f(x * 1.0, g)
    f(x * 1.0, h)
    close(x.grad, g + h, "x.grad after two", {"it is that of the second alone": h})


def walk(self, gradient=None, order=topological, parts="add", leaves="add", undo=undo_broadcasting):
    """A plain backward, with an argument for each error."""
    grads = {id(self.node): xp(self.data).ones(self.shape) if gradient is None else gradient}
    for node in reversed(order(self)):
        g = grads.pop(id(node), None)
        if g is None:
            continue
        if isinstance(node, Tensor):
            node.grad = g.copy() if node.grad is None or leaves == "put" else node.grad + g
            continue
        for p, gp in node.pull(g):
            gp = undo(gp, p.shape)
            grads[id(p)] = grads[id(p)] + gp if id(p) in grads and parts == "add" else gp


@backward.wrong_answer("A gradient is assigned: .grad = g.", says="lost")
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, parts="put")


@backward.wrong_answer("A node can be passed as soon as it is reached.", says="topological")
def _(self, gradient=None, retain_graph=False):
    def as_met(root):
        order, seen, todo = [], set(), [root.node]
        while todo:
            node = todo.pop(0)
            if id(node) not in seen:
                seen.add(id(node))
                order.append(node)
                todo += [] if isinstance(node, Tensor) else node.parents()
        leaves = [n for n in order if isinstance(n, Tensor)]
        return [*leaves, *[n for n in order if not isinstance(n, Tensor)][::-1]]
    walk(self, gradient, as_met)


@backward.wrong_answer("What comes back has the shape of what went in.", says="not summed",
                       subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, undo=lambda g, shape: g)


@backward.wrong_answer("A new backward is a new gradient.", says="second alone", subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, leaves="put")
