# %% [markdown]
# # 01 Tensors and autograd
#
# **Reading:** 45 minutes. **You need:** Python, NumPy, the chain rule.
# **Exercises:** sum_to, matmul, softmax, layer_norm, topological, backward (about two
# hours).
#
# Training asks one question again and again: if this parameter changes a little, how
# much does the loss change? The answer is a derivative. A small language model has
# 200,000 parameters, so it needs 200,000 derivatives for every step of training. This
# lesson computes all of them in one pass.
#
# We begin with an engine of thirty lines for single numbers. Then we let it grow until
# it is the engine of tinyft, which handles arrays. At the end it trains a first model
# on real text. The next cell imports what we use; each name is explained where it first
# appears.

# %%
import time
import tracemalloc

import numpy as np

import tinyft as ft
from tinyft.learn.draw import bars, curves, diagram, heat_map
from tinyft.learn.lessons import quote
from tinyft.tensor import Gradients, op, sum_to, topological

rng = np.random.default_rng(0)

# %% [markdown]
# ## A slope, the slow way
#
# Take $y = x^2 + 3x$ at $x = 2$. Move $x$ a little and watch $y$. We move it by $h$ to
# both sides, because this is more exact than one side alone.

# %%
def f(x):
    return x * x + 3 * x

h = 1e-6
slope = (f(2 + h) - f(2 - h)) / (2 * h)
print(f"slope: {slope:.4f}")

# %% [check]
assert abs(slope - 7) < 1e-6

# %% [markdown]
# The calculus answer is $2x + 3 = 7$. Two evaluations gave us one slope. For 200,000
# parameters we would need 400,000 evaluations.
#
# There is a better way. While we compute $y$, we write down the steps of the
# computation. Then we apply the chain rule backwards through this record.
#
# ## Numbers that remember
#
# A `Number` holds a value and its **parents**: the numbers it was computed from. Beside
# each parent it holds the **local derivative**: if this parent alone changes by a tiny
# amount, the value changes by the local derivative times this amount. For $a + b$ both
# local derivatives are 1. For $a \cdot b$ the local derivative for $a$ is $b$, and the
# one for $b$ is $a$.

