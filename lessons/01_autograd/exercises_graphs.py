"""Lesson 01, the second part: the order of a graph, and the walk back through it."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft.array import asarray, xp
from tinyft.learn.diagnose import Unusable, close, undo_broadcasting
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import sizes
from tinyft.tensor import Tensor, topological


def tensor(a):
    return Tensor(asarray(np.array(a, np.float64)), requires_grad=True)


# ── topological, backward ─────────────────────────────────────────────────────────────────────────
topological_order = Exercise(
    "tensor:topological", difficulty=3, minutes=20, hints=(
        "A node is a Record, which knows its parents(), or a leaf.  Start at root.node.  Append a "
        "node to the order only when all its parents are in it.",
        "Meet every node twice.  At the first meeting, put it back on the stack, with its parents "
        "above it.  At the second meeting its parents are done: append the node.",
        "The stack holds pairs (node, done).  Push (node, True), then (p, False) for each parent.  "
        "Keep the ids of the nodes that you met in a set."),
    may_use="root.node; node.parents() of a Record; isinstance(node, Tensor), which is True for a "
            "leaf (it has no parents); id(node), lists and sets.  In the messages of the check, "
            "graph = [(0, 0), (1, 0)] means: node 0 is a leaf, node 1 is made of 0 and 0, node 2 "
            "of 1 and 0.",
    example="""
        >>> x = Tensor(np.array(2.0), requires_grad=True)
        >>> u = x * 3.0
        >>> y = u + u * u
        >>> [getattr(node, "name", "leaf") for node in topological(y)]
        ['leaf', 'mul', 'mul', 'add']
        """)


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
    once = np.ones(len(used), int)
    close(times, once, "how often each node is in the list",
          {"the leaf is left out": np.array([0, *once[1:]])})
    close(len(order), len(used), "the length of the list")


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
    close(np.array(late), np.zeros(len(late), int),
          "how many inputs of each node of the list come after it", guesses)


@topological_order.law("a leaf alone is a graph of one node", x="n")
def _(f, x):
    leaf = tensor(x)
    order = list(f(leaf))
    if len(order) != 1 or order[0] is not leaf.node:
        raise Unusable(f"for a leaf, the list should hold the leaf alone; yours: {order!r:.60}")


@topological_order.law("an input that needs no gradient is not in the list", x="n")
def _(f, x):
    frozen = Tensor(asarray(np.array(x, np.float64)))
    close(len(f(tensor(x) * frozen + frozen)), 3, "the length of the list for x * frozen + frozen")


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


@topological_order.wrong_answer("The root was computed, so it is a Record.",
                                says="AttributeError", subtle=True)
def _(root):
    if not isinstance(root.node, Tensor):
        return topological(root)
    return [p for p in root.node.parents()]


@topological_order.wrong_answer("A graph has five nodes at most.", says="the length of the list")
def _(root):
    return topological(root)[-5:]


backward = Exercise(
    "tensor:Tensor.backward", difficulty=4, minutes=30, lines=14, hints=(
        "Keep the gradient of every node in a dict, by id(node).  It starts with {id(self.node): "
        "gradient}.  For a tensor of one element, the first gradient is an array of ones.",
        "Go through topological(self) from its end.  A leaf (a Tensor) adds its gradient to "
        ".grad if it trains.  A Record gives node.pull(g): pairs of a parent and its gradient.",
        "A pullback's gradient may have the shape of the result; sum_to(d, parent.shape) gives it "
        "the parent's.  Add it to the gradient that the parent has already, with a + b and not "
        "+=.  Then call node.release(), unless retain_graph."),
    may_use="topological(self), self.node, node.pull(g), node.release(), leaf.requires_grad, "
            "a dict, and sum_to (from tinyft.tensor import sum_to).  Each op returns one value "
            "here, so you do not need Part.",
    example="""
        >>> x = Tensor(np.array([1., 2.]), requires_grad=True)
        >>> y = x * x
        >>> backward(y, np.array([1., 10.]))
        >>> print(x.grad)
        [ 2. 40.]
        """)


@backward.law("y = 3 x sends 3 g back to x", x="n", g="n")
def _(f, x, g):
    x = tensor(x)
    f(x * 3.0, g)
    close(x.grad, 3 * g, "x.grad")


@backward.law("a tensor of one element needs no gradient: it starts with 1", x="size")
def _(f, x):
    for shape in ((), (1, 1)):
        leaf = tensor(np.full(shape, float(x)))
        f(leaf * 3.0)
        close(leaf.grad, np.full(shape, 3.0), f"x.grad of 3x, x of shape {shape}")


@backward.law("a tensor that is used twice gets both parts", x="n", g="n")
def _(f, x, g):
    x = tensor(x)
    f(x * 2.0 + x * 3.0, g)
    guesses = {"one of its two uses is lost: parts are added up, the second does not replace the "
               "first":
                   2 * g,
               "one of its two uses is lost: the second": 3 * g}
    close(x.grad, 5 * g, "x.grad of 2x + 3x", guesses)


@backward.law("a node waits until all nodes that use it are processed:  b = 3a;  y = a + b", x="n",
              g="n")
def _(f, x, g):
    for turned in (False, True):
        leaf = tensor(x)
        a = leaf * 2.0
        b = a * 3.0
        f(b + a if turned else a + b, g)
        guesses = {"a was processed before b had added its gradient: outputs must come before "
                   "inputs (topological)": 2 * g,
                   "one of the two ways to a is lost": 6 * g}
        close(leaf.grad, 8 * g, "x.grad of a + 3a, a = 2x", guesses)


@backward.law("a + b: each of the two gets a gradient of its own", x="n", g="n")
def _(f, x, g):
    a, b = tensor(x), tensor(x)
    f(a + b, g)
    f(a + b, g)
    close(a.grad, 2 * g, "a.grad after two", {"it is that of the second alone": g})
    close(b.grad, 2 * g, "b.grad after two", {"a.grad and b.grad are one array": 3 * g})


@backward.law("the array in .grad belongs to one leaf alone", x="n", g="n")
def _(f, x, g):
    a, b = tensor(x), tensor(x)
    f(a + b, g)
    close(b.grad, g, "b.grad of a + b")
    a.grad += 1
    close(b.grad, g, "b.grad, after a.grad += 1", {"they are one array": g + 1})


@backward.law("an array that a pullback gives may be read-only:  y = Σ x + Σ x²", x="n")
def _(f, x):
    for turned in (False, True):
        leaf = tensor(x)
        total, squares = leaf.sum(), (leaf * leaf).sum()
        f(squares + total if turned else total + squares)
        close(leaf.grad, 1 + 2 * x, "x.grad of Σ x + Σ x²")


@backward.law("float32 stays float32", x="size")
def _(f, x):
    leaf = Tensor(asarray(np.array(x, np.float32)), requires_grad=True)
    f(leaf * leaf)
    close(leaf.grad, np.array(2 * x, np.float32), "x.grad of x²")


@backward.law("a leaf alone works, and so do 3,000 nodes in a row", x="size")
def _(f, x):
    leaf = tensor(float(x))
    f(leaf)
    close(leaf.grad, 1.0, "x.grad of x")
    y = leaf
    for _ in range(3000):
        y = y + 1.0
    f(y)
    close(leaf.grad, 2.0, "x.grad of x and x + 1 + 1 + ...")


@backward.law("retain_graph=True: a graph that is walked twice", x="n", g="n")
def _(f, x, g):
    leaf = tensor(x)
    y = leaf * leaf
    f(y, g, retain_graph=True)
    f(y, g)
    close(leaf.grad, 4 * x * g, "x.grad after two walks of x²")


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


@backward.law("a leaf that was frozen after its use gets no gradient", x="n", g="n")
def _(f, x, g):
    a, b = tensor(x), tensor(x)
    y = a * 2.0 + b
    a.train(False)
    f(y, g)
    close(b.grad, g, "b.grad of 2a + b")
    if a.grad is not None:
        raise Unusable("a.train(False) was called before backward: a.grad should stay None")


@backward.law("the graph is released, unless retain_graph=True", x="n", g="n")
def _(f, x, g):
    leaf = tensor(x)
    y = leaf * leaf
    f(y, g)
    if y.node.pulls is not None:
        raise Unusable("the graph was kept: call node.release() once a Record's pullbacks are done")


def walk(self, gradient=None, order=topological, parts="add", leaves="add", undo=undo_broadcasting,
         seed=None, release=True):
    """A plain backward, with an argument for each error."""
    if gradient is None:
        gradient = xp(self.data).ones(self.shape, self.dtype) if seed is None else seed
    grads = {id(self.node): gradient}
    for node in reversed(order(self)):
        g = grads.pop(id(node), None)
        if g is None:
            continue
        if isinstance(node, Tensor):
            store(node, g, leaves)
            continue
        for p, gp in node.pull(g):
            gp = undo(gp, p.shape)
            if id(p) not in grads or parts == "put":
                grads[id(p)] = gp
            elif parts == "into":
                grads[id(p)] += gp
            else:
                grads[id(p)] = grads[id(p)] + gp
        if release:
            node.release()


def store(leaf, g, how):
    """Put the gradient of a leaf into its .grad; how: "add", or one of the errors."""
    if not (leaf.requires_grad or how == "frozen"):
        return
    if leaf.grad is None or how == "put":
        leaf.grad = g if how in ("into", "borrow") else g.copy()
    elif how == "into":
        leaf.grad += g
    else:
        leaf.grad = leaf.grad + g


@backward.wrong_answer("A gradient is assigned: .grad = g.", says="lost")
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, parts="put", release=not retain_graph)


@backward.wrong_answer("A node can be processed as soon as it is reached.", says="topological")
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
    walk(self, gradient, as_met, release=not retain_graph)


@backward.wrong_answer("What comes back has the shape of what went in.", says="not summed",
                       subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, undo=lambda g, shape: g, release=not retain_graph)


@backward.wrong_answer("A new backward is a new gradient.", says="second alone")
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, leaves="put", release=not retain_graph)


@backward.wrong_answer("A gradient that a pullback returned may be changed in place.",
                       says="changed its argument")
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, parts="into", release=not retain_graph)


@backward.wrong_answer("The array that arrives first becomes .grad.", says="a.grad after two")
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, leaves="into", release=not retain_graph)


@backward.wrong_answer("No other code writes into .grad.", says="they are one array", subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, leaves="borrow", release=not retain_graph)


@backward.wrong_answer("The loss has no axes, so it starts with the number 1.",
                       says="should be an array of shape (1, 1)")
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, seed=np.float64(1.0), undo=lambda g, shape: g.reshape(g.shape),
         release=not retain_graph)


@backward.wrong_answer("The first gradient is 1, whatever its dtype.", says="dtype is float64",
                       subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, seed=asarray(np.ones(self.shape)), release=not retain_graph)


@backward.wrong_answer("A graph is walked once.", says="released", subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, release=True)


@backward.wrong_answer("Each path from the loss to a leaf is followed by itself.",
                       says="RecursionError")
def _(self, gradient=None, retain_graph=False):
    def follow(node, g):
        if isinstance(node, Tensor):
            node.grad = g.copy() if node.grad is None else node.grad + g
            return
        for p, gp in node.pull(g):
            follow(p, undo_broadcasting(gp, p.shape))
    follow(self.node, xp(self.data).ones(self.shape, self.dtype) if gradient is None else gradient)


@backward.wrong_answer("Python frees what nobody needs any more.", says="the graph was kept",
                       subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, release=False)


@backward.wrong_answer("Every leaf in the graph trains.", says="should stay None", subtle=True)
def _(self, gradient=None, retain_graph=False):
    walk(self, gradient, leaves="frozen", release=not retain_graph)
