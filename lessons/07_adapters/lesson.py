# %% [markdown]
# # 07 Adapters
#
# **Reading:** 45 minutes. **You need:** lessons 01 to 04.
# **Exercises:** after, truncated_normal, trains (about 45 minutes).
#
# A pretrained model has learnt a lot about text. We want it to do ten new tasks. Must
# we train, store and load ten whole models? This lesson trains a few thousand
# parameters for each task, most of them new, and leaves all others as they are. The new
# parts are called **adapters** (Houlsby et al. 2019, arXiv:1902.00751). We ask why they
# must change almost nothing at the start, and what they save and what they do not.

# %%
import os
import time

import numpy as np

import tinyft as ft
from tinyft.learn.draw import bars, curves, diagram
from tinyft.learn.lessons import quote
from tinyft.methods.additive.houlsby import Bottleneck, truncated_normal

FAST = "TINYFT_FAST" in os.environ
STEPS = 60 if FAST else 100
BASE = "base-gpt-small"
model, tokenizer = ft.load(BASE)
print(ft.count(model))

# %% [markdown]
# ## What full fine-tuning costs
# **Full fine-tuning** trains every parameter on the new task. Training with Adam needs
# four numbers for each parameter: the value, its gradient and two moments (lesson 03).
# Each number has 4 bytes, so that makes 16 bytes. Afterwards we store one new value for
# every parameter, 4 bytes, and we do so for every task. Here are our model and one of 7
# billion parameters:

# %%
GIGA = 1e9
for parameters in (239_360, 7_000_000_000):
    training = 16 * parameters / GIGA
    stored = 10 * 4 * parameters / GIGA
    print(f"{parameters:13,} parameters: {training:8.3f} GB in training, "
          f"{stored:8.3f} GB to store ten tasks")

# %% [markdown]
# Our small model costs little. A model of 7 billion parameters needs 112 GB in
# training, the intermediate results not counted, and 280 GB of files for ten tasks. The
# idea of this lesson: keep one copy of the model, the **base**, and **freeze** it. A
# frozen parameter gets no gradient and never changes. For each task we train and store
# something small.
#
# ## The smallest adapter
# Let $y$ be the output of one module of the base, for one position: $C$ numbers. An
# adapter computes a correction of $y$ and adds it:
#
# $$ y + W_{up} \, gelu(W_{down} \, y) $$
#
# $W_{down}$ makes $m$ numbers out of $C$. The function gelu (lesson 02) bends them.
# $W_{up}$ makes $C$ numbers again. Since $m$ is smaller than $C$, this path is called a
# **bottleneck**. Here $C = 4$ and $m = 2$. In the code, $y$ is a row of a matrix, so
# $W y$ is written `y @ W.T`. The biases are left out:

# %%
y = ft.Tensor(np.array([[1.0, 2.0, -1.0, 0.5]]))
down = ft.Tensor(np.array([[1.0, 0.0, 0.0, 1.0],
                           [0.0, 1.0, 1.0, 0.0]]))
up = ft.Tensor(np.array([[0.1, 0.0], [0.0, 0.1], [0.1, 0.1], [0.0, 0.0]]))

def adapt(y, down, up):
    narrow = ft.ops.gelu(y @ down.T)                 # (1, m)
    return y + narrow @ up.T                         # (1, C)

print("y:      ", y.numpy()[0])
print("adapted:", adapt(y, down, up).numpy()[0].round(3))

# %% [markdown]
# Three of the four numbers moved a little. (The fourth did not: the last row of `up` is
# zero.) The path from $y$ to the sum is a **residual connection**: $y$ itself always
# gets through.
#
# **Predict first.** We set all numbers in `up` to zero. What does the adapter give?
# And what would it give without the residual connection?

# %%
zeros = ft.Tensor(np.zeros((4, 2)))
print("with the residual:   ", adapt(y, down, zeros).numpy()[0])
print("without the residual:", (adapt(y, down, zeros) - y).numpy()[0])