# %%
class Number:
    def __init__(self, value, parents=()):
        self.value = value
        self.parents = parents          # pairs (parent, local derivative)
        self.grad = 0.0

    def __add__(self, other):
        return Number(self.value + other.value, [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        return Number(self.value * other.value,
                      [(self, other.value), (other, self.value)])

# %% [markdown]
# The attribute `grad` is still 0. It will hold the **gradient** of the number: the
# derivative of the final result with respect to this number.
#
# Here is a small computation: $u = 3x$, $v = u \cdot u$, $y = u + v$ at $x = 2$.

# %%
def compute(start):
    x = Number(start)
    u = Number(3.0) * x
    v = u * u
    y = u + v
    return {"x": x, "u": u, "v": v, "y": y}

graph = compute(2.0)
for name, number in graph.items():
    slopes = [slope for parent, slope in number.parents]
    print(f"{name} = {number.value:<5} local derivatives: {slopes}")

# %% [markdown]
# The parents of $u$ are the constant 3 and $x$, in this order: the slope for $x$ is the
# second one, 3. The parents of $v$ are $u$ and $u$: the same number stands there twice,
# once for each factor, and each factor alone has the slope 6.
#
# Numbers and parents form a **graph**. Each box below shows a value. The text at an
# arrow is the local derivative. (The constant 3 is left out. The arrow from $u$ to $v$
# stands for both factors.)

# %%
diagram(
    {"x": (0, 1, "x = 2"), "u": (1, 1, "u = 3x = 6"), "v": (2, 0, "v = u·u = 36"),
     "y": (3, 1, "y = u + v = 42")},
    [("x", "u", "3"), ("u", "v", "6 and 6"), ("v", "y", "1"), ("u", "y", "1")],
    caption="The graph of y = u + v with u = 3x and v = u·u. Values stand in the "
            "boxes, local derivatives at the arrows.", height=2.2)

# %% [markdown]
# The number $u$ is used three times: once in $y$ and twice in $v$. So $u$ reaches $y$
# on three paths: one directly, two through $v$. The chain rule has two parts:
#
# - along one path, local derivatives are **multiplied**;
# - where several paths meet, their contributions are **added**.
#
# **Predict first.** Go through the picture from right to left, with pencil and paper.
# What is the gradient of $u$, that is $dy/du$? And what is $dy/dx$?

# %%
y_grad = 1.0                                   # y changes as much as y does
v_grad = 1.0 * y_grad
u_grad = 1.0 * y_grad + 6.0 * v_grad + 6.0 * v_grad
x_grad = 3.0 * u_grad
print("dy/du =", u_grad, "  dy/dx =", x_grad)

# %% [check]
assert u_grad == 13
assert x_grad == 39

# %% [markdown]
# $u$ collects $1 + 6 + 6 = 13$, one term for each use. **Why are they added?** Let $u$
# grow by a tiny amount $e$. Then $y$ grows by $1e$ directly, by $6e$ through the first
# factor of $v$, and by $6e$ through the second. All three happen together, so $y$ grows
# by $13e$.
#
# $x$ gets $3 \cdot 13 = 39$. The check by calculus: $y = 3x + 9x^2$, so
# $dy/dx = 3 + 18x = 39$.

# %%
diagram(
    {"x": (0, 1, "x = 2\ngradient 39", "data"),
     "u": (1, 1, "u = 6\ngradient 13", "data"),
     "v": (2, 0, "v = 36\ngradient 1", "data"),
     "y": (3, 1, "y = 42\ngradient 1", "data")},
    [("y", "v", "1·1"), ("y", "u", "1·1"),
     ("v", "u", "6·1 + 6·1"), ("u", "x", "3·13")],
    caption="The same graph on the way back. Each arrow carries local derivative times "
            "gradient; where arrows meet, they add up.", height=2.4)

# %% [markdown]
# ## The engine: order, then walk
#
# We did this by hand in the order $y$, $v$, $u$, $x$. A program has to find such an
# order itself. To **process** a number means: pass its gradient on to its parents. The
# rule: **process a number only after every number that uses it.** Only then is its
# gradient complete.
#
# We find the order in two steps. First we list the numbers from the inputs to the
# result, each number after its parents. This is called a **topological order**. Then we
# walk through the list backwards: now each number comes after all that use it.
#
# The function below makes the list: it first visits the parents of a number, then
# appends the number itself.

# %%
def visit(number, order):
    if number in order:
        return
    for parent, _ in number.parents:
        visit(parent, order)
    order.append(number)

order = []
visit(graph["y"], order)
print("values in topological order:", [number.value for number in order])

# %% [markdown]
# (The first 3 is the constant.) Now we go backwards through this list. Every number
# passes its gradient on: to each parent it **adds** local derivative times gradient.

# %%
def walk_back(numbers):
    for number in numbers:
        for parent, slope in number.parents:
            parent.grad += slope * number.grad

def backward(result):
    order = []
    visit(result, order)
    result.grad = 1.0
    walk_back(reversed(order))

backward(graph["y"])
print({name: number.grad for name, number in graph.items()})

# %% [check]
assert [number.value for number in order] == [3, 2, 6, 36, 42]
assert [number.grad for number in graph.values()] == [39, 13, 1, 1]

# %% [markdown]
# The same gradients as by hand. That is the whole engine: `Number`, `visit`,
# `walk_back`, `backward`. Type it once yourself; it is about thirty lines. This way to
# compute derivatives is called **reverse mode**, or backpropagation.
#
# ## What if the order is wrong?
#
# Let us process $u$ too early: the order is $y$, $u$, $v$. When $u$ passes its gradient
# on to $x$, $v$ has not been processed yet.
#
# **Predict first.** What is the gradient of $x$ for the order $y$, $u$, $v$?

# %%
def gradient_of_x(names):
    graph = compute(2.0)
    graph["y"].grad = 1.0
    walk_back([graph[name] for name in names])
    return graph["x"].grad

print("order y, v, u:", gradient_of_x("yvu"))
print("order y, u, v:", gradient_of_x("yuv"))

# %% [check]
assert gradient_of_x("yvu") == 39
assert gradient_of_x("yuv") == 3

# %% [markdown]
# In the wrong order $u$ knows only the 1 that came from $y$. It passes on
# $3 \cdot 1 = 3$. Later $v$ sends 12 to $u$, but nobody takes them to $x$. There is no
# error message: the gradient is simply too small.
#
# ## What if gradients replace each other?
#
# The other common mistake is one character long: `=` in place of `+=`.

# %%
def walk_back_replacing(numbers):
    for number in numbers:
        for parent, slope in number.parents:
            parent.grad = slope * number.grad         # = in place of +=

graph = compute(2.0)
graph["y"].grad = 1.0
walk_back_replacing([graph[name] for name in "yvu"])
replaced = graph["x"].grad
print("dy/du =", graph["u"].grad, "  dy/dx =", replaced)

# %% [check]
assert replaced == 18

# %% [markdown]
# Of the three contributions to $u$ (1, 6 and 6) only the last one is left. So $u$ has
# the gradient 6 and $x$ has 18.
#
# ## Why not follow every path by itself?
#
# One could also do without an order: take a gradient, follow each path to its end, and
# add up what arrives. The function below does this and counts its steps.

# %%
def follow(number, gradient):
    steps = 0
    for parent, slope in number.parents:
        parent.grad += slope * gradient
        steps += 1 + follow(parent, slope * gradient)
    return steps

graph = compute(2.0)
follow(graph["y"], 1.0)
print("dy/dx =", graph["x"].grad)

# %% [check]
assert graph["x"].grad == 39

# %% [markdown]
# The result is right, too. But how many steps does it take? We compare both on a chain
# of doublings: $a = x + x$, $b = a + a$, and so on. Each doubling has two arrows. Paths
# multiply: two after one doubling, four after two, eight after three.

# %%
by_path = []
in_order = []
for doublings in range(1, 15):
    y = Number(1.0)
    for _ in range(doublings):
        y = y + y
    by_path.append(follow(y, 1.0))
    order = []
    visit(y, order)
    in_order.append(sum(len(number.parents) for number in order))

print(f"steps for 14 doublings: {by_path[-1]:,} by path, {in_order[-1]} in order")
curves({"each path by itself": by_path, "in topological order": in_order},
       x=range(1, 15), xlabel="doublings", ylabel="steps", log="y",
       caption="Steps of the backward pass. Each doubling doubles the number of "
               "paths, but it adds only two arrows.")

# %% [check]
assert by_path[-1] == 2**15 - 2
assert in_order[-1] == 28

# %% [markdown]
# In topological order each arrow is used once, because a number waits until its
# gradient is complete. A transformer (lesson 02) has residual connections: each
# computes $x + f(x)$, so it uses $x$ twice and doubles the number of paths in the same
# way. A model of 12 blocks has 24 of them, two in each block. By path this would be at
# least $2^{25} - 2$ steps: 33 million.
#
# ## From numbers to arrays
#
# A `Number` for every entry of every matrix would be too slow. Let us measure it on one
# product of two matrices with 30 rows and 30 columns.

# %%
def product_of_numbers(A, B):
    entries = []
    for row in A:
        for column in zip(*B):                  # the columns of B
            total = Number(0.0)
            for a, b in zip(row, column):
                total = total + a * b
            entries.append(total)
    return entries

# %% [markdown]
# Each entry creates one `Number` for the 0, 30 for the products and 30 for the sums. We
# time this function and NumPy's `@`; both multiply the same matrix $A$ by itself.

# %%
A = rng.normal(size=(30, 30))
numbers = []
for row in A.tolist():
    numbers.append([Number(entry) for entry in row])

start = time.perf_counter()
entries = product_of_numbers(numbers, numbers)
seconds_numbers = time.perf_counter() - start

start = time.perf_counter()
for _ in range(100):
    A @ A
seconds_array = (time.perf_counter() - start) / 100
print(f"Numbers created: {30 * 30 * (1 + 2 * 30):,}")
print(f"with Numbers: {seconds_numbers * 1e3:.0f} ms")
print(f"with NumPy:   {seconds_array * 1e3:.3f} ms")

# %% [check]
product = np.array([entry.value for entry in entries]).reshape(30, 30)
assert np.allclose(product, A @ A)
assert seconds_numbers > 5 * seconds_array

# %% [markdown]
# So one node of the graph should hold a whole array. The walk stays the same. But what
# is the local derivative of an array with respect to an array? For this product it
# would be a table with one number for every pair of an entry of the result and an entry
# of the input: $900 \cdot 900$ numbers. Most are zero: an entry of the product depends
# on one row of the left matrix only, on 30 of 900 entries. So 97 % of the table is
# zero.
#
# We never need this table. We need only its effect: it turns the gradient of the result
# into the gradient of an input. A function that does this is called a **pullback**.
#
# In this course `g` is always the gradient of the loss with respect to the result of an
# operation. It has the shape of the result. A pullback takes `g` and returns the
# gradient of one input.
#
# ## An op: a value and its pullbacks
#
# An **op** is one operation that the engine knows. We write it as a function on plain
# arrays that returns two things: its value, and a tuple with one pullback for each
# input. Here is an op of our own, $y = x^3$.

# %%
@op("... -> ...")
def cube(x):
    "y = x³.    dx = 3 g x²"
    return x**3, (lambda g: 3 * g * x**2,)

# %% [markdown]
# Read it piece by piece.
#
# - `x**3` is the value.
# - `lambda g: 3 * g * x**2` is the pullback. Each entry of `x` influences one entry of
# `y`, with the local derivative $3x^2$. So we multiply entry by entry.
# - `(..., )` is a tuple of one pullback, because there is one input. The comma belongs
# to it: `(f,)` is a tuple, `(f)` is only `f`.
# - `"y = x³.    dx = 3 g x²"` says the same as mathematics. `dx` is short for the
# gradient of `x`.
# - `"... -> ..."` is the **shape string**: what shapes go in and what shape comes out.
# Three dots stand for any axes. `"... n k, ... k m -> ... n m"` describes a matrix
# product: a letter that stands twice is the same size both times.
# - `@op` makes a function of tensors from this function of arrays. A **`Tensor`** is to
# arrays what `Number` is to numbers: it holds an array, `.data`, and remembers how it
# was made. For a tensor of one entry, `.item()` is that entry as a Python number.
#
# The function of arrays is still there, as `cube.definition`. We call it and its
# pullback. There is no loss yet, so we invent a gradient of the value: (1, 1, 10).

# %%
value, pullbacks = cube.definition(np.array([1.0, 2.0, 3.0]))
gradient_of_value = np.array([1.0, 1.0, 10.0])
print("value:   ", value)
print("pullback:", pullbacks[0](gradient_of_value))

# %% [markdown]
# Now the same op with tensors. `requires_grad=True` says: we want the gradient of this
# tensor. `backward` stores it in `.grad`. The walk begins at `y`, which is not a single
# number here, so we tell `backward` the gradient of `y`.

# %%
x = ft.Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
y = cube(x)
y.backward(gradient_of_value)
print("x.grad:", x.grad)

# %% [check]
assert value.tolist() == [1, 8, 27]
assert pullbacks[0](gradient_of_value).tolist() == [3, 12, 270]
assert x.grad.tolist() == [3, 12, 270]

# %% [markdown]
# All ops of tinyft are written like this. Here are two of them. Two names in them are
# new:
#
# - `match_dtypes(a, b)` gives both inputs one type of number, such as float32.
# - `xp(x)` is the array module to which `x` belongs: NumPy, or CuPy for an array on a
# GPU. So one definition runs on both.

# %%
quote(ft.ops.mul)
quote(ft.ops.tanh)

# %% [markdown]
# The pullbacks of `mul` are the local derivatives of `Number.__mul__`, times `g`. The
# pullback of `tanh` uses the value `y` of the forward pass. This is why training needs
# memory: **what a pullback uses must be kept until the backward pass.** We come back to
# this at the end.
#
# The pullback of a matrix product follows from the rule that contributions add up. In
# $C = AB$ the entries are $C_{ij} = \sum_k A_{ik} B_{kj}$. So $A_{ik}$ is used in every
# column $j$ of $C$, with the factor $B_{kj}$. Its gradient is $\sum_j G_{ij} B_{kj}$,
# where $G$ is the gradient of $C$. As matrices: $dA = G B^\top$. The gradient of $B$ is
# one of the exercises.
#
# ## The same graph with tensors
#
# We repeat $u = 3x$, $v = u \cdot u$, $y = u + v$ at $x = 2$. The argument
# `retain_graph=True` is explained below.

# %%
x = ft.Tensor(np.array(2.0), requires_grad=True)
u = 3.0 * x
v = u * u
y = u + v
y.backward(retain_graph=True)
print(f"y = {y.item()}   dy/dx = {x.grad}")

# %% [markdown]
# The operators `*`, `+` and `@` call the ops `mul`, `add` and `matmul`. Each call
# leaves a **record**: its name, its parents and their pullbacks. `y.node` is the node
# of `y` in the graph: the record of the call that made `y`. A tensor that no op made,
# such as `x`, is a **leaf**, and its node is the tensor itself.
#
# The function `topological(y)` lists the nodes, inputs first, as `visit` did. (It uses
# a list in place of recursion, because Python stops a recursion that is too deep, and
# it sorts the nodes by the order in which they were made.) A record has a method
# `parents()`.

# %%
names = []
for node in topological(y):
    names.append("x, a leaf" if node is x else node.name)
print(names)
print("parents of the last node:", [parent.name for parent in y.node.parents()])

# %% [check]
assert x.grad == 39
assert names == ["x, a leaf", "mul", "mul", "add"]

# %% [markdown]
# The two parents of $y$ are $u$ and $v$; both were made by `mul`. The constant 3 is not
# in the list. It needs no gradient, so its pullback was dropped at once. (After a
# backward pass, records are dropped too. `retain_graph=True` kept them for us.)
#
# ## Broadcasting goes back as a sum
#
# One thing is new with arrays. NumPy **broadcasts**: it repeats a small array to fit a
# large one. For example, a bias $b$ with 2 entries is added to each of the 3 rows of a
# batch. In the picture, each sum has a gradient that we invented, such as (1, 10).

# %%
diagram(
    {"b": (0, 1, "bias b\nshape (2,)", "trained"),
     "1": (1, 0, "row 1 + b\ngradient (1, 10)"),
     "2": (1, 1, "row 2 + b\ngradient (2, 20)"),
     "3": (1, 2, "row 3 + b\ngradient (3, 30)"),
     "sum": (2, 1, "gradient of b\n(1+2+3, 10+20+30)\n= (6, 60)", "data")},
    [("b", "1"), ("b", "2"), ("b", "3"), ("1", "sum"), ("2", "sum"), ("3", "sum")],
    caption="Left: on the way forward, broadcasting uses b three times. Right: on the "
            "way back, b gets the sum of the three gradients.",
    height=3.0)

# %% [markdown]
# This is the rule for $u$ once more: an array that is used several times gets the sum
# of the gradients of its uses. The gradient has the shape of the array itself.
#
# **Predict first.** A column of shape (3, 1) and a row of shape (4,) are added.
# Broadcasting makes a table of shape (3, 4). Let every entry of the table have a
# gradient of 1. What are the shapes and the entries of the two gradients?

# %%
column = ft.Tensor(np.zeros((3, 1)), requires_grad=True)
row = ft.Tensor(np.zeros(4), requires_grad=True)
table = column + row
table.backward(np.ones((3, 4)))
print("column:", column.grad.shape, column.grad.tolist())
print("row:   ", row.grad.shape, row.grad.tolist())

# %% [check]
assert column.grad.tolist() == [[4], [4], [4]]
assert row.grad.tolist() == [3, 3, 3, 3]

# %% [markdown]
# Each entry of the column was used 4 times, each entry of the row 3 times.
#
# An op does not have to care about this. `add` returns `g` for both inputs, in the
# shape of the table. The engine does the rest, for all ops, with one function:
# `sum_to(g, shape)` sums a gradient until it has the shape of the input.

# %%
print("column:", sum_to(np.ones((3, 4)), (3, 1)).tolist())
print("row:   ", sum_to(np.ones((3, 4)), (4,)).tolist())

# %% [markdown]
# ## The library's backward
#
# Now you can read the library's own `backward`. It is our `backward` and `walk_back`,
# for arrays. These are its parts:
#
# - `Gradients` is a dict: for each node the gradient so far. `add` adds to it, `pop`
# takes the complete gradient out.
# - `flag` checks that `retain_graph` is True or False.
# - `_seed` is the first gradient: 1, or the one that the caller gives.
# - `topological(self)` is the order. `order.pop()` takes nodes from its end.
# - A leaf (a `Tensor`) adds the gradient to its `.grad`. Intermediate results do not
# keep their gradients.
# - `node.pull(g)` calls the pullbacks of a record and gives pairs (parent, gradient).
# - `_fit` calls `sum_to`, so that the gradient has the shape of the parent.
# - `release` drops the pullbacks of a record, and with them the arrays that they keep.
#
# Four details you may skip at first. `Part` is for ops that return several arrays.
# `Recomputed` is for a part of the graph that is made again, to save memory.
# `_state.anomaly` is a switch for debugging. `owned` says whether an array may be
# changed in place: two nodes may hold the same array, and then `+=` would change both.

# %%
quote(ft.Tensor.backward)
quote(Gradients.add)

# %% [markdown]
# ## Is a pullback right? A check that can fail
#
# A wrong pullback raises no error. Training goes on, only worse. So every pullback is
# compared with small steps, as in the first section. For arrays we need two more
# things:
#
# - a random **direction** $d$, an array of the shape of $x$. We move all entries of $x$
# at once, by $hd$, so two evaluations are enough;
# - **weights** $w$, an array of the shape of the output $f(x)$. They make one number of
# it: multiply entry by entry, then sum. (They are not the weights of a model.)
#
# We write this number as $w \cdot f(x)$. Its derivative with respect to an entry of
# $f(x)$ is the entry of $w$. So $w$ is the `g` with which the pullback starts.
#
# Then $\frac{w \cdot f(x + hd) - w \cdot f(x - hd)}{2h}$ must equal $d \cdot$ gradient.
#
# We try it on `softmax`, the op that turns each row of scores into probabilities. (Ops
# take plain arrays too, as `scores` below.)

# %%
scores = rng.normal(size=(3, 5))
direction = rng.normal(size=(3, 5))

def slope_by_steps(weights, h=1e-5):
    ahead = ft.ops.softmax(scores + h * direction).data
    behind = ft.ops.softmax(scores - h * direction).data
    return (weights * (ahead - behind)).sum() / (2 * h)

def slope_by_pullback(weights):
    x = ft.Tensor(scores, requires_grad=True)
    ft.ops.softmax(x).backward(weights)
    return (direction * x.grad).sum()

# %% [markdown]
# The simplest weights are all 1; then the number is `.sum()` of the output. Beside them
# we use random weights. As a third method we take a wrong pullback: it always
# returns zeros, so its slope is 0.

# %%
ones = np.ones((3, 5))
random_weights = rng.normal(size=(3, 5))
print("weights   small steps   pullback of softmax   pullback of zeros")
for name, weights in {"ones": ones, "random": random_weights}.items():
    by_steps = abs(slope_by_steps(weights))
    by_pullback = abs(slope_by_pullback(weights))
    print(f"{name:<8}{by_steps:>13.4f}{by_pullback:>22.4f}{0:>20.4f}")

# %% [check]
assert abs(slope_by_steps(ones)) < 1e-9
assert abs(slope_by_pullback(ones)) < 1e-12
difference = slope_by_steps(random_weights) - slope_by_pullback(random_weights)
assert abs(difference) < 1e-8 < 0.01 < abs(slope_by_pullback(random_weights))

# %% [markdown]
# (Signs are left out.) With weights of 1 every slope is 0, because each row of
# probabilities adds up to 1, whatever $x$ is. So this test is blind: the pullback of
# zeros passes it. With random weights it is caught.

# %% [markdown]
# ## A first model on real text
#
# The text comes with tinyft: English prose about Python, from its documentation and its
# source code. `ft.data.snapshot()` gives it in pieces. We use it in lower case. Letters
# become the numbers 1 to 26, and everything else becomes 0, a blank.

# %%
texts = []
for record in ft.data.snapshot():
    if record.kind == "prose" and record.split == "train":
        texts.append(record.text.lower())

text = " ".join(texts)
codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)    # one per character
is_letter = (codes >= ord("a")) & (codes <= ord("z"))
ids = np.where(is_letter, codes - ord("a") + 1, 0).astype(int)
print(f"{len(ids):,} characters, the first of them: {text[:10]!r} = {ids[:10]}")

# %% [markdown]
# The model guesses the next letter from one letter. Its only parameter is a table $W$
# of scores with 27 rows and 27 columns. Row $a$ holds a score for each letter that may
# follow $a$. Softmax turns the row into probabilities $p$.
#
# The loss is the mean of $-\ln p$ over all pairs of neighbours in the text, where $p$
# is the probability of the letter that did follow. Many pairs are equal, so we count
# them once: `share[a, b]` is the share of all pairs that are `a` followed by `b`. Then
# the mean is the sum of share times $-\ln p$ over the 729 different pairs.

# %%
pairs = ids[:-1] * 27 + ids[1:]                     # the pair a, b as one number
share = np.bincount(pairs, minlength=27 * 27).reshape(27, 27) / len(pairs)

def compute_loss(W):
    p = ft.ops.softmax(W)
    return -(share * ft.ops.log(p)).sum()

W = ft.Tensor(np.zeros((27, 27)), requires_grad=True)
loss = compute_loss(W)
loss.backward()
print(f"loss {loss.item():.3f}   ln 27 = {np.log(27):.3f}   W.grad: {W.grad.shape}")

# %% [markdown]
# All scores are 0, so every letter has the probability 1/27, and the loss is $\ln 27$.
# One call of `backward` gave all 729 derivatives.
#
# We can check them: with pencil and paper one finds $dW$ = (expected share) − (share in
# the text). The model expects the pair `a`, `b` as often as `a` comes first, times the
# probability $p$ of `b`, here 1/27.

# %%
share_of_first = share.sum(axis=1, keepdims=True)    # how often a letter comes first
expected = share_of_first / 27
difference = abs(W.grad - (expected - share)).max()
print(f"largest difference: {difference:.0e}")

# %% [check]
assert difference < 1e-16

# %% [markdown]
# Now we train: compute the loss, compute the gradient, take a step against it. This is
# gradient descent, with a learning rate of 40. (The gradients are small, because they
# are shares of a million pairs.) Each step makes a new tensor `W`, because `backward`
# would add the next gradient to the old `.grad`.
#
# The best possible probabilities are known: of all pairs that begin with `a`, count the
# part that goes on with `b`. So we know where the loss has to arrive.

# %%
learning_rate = 40
losses = []
W = ft.Tensor(np.zeros((27, 27)), requires_grad=True)
for _ in range(300):
    loss = compute_loss(W)
    loss.backward()
    losses.append(loss.item())
    W = ft.Tensor(W.data - learning_rate * W.grad, requires_grad=True)

counted = share / share_of_first
safe = np.where(share > 0, counted, 1)      # no ln 0: a pair that never comes adds 0
best = -(share * np.log(safe)).sum()
print(f"loss: first {losses[0]:.2f}, last {losses[-1]:.2f}; by counting {best:.2f}")
curves({"gradient descent": losses}, levels={"counting": best},
       caption="The loss comes down to the loss of the best table, found by counting.")

# %% [check]
assert abs(losses[0] - np.log(27)) < 1e-12
assert best < losses[-1] < 1.01 * best

# %% [markdown]
# And this is what the table has learned. Each row adds up to 1. The stronger the blue,
# the more probable is the next letter.

# %%
p = ft.ops.softmax(W).data
letters = list("␣abcdefghijklmnopqrstuvwxyz")
heat_map(p, rows=letters, columns=letters, xlabel="next letter", ylabel="letter",
         caption="Probability of the next letter. ␣ is the blank. After q comes u.",
         height=5.6)

# %% [check]
assert letters[p[letters.index("q")].argmax()] == "u"
assert abs(share_of_first * (p - counted)).max() < 0.003

# %% [markdown]
# ## What freezing saves, and what it does not
#
# Fine-tuning often trains few parameters and leaves the rest **frozen**: they do not
# change and need no gradient (`requires_grad=False`). How much memory does this save?
# It is tempting to say that a frozen parameter costs no memory. Let us measure it.
#
# The network has two layers: $y = \tanh(xA)\,B$ with 1,000 rows $x$. Between the layers
# lies the array $h = \tanh(xA)$. Such an intermediate result is called an
# **activation**. It has 1,000 rows and 64 columns: 64,000 numbers of 8 bytes, 512 kB.
# This is far more than $A$ or $B$, which have 14 kB each.

# %%
sizes = {"x": (1000, 27), "A": (27, 64), "B": (64, 27)}

def forward(trained, with_tanh):
    tensors = {}
    for name, size in sizes.items():
        needs = name in trained
        tensors[name] = ft.Tensor(rng.normal(size=size), requires_grad=needs)
    tracemalloc.start()
    h = tensors["x"] @ tensors["A"]
    if with_tanh:
        h = h.tanh()
    y = h @ tensors["B"]
    del h                          # from here on, only a record can keep h
    kept = tracemalloc.get_traced_memory()[0] - y.data.nbytes
    tracemalloc.stop()
    return tensors, y, kept

# %% [markdown]
# Python's `tracemalloc` measures memory. Here `kept` is the memory that is still in use
# after the forward pass, without $x$, $A$, $B$ and $y$ themselves. It is what the
# records keep for the backward pass.
#
# **Predict first.** We train $A$ alone, $B$ alone, or both. How much memory is kept in
# each case? Think of what each pullback uses: that of `tanh` uses $h$, and the gradient
# of $B$ is $h^\top G$, where $G$ is the gradient of $y$.

# %%
kept_with_tanh = {}
for trained in ("A", "B", "AB"):
    tensors, y, kept = forward(trained, with_tanh=True)
    kept_with_tanh[trained] = kept / 1000
    print(f"trained: {trained:<3} kept: {kept / 1000:.0f} kB")

# %% [markdown]
# All three keep $h$. If $A$ trains, the pullback of `tanh` needs $h$. If $B$ trains,
# the pullback for $B$ needs it. An activation is freed only if **nobody** needs it.
#
# So let us take `tanh` away, and look again.

# %%
kept_without_tanh = {}
for trained in ("A", "B", "AB"):
    tensors, y, kept = forward(trained, with_tanh=False)
    kept_without_tanh[trained] = kept / 1000

groups = {}
for trained in ("A", "B", "AB"):
    groups[f"{trained} trains"] = {"with tanh": kept_with_tanh[trained],
                                   "without tanh": kept_without_tanh[trained]}
bars(groups, ylabel="kept (kB)",
     caption="Memory that the records keep. Without tanh, if A alone trains, the "
             "activation h is freed: nothing needs it.")

# %% [check]
assert all(512 <= kept < 530 for kept in kept_with_tanh.values())
assert kept_without_tanh["A"] < 10
assert min(kept_without_tanh["B"], kept_without_tanh["AB"]) >= 512

# %% [markdown]
# Without `tanh`, training $A$ alone keeps nothing of that size. The gradient of $h$ is
# $dh = G B^\top$ and needs $B$. The gradient of $A$ is $x^\top dh$ and needs $x$. Both
# $B$ and $x$ exist anyway. Nobody needs $h$.
#
# ## What it costs, and where it stops
#
# The last table counts everything for five cases: trained parameters in $A$ and $B$,
# products of matrices in the backward pass, memory for the gradients of $A$ and $B$,
# and memory kept. In the case `xAB` the input $x$ gets a gradient too, as if more
# layers stood before it.
#
# The forward pass has two products. On the way back, each `matmul` computes one product
# for each parent that needs a gradient. So we count these parents.

# %%
print("trained   parameters   products back   weight gradients   kept (with tanh)")
rows = {}
for trained in ("", "B", "A", "AB", "xAB"):
    tensors, y, kept = forward(trained, with_tanh=True)
    products = 0
    if trained:
        for node in topological(y):
            if not isinstance(node, ft.Tensor) and node.name == "matmul":
                products += len(list(node.parents()))
        y.backward(np.ones(y.shape))
    weights = [tensors["A"], tensors["B"]]
    parameters = sum(w.size for w in weights if w.requires_grad)
    gradients = sum(w.grad.nbytes for w in weights if w.grad is not None)
    rows[trained] = {"products": products, "gradients": gradients, "kept": kept}
    print(f"{trained or 'nothing':<10}{parameters:>10,}{products:>16}"
          f"{gradients / 1e3:>16.1f} kB{kept / 1e3:>16.0f} kB")

# %% [check]
assert [row["products"] for row in rows.values()] == [0, 1, 2, 3, 4]
assert [row["gradients"] for row in rows.values()] == [0, 13824, 13824, 27648, 27648]
kept_bytes = [row["kept"] for row in rows.values()]
assert kept_bytes[0] < 5000
assert all(512_000 <= kept < 530_000 for kept in kept_bytes[1:])

# %% [markdown]
# Read it from top to bottom.
#
# - **Freezing a weight always saves the memory of its gradient**, and the product that
# computes it.
# - **Freezing a weight saves an activation only where nothing else needs it.** With
# `tanh` it never does here, unless all is frozen.
# - Freezing the first layer ($A$) also shortens the walk: nothing before $B$ needs a
# gradient, so one product is left. Freezing the last layer ($B$) does not: the gradient
# must pass through it to $A$, and two products are left.
# - The backward pass needs at most twice the products of the forward pass, for 10
# parameters or for 200,000.
#
# Reverse mode has limits too. One pass gives the first derivatives of one number, such
# as the loss. And it needs the memory that we just measured.
#
# **Exercises.** You can now write the heart of the library yourself:
# `tinyft start autograd` writes a file for each of the six. Begin with `sum_to`.
# `matmul`, `softmax` and `layer_norm` are ops. `topological` and `backward` are `visit`
# and `backward` of this lesson, for tensors.