# %% [markdown]
# With the residual, an adapter whose correction is zero leaves the model as it was.
# Without the residual, it would replace the module's output by zeros, and the base
# would lose what it has learnt.
#
# ## Where adapters stand
# A block of our transformer has two **sublayers**, attention and the MLP. Each gets
# one adapter on its output, before the block adds the output to $x$:

# %%
diagram(
    {"x": (0, 0, "x  (B, T, C)", "data"), "sum": (0, 4, "+  the new x"),
     "norm": (1, 1, "layer norm", "trained"), "sub": (1, 2, "attn or mlp"),
     "adapter": (1, 3, "adapter", "trained"),
     "y": (2.2, 0, "y  (B, T, C)", "data"), "out": (2.2, 4, "+  the new y"),
     "down": (3.3, 1, "down  C → m", "trained"), "gelu": (3.3, 2, "gelu"),
     "up": (3.3, 3, "up  m → C", "trained")},
    [("x", "norm"), ("norm", "sub"), ("sub", "adapter"), ("adapter", "sum"),
     ("x", "sum", "residual of\nthe block"),
     ("y", "down"), ("down", "gelu"), ("gelu", "up"), ("up", "out"),
     ("y", "out", "residual of\nthe adapter")],
    caption="Left: one half of a block, once with attn and once with mlp. "
            "Right: inside the adapter. Orange trains; everything else is frozen.")

# %% [markdown]
# So a model of $L$ blocks gets $2L$ adapters. Note that the adapter reads $y$, the
# output of its sublayer. It does not read $x$. And note the orange layer norm: the
# method of the paper trains the layer norms of the base, too. They are the one part of
# the base that is not frozen. Later we measure what they bring.
#
# Now the library's own adapter. Some words in it are new:
#
# - An `Edit` is a change of one module. It is kept beside the module, in
#   `module.edits`.
# - The method `after(x, y, ctx)` of an edit is called when its module has run. `x` is
#   the module's input, `y` its output. What `after` returns takes the place of `y`.
# - `ctx` carries the facts of one forward pass, such as the mask (lesson 02). It is
#   only passed on.
# - `Linear` is the map $x W^T + b$ of lesson 02. Its weights are drawn by `rng`, and
#   its bias starts at zero. `weight.copy_(...)` writes other numbers into the weight.

# %%
quote(Bottleneck)

# %% [markdown]
# The last line is our formula. The weights come from `truncated_normal`, and we return
# to it soon. First we put adapters on the model. `ft.attach` changes the model in place
# and freezes the base, except the layer norms. We print where the adapters stand, and
# the shapes of their matrices $W_{down}$ and $W_{up}$:

# %%
attached = ft.attach(model, ft.Houlsby(m=16))
for path, edit in attached.edits.items():
    print(f"{path:15} {edit.down.weight.shape} {edit.up.weight.shape}")

# %% [markdown]
# ## Counting
# One adapter has two matrices, with $C m$ numbers each, and two biases, with $m$ and
# $C$ numbers. That makes $2Cm + C + m$. A layer norm has a weight and a bias, $2C$
# numbers. Our model has width $C = 64$ and $L = 2$ blocks. A block has two layer norms,
# and one more stands after the last block.

# %%
C = 64                                               # width
L = 2                                                # blocks
m = 16                                               # bottleneck
one_adapter = 2 * C * m + C + m
adapters = 2 * L * one_adapter
norms = (2 * L + 1) * 2 * C
print(f"one adapter {one_adapter:,};  {2 * L} adapters {adapters:,};  norms {norms:,}")
print(f"together {adapters + norms:,}")
print(ft.count(model))

# %% [check]
assert ft.count(model).trained == adapters + norms == 9_152
assert ft.count(model).head == 0

# %% [markdown]
# The library counts the same. With the same $m$ and twice the width, an adapter has
# twice as many parameters, but the matrices of the base have four times as many
# ($C^2$). So with a fixed $m$ the share of the adapters shrinks as models get wider.
# The paper trains 2 to 4 % of BERT-large, with an $m$ of up to 256.
#
# A task head is not in this count. A classifier needs a new last layer whatever the
# method is. `ft.count` counts its parameters apart, as `head`. Our model has none.
#
# ## Almost the same model
# Before the first step of training, the adapters hold random numbers. Is the model
# still good? A map that returns its input is called the identity. The paper calls its
# start **near-identity**: the output of every adapter is almost its input.
#
# We compare the logits of the model with those of the base. `ft.without(model)` takes
# the method off for the length of a `with` block. The texts are held-out prose, the
# kind of text that the base was pretrained on. The task "domain" holds some of it in
# `kept`. We take 32 pieces of 64 tokens.

# %%
task = ft.data.task("domain")
prose = ft.data.held_out_batches(task.kept, 64, 32)      # the base's own domain
ids = prose[0]["ids"]

def logits_of(model):
    with ft.no_grad():
        return model(ids).numpy()

with ft.without(model):
    base_logits = logits_of(model)
change = logits_of(model) - base_logits
print("the largest logit:", abs(base_logits).max().round(2))
print("the largest change of a logit:", abs(change).max().round(4))

# %% [markdown]
# The change is there, and it is tiny. How tiny is decided by σ, the standard deviation
# of the first weights: they are drawn from $N(0, σ^2)$. The paper takes σ = 0.01 and
# draws a number again if it lies beyond ±2σ. In the library, σ is the argument `std`.
# (The comment `# host` matters only on a GPU.)

# %%
quote(truncated_normal)

# %% [markdown]
# To draw again is not to clip. Clipping would move every number beyond to exactly 2σ or
# −2σ, about 5 % of all numbers. `far` marks the numbers beyond, `z[far] = ...` replaces
# only these, and the loop ends when none is left.
#
# We now try several σ. As the size of the change we take the root of the mean square
# over all logits, divided by the standard deviation of the base's logits.
#
# **Predict first.** We make σ ten times as large. Look at the formula of the adapter
# again (for small numbers, gelu(z) is about z/2). About how many times as large will
# the change of the logits be?

# %%
def start_with(std):
    "The base with untrained adapters, and how far its logits are from the base's."
    fresh, _ = ft.load(BASE)
    ft.attach(fresh, ft.Houlsby(m=16, std=std))
    distance = np.sqrt(np.mean((logits_of(fresh) - base_logits)**2))
    return fresh, distance / base_logits.std()

sizes = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
distances = []
perplexities = []
for std in sizes:
    fresh, distance = start_with(std)
    distances.append(distance)
    perplexities.append(ft.perplexity(fresh, prose))
    print(f"σ = {std:5}: change {distance:.1e}, perplexity {perplexities[-1]:.4g}")

# %% [markdown]
# The same numbers as a picture, with both axes logarithmic:

# %%
curves({"change of the logits": distances}, x=sizes, log="xy", xlabel="σ",
       ylabel="change / size of the logits",
       levels={"as large as the logits": 1.0},
       caption="Ten times σ is a hundred times the change: both maps grow by ten. "
               "With large σ the change is as large as the logits themselves.")

# %% [check]
assert 80 < distances[2] / distances[0] < 120
assert abs(perplexities[2] / perplexities[0] - 1) < 1e-3
assert perplexities[-1] > 10 * perplexities[0]
assert distances[-1] > 0.5

# %% [markdown]
# A hundred times: ten times for `down` and ten times for `up`. At the top the curve
# bends, because the last layer norm brings its input back to a fixed size, however
# large the corrections are. With σ = 0.01 the perplexity on prose is that of the base.
# With σ = 1 the random corrections are much larger than what the blocks compute: the
# perplexity is above 10,000, and what the base had learnt is of no use before the first
# step. This is why an adapter starts near the identity: training then starts from the
# base, and not from noise.
#
# Then why not σ = 0? The model would be exactly the base. To see what happens then, we
# must train. We shall train several times in this lesson, so we write a function. Each
# step reads 8 texts of 64 tokens. The text is Python source, which the base has not
# read before. During the first tenth of the steps the learning rate rises, then it
# falls in a straight line (lesson 03).

# %%
source = ft.data.held_out_batches(task.test, 64, 32)     # the new domain: Python source

def train(method, learning_rate, steps=STEPS):
    "A new copy of the base with this method, trained on source, and the losses."
    copy, _ = ft.load(BASE)
    if method is not None:
        ft.attach(copy, method)
    batches = ft.data.lm_batches(task.train, 64, 8, 0)
    history = ft.fit(copy, batches, steps, ft.AdamW(learning_rate),
                     ft.linear_schedule(0.1), seed=0, progress=False)
    return copy, history.losses

# %% [markdown]
# **Predict first.** With σ = 0 every number in `down` and `up` is zero, and so are both
# biases. The gradient of the weight of `up` is a product with gelu(down(y)), and
# gelu(0) = 0. The gradient of all that stands before `up` is a product with the weight
# of `up`. Which of the four tensors of an adapter (two weights, two biases) will have
# changed after 20 steps?

# %%
stuck, _ = train(ft.Houlsby(m=16, std=0, norms=False), 1e-2, steps=20)
for name, p in ft.trained(stuck).items():
    if name.startswith("blocks.0.attn"):
        print(f"{name:42} largest number {abs(p.numpy()).max():.4f}")

# %% [check]
for name, p in ft.trained(stuck).items():
    is_moved = bool(p.numpy().any())
    assert is_moved == name.endswith("up.bias"), name

# %% [markdown]
# Both weights stay zero for ever: the gradient of each is zero as long as the other is
# zero. Only the bias of `up` learns, since it is added at the end, and no zero stands
# between it and the loss. So σ must be small, but not zero. (One of the two weights may
# start at zero. LoRA does that in lesson 08.)
#
# ## A real task
# The base read prose: documentation and comments. The task is to predict
# **Python source**. We train four times on the same batches:
#
# - everything: full fine-tuning
# - adapters and norms: the method of the paper
# - adapters alone: with `norms=False`
# - norms alone: no adapters
#
# The library has no method for the last one, but we can write it in four lines. The
# function `trains` of a `Method` returns the names of those tensors of the base that
# train. Ours returns the names that `ft.Houlsby` returns: the layer norms.

# %%
class NormsAlone(ft.Method):
    "Train the layer norms and nothing else."

    def trains(self, model):
        return ft.Houlsby().trains(model)

# %% [markdown]
# Each method has its own learning rate. Those that train few parameters take larger
# steps here.

# %%
runs = {
    "everything": (None, 3e-3),
    "adapters and norms": (ft.Houlsby(m=16), 2e-2),
    "adapters alone": (ft.Houlsby(m=16, norms=False), 2e-2),
    "norms alone": (NormsAlone(), 5e-2),
}
models = {}
losses = {}
for name, (method, learning_rate) in runs.items():
    models[name], losses[name] = train(method, learning_rate)

# %% [markdown]
# **Predict first.** The base has a perplexity of about 880 on held-out source. Which
# of the four comes out best, and which worst? Can 640 numbers, the norms alone, halve
# it?

# %%
base, _ = ft.load(BASE)
trained = {}
on_source = {"base": ft.perplexity(base, source)}
for name, trained_model in models.items():
    trained[name] = ft.count(trained_model).trained
    on_source[name] = ft.perplexity(trained_model, source)
    print(f"{name:20} {trained[name]:8,} parameters, perplexity {on_source[name]:6.1f}")
print(f"{'base':20} {0:8,} parameters, perplexity {on_source['base']:6.1f}")

# %% [markdown]
# The losses during training show the same order from the first steps on. The loss of a
# single step is noisy, so each point is the mean of ten steps.

# %%
window = np.ones(10) / 10
smooth = {name: np.convolve(values, window, "valid") for name, values in losses.items()}
curves(smooth, caption="The loss on Python source, as a mean of ten steps.",
       ylabel="loss (nats per token)", height=3.4)

# %% [check]
assert trained["norms alone"] == 640 and trained["adapters alone"] == 8_512
assert on_source["everything"] < on_source["adapters and norms"]
assert on_source["adapters and norms"] < on_source["adapters alone"]
assert on_source["adapters and norms"] < on_source["norms alone"]
assert on_source["norms alone"] < 0.5 * on_source["base"]

# %% [markdown]
# How much of the gain do the small methods bring? We count in nats: the loss is the
# logarithm of the perplexity (lesson 04). The loss of full fine-tuning falls by 2.5
# nats. We divide the fall of the other losses by that:

# %%
def share_of_gain(name):
    "The fall of the loss in nats, as a share of that of full fine-tuning."
    fall = np.log(on_source["base"]) - np.log(on_source[name])
    return fall / (np.log(on_source["base"]) - np.log(on_source["everything"]))

for name in models:
    print(f"{name:20} {share_of_gain(name):.2f}")

# %% [check]
assert 0.65 < share_of_gain("adapters and norms") < 0.8
assert 0.5 < share_of_gain("norms alone") < 0.7

# %% [markdown]
# Adapters and norms, fewer than 4 % of the parameters, bring about seven tenths of the
# gain. They do not bring all of it: full fine-tuning is better here. Python source is
# far from prose, and the model is small. On GLUE, a set of tasks of understanding
# English, the paper reports a mean score of 80.0 for adapters on BERT-large and 80.4
# for full fine-tuning. So the gap depends on the task and on the model.
#
# Look at the norms. A layer norm scales and shifts each of the $C$ features with $2C$ =
# 128 numbers. So it decides which features are large and which are small in what the
# next sublayer reads. The 640 numbers of the five norms alone bring more than half of
# the gain. Beside the adapters they add only a little: it seems that both learn much
# of the same. But they cost almost nothing, so the method trains them, too.
#
# ## Two summaries, tested
# "It only trains the newly added trainable parameters without changing the parameters
# of the pretrained model", says a course text about methods that add modules ("Types of
# Fine-Tuning"). A lecture writes of adapters: "training only the adapter modules during
# fine-tuning" ("Reduced Complexity Models and Pretraining", 2023). Is that true of the
# method of the paper? Let us see which tensors of the base our run with adapters and
# norms has changed:

# %%
after_training = models["adapters and norms"].named_parameters()
changed = []
for name, p in base.named_parameters().items():
    if not np.array_equal(p.numpy(), after_training[name].numpy()):
        changed.append(name)
print(f"{len(changed)} of {len(base.named_parameters())} tensors changed:")
print(", ".join(changed))

# %% [check]
assert len(changed) == 10 and all("norm" in name for name in changed)

# %% [markdown]
# It is not: ten tensors of the base changed, the weight and the bias of five layer
# norms. So their new values belong to the task, and must be stored with the adapters.
# Whoever stores the adapters alone loses part of what was learnt.
#
# A blog post ("Quick notes on fine-tuning deep learning models", 2024) says of an
# adapter: "it is just like adding another layer on top of the pre-trained model", and
# its code calls the adapter after the whole transformer. We can try that. The argument
# `targets` names the modules that get an adapter. `targets="norm"` puts one after the
# last norm, on top of all blocks. With $m = 65$ it has 8,449 parameters, about as many
# as our four adapters inside the blocks, which have 8,512. (With $m > C$ it is no
# bottleneck any more, but the counts are about equal.) Data, steps and learning rate
# are the same, and no norms train in either. Is one adapter on top as good as four
# inside?

# %%
on_top, _ = train(ft.Houlsby(m=65, norms=False, targets="norm"), 2e-2)
print(ft.count(on_top))
on_source["one on top"] = ft.perplexity(on_top, source)
for name in ("one on top", "adapters alone"):
    print(f"{name:15} perplexity {on_source[name]:.1f}")

# %% [check]
assert ft.count(on_top).trained == 8_449
assert on_source["one on top"] > on_source["adapters alone"]

# %% [markdown]
# It is worse. The gap is not large here, probably because much of this task is to learn
# which tokens are frequent in source, and that can be learnt on top. But an adapter on
# top can only change what the blocks have already computed. An adapter inside a block
# changes what all later blocks compute, and what their attention looks at. The paper
# puts its adapters inside every block.
#
# ## One base, many tasks
# We can get the base back. `ft.detach` takes the adapters off, restores the norms, and
# returns everything that was learnt for the task, adapters and norms. (In what it
# prints, `targets=()` means the usual places: all sublayers.)

# %%
tuned = models["adapters and norms"]
source_adapter = ft.detach(tuned)
print(source_adapter)
is_same = np.array_equal(logits_of(tuned), base_logits)
print("without it, the base, bit by bit:", is_same)
ft.attach(tuned, source_adapter)
print("with it again:", round(ft.perplexity(tuned, source), 1))

# %% [check]
assert is_same
assert abs(ft.perplexity(tuned, source) - on_source["adapters and norms"]) < 1e-6

# %% [markdown]
# So one base in memory serves many tasks: detach one adapter, attach another. (Lesson
# 08 writes an adapter to a file.) Full fine-tuning overwrites the base. Whoever wants
# it back needs a second copy.
#
# **Predict first.** What is the perplexity on *prose*, the base's own domain, of the
# fully fine-tuned model? Of the model with its adapters? Of the same model inside
# `with ft.without(model)`? The base has about 50.

# %%
on_prose = {"base": ft.perplexity(base, prose)}
for name, trained_model in models.items():
    on_prose[name] = ft.perplexity(trained_model, prose)
with ft.without(tuned):
    on_prose["adapters taken off"] = ft.perplexity(tuned, prose)
for name in ("base", "everything", "adapters and norms", "adapters taken off"):
    print(f"{name:20} {on_prose[name]:6.1f}")

# %% [check]
assert on_prose["adapters taken off"] == on_prose["base"]
assert on_prose["everything"] > 1.5 * on_prose["base"]
assert on_prose["adapters and norms"] > on_prose["base"]

# %% [markdown]
# Both trained models have become worse on prose: they have **forgotten** some of it.
# The model with adapters has forgotten less, but it has also learnt less. And nothing
# is lost: take the adapters off, and the base is there again.
#
# ## What it saves
# First the files. For ten tasks on our model, so many numbers must be stored:

# %%
total = ft.count(base).total
per_task = trained["adapters and norms"]
stored = {"full fine-tuning": 10 * total, "adapters": total + 10 * per_task}
in_thousands = {name: numbers / 1000 for name, numbers in stored.items()}
bars(in_thousands, ylabel="thousands of numbers",
     caption="Ten tasks: ten models, or one base and ten sets of adapters and norms.")
print({name: f"{numbers:,}" for name, numbers in stored.items()})

# %% [markdown]
# Second, the memory in training. The frozen parameters need no gradient and no moments.
# But their values must still be there. And most of the **activations**, the
# intermediate results that backward needs, must be there, too: to reach the adapter in
# the first block, the gradient must pass through all blocks above it. We measure the
# largest amount of memory that one step needs, with batches of 8 and of 32 texts:

# %%
def step_memory(method, batch_size):
    "Megabytes at the peak of one training step, of a new copy of the base."
    batches = ft.data.lm_batches(task.train, 64, batch_size, 0)
    with ft.peak_memory() as peak:
        copy, _ = ft.load(BASE)
        if method is not None:
            ft.attach(copy, method)
        ft.fit(copy, batches, 1, ft.AdamW(1e-3), seed=0, progress=False)
    return peak["bytes"] / 1e6

memory = {}
for batch_size in (8, 32):
    full_step = step_memory(None, batch_size)
    adapter_step = step_memory(ft.Houlsby(m=16), batch_size)
    memory[batch_size] = (full_step, adapter_step)
    print(f"batch of {batch_size:2}: everything {full_step:5.1f} MB, "
          f"adapters {adapter_step:5.1f} MB")
print(f"gradients and moments of all parameters: {12 * total / 1e6:.1f} MB")

# %% [check]
gradients_and_moments = 12 * total / 1e6
for full_step, adapter_step in memory.values():
    assert 0.8 * gradients_and_moments < full_step - adapter_step < 0.5 * full_step

# %% [markdown]
# With 8 texts the saving is about the size of the gradients and moments of all
# parameters. With 32 texts it is a little more: a frozen weight needs no gradient, so
# the input from which we would compute it need not be kept. But most activations
# remain, and they grow with the batch. So adapters save most where the parameters take
# most of the memory: in a large model with small batches.
#
# ## What it costs
# When the model is used, each sublayer is followed by two more matrix products. Could
# we fold an adapter into the weights of its sublayer after training, and have the old
# speed? The sublayer ends with a linear map, $y = W h$. Without gelu, the adapter would
# give
#
# $$ y + W_{up} W_{down} \, y = (W + W_{up} W_{down} W) \, h $$
#
# and the bracket is one matrix: we could store it instead of $W$. With gelu, this works
# only if the adapter is linear all the same. A linear map gives twice the output for
# twice the input. We test it on our first adapter:

# %%
print("2 · adapt(y):", 2 * adapt(y, down, up).numpy()[0].round(3))
print("adapt(2 · y):", adapt(2 * y, down, up).numpy()[0].round(3))

# %% [check]
assert not np.allclose(2 * adapt(y, down, up).numpy(), adapt(2 * y, down, up).numpy())

# %% [markdown]
# The results differ, because of gelu. No matrix does what an adapter does, so it must
# stay beside the sublayer, and it takes time. We measure both models in turn, many
# times, and take the median of the ratio:

# %%
def seconds(model):
    start = time.perf_counter()
    logits_of(model)
    return time.perf_counter() - start

ratios = []
for _ in range(30):
    ratios.append(seconds(tuned) / seconds(base))
slowdown = float(np.median(ratios))
print(f"a forward pass with adapters takes {slowdown:.2f} x the time of the base")

# %% [markdown]
# The models that people use are wider, so the share of the adapters in the arithmetic
# is smaller there. But each of these small products must wait for the one before it,
# and a GPU is slow at many small products in a row.
#
# ## The table
# Perplexity on held-out source and on held-out prose, after training on source. The
# last column is what must be stored for each task. Only full fine-tuning can do without
# the base.

# %%
print(f"{'':20}{'trained':>9}{'share':>8}{'source':>8}{'prose':>7}{'stored':>19}")
print(f"{'base':20}{0:9,}{0:7.2f}%{on_source['base']:8.1f}{on_prose['base']:7.1f}"
      f"{0:16,} kB")
for name in models:
    share = 100 * trained[name] / total
    print(f"{name:20}{trained[name]:9,}{share:7.2f}%{on_source[name]:8.1f}"
          f"{on_prose[name]:7.1f}{4 * trained[name] / 1000:16,.0f} kB")

# %% [markdown]
# In short: an adapter starts near the identity, so that training starts from what the
# base has learnt. It does not start at the identity with two zero matrices, since they
# would never learn. It saves storage for each task, and in training the gradients and
# moments of the frozen parameters. It does not save the values of the base, nor most
# activations, nor time when the model is used. And we can get the base back.
#
# There are relatives of this adapter: Pfeiffer's has one bottleneck in a block
# instead of two and leaves the norms frozen; the parallel adapter reads the
# sublayer's input, and runs beside the sublayer; the residual adapter of Rebuffi has
# no gelu, so it can be folded into the weights. They will come to the library; it
# does not have them yet.
#
# **Exercises.** `tinyft start adapters` writes three files: `after`, what an adapter
# computes; `truncated_normal`, its first weights; `trains`, the layer norms that
# train with it.
