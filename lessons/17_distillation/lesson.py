# %% [markdown]
# # 17 Distillation
#
# **Reading:** 50 minutes. **You need:** lessons 02 to 04, logarithms of
# probabilities.
# **Exercises:** distillation_loss, run_teacher, largest, layer_map, cosine_loss
# (about 80 minutes).
#
# A language model is trained once and used many times. Each use of a large model
# costs memory and time. Lesson 13 kept all weights of a model and stored each in
# fewer bits. This lesson does something else: a *smaller* model learns to answer as
# the large one does. The large model is the **teacher**, the small one the
# **student**. The training is called **distillation** (Hinton, Vinyals and Dean
# 2015).
#
# Why not train the small model on the text itself, as in lesson 04? Because the
# teacher's answer to a text says more than the text. We begin with that.

# %%
import itertools
import os
import tempfile
import time

import numpy as np

import tinyft as ft
from tinyft.compress.distill import layer_map
from tinyft.compress.distill.hinton import mixed_loss
from tinyft.compress.distill.soft import cosine_loss, distillation_loss
from tinyft.learn.draw import bars, curves, diagram
from tinyft.learn.lessons import quote

STEPS = 16 if "TINYFT_FAST" in os.environ else 24        # training steps of a student
teacher, tokenizer = ft.load("base-gpt")                 # 4 layers, 128 wide
test = ft.data.pretraining("prose", "test")
V = teacher.config.vocab

# %% [markdown]
# ## What a label does not say
# Here are 23 tokens of the test text, which the teacher has never seen: the beginning
# of the docstring of a Python function. The text goes on with the token ` del`, the
# beginning of "delta". That token is the **label**. What does the teacher expect?

# %%
def log_softmax(z):
    """The logarithms of the probabilities, along the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

# %%
context = test[9027:9050]                                # the beginning of a docstring
label = test[9050]
with ft.no_grad():
    logits = teacher(context[None]).numpy()              # (1, 23, V)
z = logits[0, -1].astype(np.float64)                     # (V,) at the last position
p = np.exp(log_softmax(z))

# %%
print(tokenizer.decode(context), "...")
best = np.argsort(-p)[:6]                                # the six most probable tokens
for token in [*best, label]:
    print(f"{tokenizer.decode([token]):>12} {p[token]:.2g}")

# %% [markdown]
# The label says: ` del` is right, and the other 2,047 tokens are wrong, all equally
# wrong. The teacher did not expect this label: it gives ` del` a probability of
# 0.00001. But it says something else: a function that gets lists of strings returns a
# list, a tuple, a string or a dictionary. It has learned that these words can stand at
# the same position. So some wrong tokens are better than others: ` list` is much
# better than ` because`.

# %%
because = tokenizer.encode(" because").ids[0]
times = p[best[0]] / p[because]
print(f"list: {p[best[0]]:.2f}   because: {p[because]:.1e}")
print(f"{times / 1e6:.1f} million times as probable")

# %% [check]
expected = [tokenizer.decode([token]) for token in best]
assert expected[:3] == [" list", " tuple", " string"]
assert " dictionary" in expected
assert len(context) == 23
assert tokenizer.decode([label]) == " del"
assert round(p[label], 5) == 0.00001
assert p[best[0]] > 100_000 * p[because]

# %% [markdown]
# This knowledge is called **dark knowledge**: it lies in the smaller probabilities,
# and nobody sees it when the model only answers with its best token. A student that is
# trained on labels must read many texts until it has seen all of these words at such a
# position. One answer of the teacher shows all of them at once.
#
# ## Temperature
# The loss of this lesson weights each token with its probability. So tokens with a
# small probability hardly count. To make them count more, Hinton divides the logits by
# a **temperature** $T$ before the softmax:
#
# $p_i = e^{z_i/T} / \sum_j e^{z_j/T}$
#
# $T = 1$ gives the model's own probabilities. A larger $T$ makes the distribution
# flatter, or **softer**.

# %%
temperatures = [1, 2, 4]
soft = {T: np.exp(log_softmax(z / T)) for T in temperatures}
shown = [*best, label, because]
groups = {}
for token in shown:
    name = tokenizer.decode([token]).strip()
    groups[name] = {f"T = {T}": soft[T][token] for T in temperatures}
bars(groups, ylabel="probability", log="y",
     caption="The teacher's probabilities at three temperatures, for its six best "
             "tokens, the label, and a word that does not fit. The axis is "
             "logarithmic. With a higher temperature the bars become more equal. "
             "Their order stays.")

# %% [markdown]
# **Predict first.** At $T = 1$ one token is 100 times as probable as another. How
# many times is it at $T = 2$? And at $T = 4$?

# %%
two = np.array([np.log(100.0), 0.0])                     # logits of such a pair
for T in temperatures:
    first, second = np.exp(log_softmax(two / T))
    print(f"T = {T}: {first / second:.2f} times")

# %% [markdown]
# The ratio of two probabilities is $e^{(z_i - z_j)/T}$. So at the temperature $T$ it
# is the $T$-th root of the ratio at $T = 1$.
#
# A high temperature has a price. Our vocabulary has 2,048 tokens, and nearly all of
# them are nonsense at a given position. Their probabilities grow, too. We measure it
# on 512 tokens of test text: how much probability do the $k = 64$ best tokens have?
# (Below, a cache will keep the 64 best.)

# %%
def run(model, ids):
    """The logits at all positions of ids (B, T), one row for each: (B·T, V)."""
    with ft.no_grad():
        logits = model(ids).numpy()
    return logits.reshape(-1, V).astype(np.float64)

windows = test[:512].reshape(8, 64)                      # 8 windows of 64 tokens
z_teacher = run(teacher, windows)                        # (512, V)

# %%
k = 64
share = {}
for T in temperatures:
    soft_p = np.exp(log_softmax(z_teacher / T))
    ordered = np.sort(soft_p, axis=-1)                   # the largest comes last
    share[T] = ordered[:, -k:].sum(axis=-1).mean()
    print(f"T = {T}: the {k} best tokens have {100 * share[T]:.0f} % of it")

# %% [check]
assert np.isclose(first / second, 100**0.25)
assert (np.argsort(-soft[4])[:6] == best).all()
assert 0.8 < share[1] < 0.95
assert 0.3 < share[2] < 0.55
assert share[4] < 0.25

# %% [markdown]
# Already at $T = 2$ more than half of the probability lies on tokens that do not
# matter much. Hinton took temperatures up to 20, for ten classes of pictures.
# DistilBERT, a model of language that we meet below, takes $T = 2$.
#
# ## A loss for distributions
# Let $t$ be the teacher's probabilities at one position, and $s$ the student's. The
# cross-entropy of lesson 03 took one label. With a distribution it is
#
# $CE(t, s) = -\sum_i t_i \ln s_i$
#
# If $t$ is one-hot, this is the loss of lesson 03. The smallest value of $CE$ is the
# **entropy** of the teacher, $H(t) = -\sum_i t_i \ln t_i$. The student reaches it with
# $s = t$. The difference of the two is the **Kullback-Leibler divergence**:
#
# $KL(t \parallel s) = CE(t, s) - H(t) = \sum_i t_i (\ln t_i - \ln s_i)$
#
# It is never negative, and 0 only for $s = t$. The entropy does not depend on the
# student, so $CE$ and $KL$ have the same gradient. We use $KL$: a loss of 0 then means
# that the student answers as the teacher does.
#
# We need a student. For now it is a copy of the teacher without two of its four
# layers. Which two are left out, we discuss below.

# %%
student = ft.student(teacher, 2)
z_student = run(student, windows)                        # (512, V)
log_t = log_softmax(z_teacher)
log_s = log_softmax(z_student)
t = np.exp(log_t)

# %%
cross_entropy = -(t * log_s).sum(axis=-1)                # (512,) one for each position
entropy = -(t * log_t).sum(axis=-1)
kl = (t * (log_t - log_s)).sum(axis=-1)
print(f"CE {cross_entropy.mean():.3f} = H {entropy.mean():.3f} + KL {kl.mean():.3f}")

# %% [markdown]
# The slides of a lecture (*Reduced Complexity Models and Pretraining*) write the loss
# as $\sum_i t_i \ln s_i$. The minus sign is missing there. Does it matter? Training
# makes a loss *small*. We train three logits, with the minus sign and without it. The
# gradient of $CE$ with respect to the logits is $s - t$. The learning rate is 0.5.
#
# **Predict first.** The teacher has the probabilities 0.6, 0.3 and 0.1. The loss has
# no minus sign. Which probabilities does the student have after 200 steps?

# %%
target = np.array([0.6, 0.3, 0.1])

def trained(sign):
    """The student's probabilities after 200 steps of gradient descent on sign · CE."""
    z = np.zeros(3)
    for _ in range(200):
        s = np.exp(log_softmax(z))
        z -= 0.5 * sign * (s - target)
    return np.exp(log_softmax(z))

print("with the minus:   ", trained(1).round(3))
print("without the minus:", trained(-1).round(3))

# %% [check]
assert np.allclose(cross_entropy, entropy + kl)
assert (kl > 0).all()
assert np.allclose(trained(1), target, atol=1e-3)
assert trained(-1).argmax() == target.argmin()
assert trained(-1).max() > 0.999

# %% [markdown]
# Without the minus the student becomes sure of the class that the teacher finds least
# likely.
#
# ## Which way round?
# $KL(t \parallel s)$ and $KL(s \parallel t)$ are different losses. To see how, we take
# 41 classes in a row. The teacher's probabilities have two peaks. The student is *too
# small* to copy them: it can make only one peak, with any middle and any width. We try
# all middles and many widths, and take the best student under each loss.

# %%
classes = np.arange(41)

def peak(middle, width):
    """Probabilities of the shape of a normal distribution."""
    z = -((classes - middle) / width) ** 2 / 2
    return np.exp(log_softmax(z))

def divergence(p, q):
    """KL(p ‖ q)"""
    return (p * np.log(p / q)).sum()

two_peaks = 0.6 * peak(10, 2.5) + 0.4 * peak(29, 2.5)    # the teacher

# %%
widths = np.arange(1.5, 16.25, 0.25)
students = [peak(m, w) for m, w in itertools.product(classes, widths)]
covers = min(students, key=lambda s: divergence(two_peaks, s))
chooses = min(students, key=lambda s: divergence(s, two_peaks))

# %%
curves({"teacher": two_peaks, "student, KL(teacher ‖ student)": covers,
        "student, KL(student ‖ teacher)": chooses}, x=classes, xlabel="class",
       ylabel="probability",
       caption="A student that can make only one peak. KL(teacher ‖ student) is "
               "large if the student gives too little where the teacher gives much: "
               "the student covers both peaks. KL(student ‖ teacher) is large if the "
               "student gives much where the teacher gives too little: the student "
               "chooses one peak.")

# %% [check]
between = slice(16, 24)
assert covers[10] > 0.01 and covers[29] > 0.01
assert covers[between].sum() > 10 * two_peaks[between].sum()
assert chooses[10] > 0.1 and chooses[29] < 1e-6
one_hot = np.array([1.0, 0.0, 0.0])
with np.errstate(divide="ignore"):                       # the logarithm of x / 0
    assert np.isinf(divergence(target, one_hot))

# %% [markdown]
# Distillation uses $KL(t \parallel s)$, with the teacher's probabilities as weights. It
# has the gradient of the cross-entropy, and a label is a special case: a one-hot $t$.
# With a one-hot $t$ the other loss, $KL(s \parallel t)$, is infinite, since it contains
# $\ln 0$. $KL(t \parallel s)$ has a price, which the picture shows: the student gives
# probability to the classes between the peaks, where the teacher gives none.
#
# ## A mean over what?
# The loss is the sum over the classes and the *mean over the tokens*. Two other ways
# are mistakes:
#
# - `mean()` over everything divides by $V$ as well. This is `reduction="mean"`, the
#   default of PyTorch's `kl_div`.
# - The sum over everything, divided by the number of rows. This is
#   `reduction="batchmean"`. It does not divide by the number of tokens in a row.

# %%
terms = (t * (log_t - log_s)).reshape(8, 64, V)          # rows, tokens, classes
print(f"mean over the tokens:  {terms.sum(axis=-1).mean():.4f}")
print(f"mean over everything:  {terms.mean():.6f}")
print(f"sum, divided by rows:  {terms.sum() / 8:.1f}")

# %% [check]
assert np.isclose(terms.mean() * V, kl.mean())
assert np.isclose(terms.sum() / 8, 64 * kl.mean())

# %% [markdown]
# In a sum with a loss for the labels, the first mistake makes the teacher's term
# 2,048 times too small: it has next to no effect. The second makes it 64 times
# too large, since our rows have 64 tokens. Neither gives an error message.
#
# ## Why T²?
# With a temperature, both models are softened: $t$ is the softmax of $z_t/T$, and $s$
# that of $z_s/T$. The gradient with respect to the student's logits is then
#
# $(s - t) / T$
#
# The factor $1/T$ comes from $z/T$. And $s - t$ becomes smaller, too: at a high
# temperature both distributions are nearly flat, and their difference is about $1/T$
# of what it was. Together that is about $1/T^2$. We measure it on one window of 64
# tokens. (`distillation_loss` of the library is $T^2 \, KL$, so we divide by $T^2$.)
#
# **Predict first.** $T$ goes from 16 to 32. What happens to the gradient of $KL$,
# without any factor?

# %%
def gradient_of_kl(T):
    """The gradient of KL with respect to the student's logits of one window (64, V)."""
    z_s = ft.Tensor(z_student[:64], requires_grad=True)
    z_t = ft.Tensor(z_teacher[:64])
    weight = np.ones(64)                                 # of each position
    loss = distillation_loss(z_s, z_t, weight, T)
    (loss / T**2).backward()
    return z_s.grad

sizes = {}
for T in (1, 2, 4, 8, 16, 32, 64):
    sizes[T] = np.linalg.norm(gradient_of_kl(T))
    print(f"T = {T:2}: gradient of KL {sizes[T]:.1e}, of T² KL {T**2 * sizes[T]:.1e}")

# %% [markdown]
# We put these sizes beside the gradient of the cross-entropy with the labels, which is
# $s$ minus the one-hot label, divided by the number of tokens.

# %%
hard = np.exp(log_s[:64])                                # s at T = 1
next_tokens = test[1:65]                                 # the labels of the window
hard[np.arange(64), next_tokens] -= 1
hard_size = np.linalg.norm(hard / 64)
squared = {T: T**2 * size for T, size in sizes.items()}
curves({"KL": list(sizes.values()), "T² KL": list(squared.values())}, x=list(sizes),
       levels={"cross-entropy with the labels": hard_size}, log="xy", xlabel="T",
       ylabel="size of the gradient",
       caption="Without a factor the gradient falls with 1/T². In a mixed loss, "
               "nearly all of the gradient would then come from the labels. With T² "
               "its size stays the same from T = 8 on.")

# %% [check]
soft_s = np.exp(log_softmax(z_student[:64] / 4))
soft_t = np.exp(log_softmax(z_teacher[:64] / 4))
assert np.allclose(gradient_of_kl(4), (soft_s - soft_t) / 4 / 64)
assert 3.5 < sizes[16] / sizes[32] < 4.5
assert 3.5 < sizes[32] / sizes[64] < 4.5
assert 30_000 < sizes[1] / sizes[64] < 50_000
assert 8 < squared[1] / squared[64] < 12
assert squared[8] / squared[64] < 1.1

# %% [markdown]
# At $T = 32$ the gradient is a quarter of that at 16, as the rule says. From $T = 1$
# to 64 it becomes about 40,000 times smaller. With the factor $T^2$ it becomes about 10
# times smaller, and all of that happens below $T = 8$. There the distributions are not
# flat yet, and the rule does not hold. So $T^2$ does not make the gradient equal for
# all $T$, but it keeps its size comparable. That is why the loss is
#
# $T^2 \, KL(t \parallel s)$
#
# The lecture names the temperature and leaves the factor out. So did the distillation
# example of Keras (keras-io, issue 869). Without the factor, at $T = 4$, the teacher's
# term is a sixteenth of what its weight in the loss says.
#
# ## A very high temperature
# What remains of the loss if $T$ is very large? For a small number $u$, $e^u$ is
# about $1 + u$. So the probabilities are about $(1 + \tilde z_i/T) / V$, where
# $\tilde z$ are the **centred** logits: their mean over the classes is 0. The gradient
# of $T^2 \, KL$ is $T^2 (s - t)/T$, so it becomes
#
# $T (s - t) \to (\tilde z_s - \tilde z_t) / V$
#
# This is also the gradient of the sum of $(\tilde z_s - \tilde z_t)^2$ over all
# classes, divided by $2V$. So for a large $T$ the loss should be near this squared
# distance. We print $T^2 \, KL$ as a share of it.

# %%
def centred(z):
    return z - z.mean(axis=-1, keepdims=True)

squares = (centred(z_student) - centred(z_teacher)) ** 2
limit = squares.sum(axis=-1).mean() / (2 * V)
ratio = {}
for T in (1, 4, 16, 64, 256, 1024):
    log_soft_t = log_softmax(z_teacher / T)
    log_soft_s = log_softmax(z_student / T)
    soft_kl = (np.exp(log_soft_t) * (log_soft_t - log_soft_s)).sum(axis=-1)
    ratio[T] = T**2 * soft_kl.mean() / limit
    print(f"T = {T:4}: T² KL is {ratio[T]:.3f} of the squared distance")

# %% [check]
assert abs(ratio[1024] - 1) < 0.005
assert abs(ratio[64] - 1) < 0.1
assert 0.6 < ratio[1] < 0.8

# %% [markdown]
# With a very high temperature the student learns to have the teacher's logits. Then
# every token of the vocabulary counts the same, even those that the teacher would
# never choose. A small student cannot match all logits, so it should match those of
# the likely tokens. With a temperature near 0 the teacher's distribution is one-hot: a
# label, its best token. So the temperature chooses a point between "only the best
# token" and "all tokens alike".
#
# **Exercise:** `distillation_loss`.
#
# ## Teacher and labels
# If there are labels, use both. Let $y$ be the labels. Hinton's loss is
#
# $(1 - \lambda) \, CE(y, s) + \lambda \, T^2 \, KL(t \parallel s)$
#
# The first term is at $T = 1$. In the library the whole loss is
# `ft.Hinton(teacher, temperature, soft)`, where `soft` is $\lambda$. `fit` takes it as
# its `loss`. Here is how it is computed. `targets` holds the ids and the labels of a
# batch. `teacher_logits` runs the teacher. `soft_loss` calls `distillation_loss`, and
# `row_weights` gives 0 to a position without a label.

# %%
quote(mixed_loss)

# %% [markdown]
# With $\lambda = 1$ no labels are needed. So a classifier can be distilled on any text:
# the teacher answers in place of the labels. But both models must have the same tokens:
# logit number 700 of the teacher must be about token 700 of the student. And the
# temperature is for the training only. Later the student is used at $T = 1$.
#
# ## The teacher does not learn
# The teacher only answers. This needs three things:
#
# - It is in **evaluation mode**. With dropout it would give another answer each time.
# - Its pass is **not recorded**. Otherwise `backward` would go through the teacher,
#   too.
# - Its parameters are **not updated**. `fit` updates the student's alone.
#
# Suppose the second is forgotten. We write one step with `ft.Hinton`, and one that
# records the teacher. A loss of the library reads a batch, and returns the Context of
# the pass and the value. It leaves out the last position of each row, since the batch
# does not hold the next token. `kl_divergence` is $T^2 \, KL$ of two Tensors of logits.

# %%
batch = {"ids": windows[:4]}
hinton = ft.Hinton(teacher, temperature=2.0, soft=1.0)

def step_with_hinton():
    targets = hinton.read(batch)
    ctx, value = hinton(student, targets)
    value.backward()

def step_that_records():
    z_t = teacher(batch["ids"])[:, :-1]                  # without no_grad: recorded
    z_s = student(batch["ids"])[:, :-1]
    value = ft.functional.kl_divergence(z_t, z_s, 2.0)
    value.backward()

# %% [markdown]
# We measure the memory of each step (`peak_memory`, lesson 03). Afterwards, does the
# teacher have gradients?

# %%
peaks = []
gradients = []
for step in (step_with_hinton, step_that_records):
    student.zero_grad()
    with ft.peak_memory() as memory:
        step()
    peaks.append(memory["bytes"])
    gradients.append(student.blocks[0].mlp.up.weight.grad)
    reached = any(w.grad is not None for w in teacher.parameters())
    print(f"{step.__name__:18}{peaks[-1] / 1e6:5.1f} MB, "
          f"the teacher has gradients: {reached}")

# %% [check]
assert reached
assert peaks[1] > 1.5 * peaks[0]
assert np.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
assert not np.allclose(gradients[0], 0, atol=1e-4)
teacher.zero_grad()
student.zero_grad()
step_with_hinton()
assert all(w.grad is None for w in teacher.parameters())
assert any(w.grad is not None for w in student.parameters())
student.zero_grad()

# %% [markdown]
# The student's gradients are the same in both steps, and nobody uses those of the
# teacher. They only cost memory and time. But if an optimiser held the teacher's
# parameters as well, the teacher would learn to answer as the *student* does.
#
# **Exercise:** `run_teacher`.
#
# ## The teacher's answers on disk
# The teacher gives the same answer to the same text in every epoch. So it is enough to
# run it once and to store its answers. A full answer is 2,048 logits for each token.
# The `TeacherCache` keeps less:
#
# - the $k$ largest logits and the numbers of their classes, 4 bytes each;
# - the **rest**: how much probability all other classes have together, one number of 4
#   bytes for each of the temperatures 1 and 2.
#
# That is $8 k + 8$ bytes for a token. In the loss the other classes count as one class,
# for teacher and student.
#
# The students below train on the validation text, which is new for the teacher, too. A
# batch has 4 windows of 64 tokens.

# %%
valid = ft.data.pretraining("prose", "valid")
text = valid[:STEPS * 4 * 64]                            # one epoch: STEPS batches
batches = ft.data.lm_batches(text, T=64, batch_size=4, seed=1)  # here T is the length
folder = tempfile.TemporaryDirectory()
cache = ft.TeacherCache(folder.name, teacher, k=k)

# %%
computed = cache.fill(batches)
again = cache.fill(batches)
print(f"{computed} windows computed, {again} the second time")
print(f"the cache: {(8 * k + 8) * len(text) / 1e6:.1f} MB")
print(f"all logits would be {4 * V * len(text) / 1e6:.0f} MB")

# %% [check]
assert computed == len(text) // 64
assert again == 0

# %% [markdown]
# `ft.Hinton(cache)` reads it. Is the rest worth its 8 bytes? Think of the shares above:
# at $T = 1$ the 64 best tokens have most of the probability. At $T = 2$ they have less
# than half of it. Without the rest, the student would learn that all other tokens have
# none. We will measure how much harm that does.
#
# There is a second limit. BERT's random masks make a new input in every epoch, and
# nothing is found in the cache.
#
# **Exercise:** `largest`.
#
# ## The student's first weights
# Which weights does the student start with? If it has the teacher's width, it can copy
# some of the teacher's layers. DistilBERT (Sanh et al. 2019) copies 6 of the 12
# layers of BERT. The paper says: "one layer out of two". The authors' program takes
# the layers 0, 2, 4, 7, 9 and 11, spread evenly from the first to the last:

# %%
chosen = layer_map("spread", 12, 6)
print(chosen)
print(layer_map("every_other", 12, 6))

# %%
# a box: (column, row, text, kind); kind "data" is blue, "trained" is orange
boxes = {"t": (-2, 0, "teacher", "none"), "s": (-2, 1, "student", "none")}
arrows = []
for i in range(12):
    kind = "data" if i in chosen else ""
    boxes |= {f"teacher {i}": (i, 0, f"{i}", kind)}
for i, layer in enumerate(chosen):
    boxes |= {f"student {i}": (11 / 5 * i, 1, f"{i}", "trained")}
    arrows.append((f"teacher {layer}", f"student {i}"))
diagram(boxes, arrows, height=1.7,
        caption="The layers of DistilBERT: round(i · 11/5). The last layer of the "
                "teacher is among them. 0, 2, 4, 6, 8, 10 would leave it out.")

# %% [markdown]
# Embeddings, norms and head are copied as well. Our teacher has four layers, 0 to 3.
# Which two are the best start? There are six pairs.
#
# **Predict first.** One layer cannot be left out: without it, the perplexity before
# any training is in the thousands. Which one?

# %%
start = {}
for pair in itertools.combinations(range(4), 2):
    shallow = ft.student(teacher, 2, pair)
    start[pair] = ft.corpus_perplexity(shallow, test[:2048], length=64).perplexity
for pair in sorted(start, key=start.get):
    print(f"layers {pair}: perplexity {start[pair]:6.1f}")
whole = ft.corpus_perplexity(teacher, test[:2048], length=64).perplexity
print(f"all four layers: {whole:10.1f}")

# %% [check]
assert layer_map("spread", 4, 2) == [0, 3]
assert all(start[pair] < 3 * whole for pair in start if 0 in pair)
assert all(start[pair] > 5000 for pair in start if 0 not in pair)
assert start[0, 2] < start[0, 3] < start[0, 1]

# %% [markdown]
# It is layer 0: the other layers have learned to read its output, not the embeddings.
# Of the pairs with layer 0, 0 and 2 are the best here, slightly better than 0 and 3,
# the pair of `"spread"`. So "evenly, with both ends" is a good guess, but not always
# the best. The third argument of `ft.student` may be any list of layers. We keep its
# default, `"spread"`: layers 0 and 3.
#
# **Exercise:** `layer_map`.
#
# ## DistilBERT's three losses
# Hinton's loss has two terms, for the teacher and for the labels. DistilBERT adds a
# third one. Teacher and student have the same width, so their last hidden states $h_t$
# and $h_s$ can be compared. They should have the same *direction*:
#
# $L = 5 \, L_{ce} + 2 \, L_{mlm} + 1 \, L_{cos}$
#
# - $L_{ce}$ is $T^2 \, KL(t \parallel s)$ with $T = 2$, the mean over all real
#   tokens.
# - $L_{mlm}$ is the loss of the masked tokens with their labels. For a GPT it is the
#   loss of the next tokens.
# - $L_{cos}$ is the mean of $1 - \cos(h_s, h_t)$ over all real tokens. The cosine is
#   taken along the entries of a state, after the last norm. The lengths of the states
#   do not count.
#
# The lecture lists the three terms without their weights. The weights 5, 2 and 1 stand
# in the command with which the authors trained. Here are the three terms for our
# student, before training. Each pass keeps its logits and its last hidden states in a
# Context.

# %%
ours = ft.Context()
theirs = ft.Context()
with ft.no_grad():
    student(batch["ids"], ours)
    teacher(batch["ids"], theirs)

real = np.ones((4, 64), bool)                            # the positions that count
real[:, -1] = False                                      # the last one has no label
z_s = ft.Tensor(ours.output.numpy()[real])               # (4 · 63, V)
z_t = ft.Tensor(theirs.output.numpy()[real])
next_tokens = batch["ids"][:, 1:].reshape(-1)            # (4 · 63,) the labels

# %%
terms = {
    "soft": distillation_loss(z_s, z_t, np.ones(len(z_s)), 2.0),
    "labels": ft.ops.cross_entropy(z_s, next_tokens),
    "cosine": cosine_loss(ours.last_hidden_state, theirs.last_hidden_state, real)}
weights = {"soft": 5, "labels": 2, "cosine": 1}
total = 0.0
for name, term in terms.items():
    total += weights[name] * term.item()
    print(f"{name:7} {weights[name]} x {term.item():.3f}")
print(f"their sum: {total:.3f}")

# %%
triple = ft.DistilBERTLoss(teacher)
ctx, value = triple(student, triple.read(batch))
print(f"the library's loss: {value.item():.3f}")

# %% [check]
assert (triple.soft, triple.hard, triple.cosine, triple.temperature) == (5, 2, 1, 2)
assert np.isclose(total, value.item(), rtol=1e-4)
longer = ft.Tensor(3 * ours.last_hidden_state.numpy())
stretched = cosine_loss(longer, theirs.last_hidden_state, real)
assert np.isclose(stretched.item(), terms["cosine"].item(), rtol=1e-4)

# %% [markdown]
# **Exercise:** `cosine_loss`.
#
# ## Does a teacher help?
# Now we train students with half of the layers, each for the same few steps on the
# same text. Some start as layers of the teacher, some with random weights. Some learn
# from the labels alone, some from the teacher. We measure on 2,048 tokens of test
# text: the perplexity; $KL$ to the teacher at $T = 1$; and how often the student's best
# token is the teacher's best token, too.

# %%
test_windows = test[:2048].reshape(32, 64)
with ft.no_grad():
    z_teacher = teacher(test_windows).numpy()            # (32, 64, V)
log_t = log_softmax(z_teacher)
best_of_teacher = z_teacher.argmax(axis=-1)

def measure(model):
    """Perplexity, KL to the teacher, and the share of equal best tokens."""
    with ft.no_grad():
        z = model(test_windows).numpy()
    log_s = log_softmax(z)
    labels = test_windows[:, 1:, None]                   # (32, 63, 1)
    of_labels = np.take_along_axis(log_s[:, :-1], labels, axis=-1)
    kl = (np.exp(log_t) * (log_t - log_s)).sum(axis=-1).mean()
    same = (z.argmax(axis=-1) == best_of_teacher).mean()
    return {"perplexity": np.exp(-of_labels.mean()), "KL": kl, "same": same}

# %%
results = {}

def keep(name, model, seconds=0.0):
    """Measure a model, and keep the results under its name."""
    parameters = ft.count(model).total
    results[name] = {"parameters": parameters, "seconds": seconds, **measure(model)}

def train(name, student, loss=None, lr=1e-3):
    """Train a student, and keep its results under its name."""
    batches = ft.data.lm_batches(text, T=64, batch_size=4, seed=1)
    begin = time.thread_time()                           # processor time
    ft.fit(student, batches, STEPS, ft.AdamW(lr), ft.linear_schedule(warmup=0.1),
           loss=loss, progress=False)
    keep(name, student, time.thread_time() - begin)
    print(f"{name:28} perplexity {results[name]['perplexity']:6.1f}")

# %% [markdown]
# First the students that start as layers 0 and 3 of the teacher. Without a `loss`,
# `fit` trains on the labels. `hinton` is the loss of above, with $\lambda = 1$: no
# labels at all.

# %%
untrained = ft.student(teacher, 2)
keep("teacher, 4 layers", teacher)
keep("layers, not trained", untrained)
train("layers, labels", ft.student(teacher, 2))
train("layers, teacher", ft.student(teacher, 2), hinton)
train("layers, three losses", ft.student(teacher, 2), ft.DistilBERTLoss(teacher))

# %% [markdown]
# Then students of the same shape with random weights. They have more to learn, so they
# get a larger learning rate.

# %%
train("random, labels", ft.GPT(untrained.config, seed=3), lr=2e-3)
train("random, teacher", ft.GPT(untrained.config, seed=3), hinton, lr=2e-3)

# %% [check]
perplexity = {name: result["perplexity"] for name, result in results.items()}
assert perplexity["layers, teacher"] < 0.95 * perplexity["layers, labels"]
assert perplexity["layers, labels"] < perplexity["layers, not trained"]
three = perplexity["layers, three losses"] / perplexity["layers, teacher"]
assert 0.9 < three < 1.1
assert perplexity["random, labels"] > 5 * perplexity["layers, labels"]
assert perplexity["random, teacher"] > 5 * perplexity["layers, teacher"]
assert 0.8 < perplexity["random, teacher"] / perplexity["random, labels"] < 1.25
assert np.isclose(perplexity["layers, not trained"], start[0, 3], rtol=0.05)

# %% [markdown]
# Two things are clear, even after so few steps. **The first weights matter most**: both
# students with random weights have a perplexity about ten times as high, with the
# teacher as with the labels. And **a student that starts as layers of the teacher
# learns more from the teacher's answers than from the labels**, although it has not
# seen one label.
#
# The three losses do about as well as the teacher's answers alone. The authors of
# DistilBERT trained much longer, and left out one thing at a time. They report the mean
# score on the tasks of GLUE, a benchmark of English texts. Random first weights cost
# most, 3.7 points. Without the teacher's distribution it was 3.0 points, without the
# cosine 1.5, and without the labels of the masked tokens 0.3.
#
# ## What the cache costs
# Now the harm of a cache without the rest, at $T = 2$. We train one student with a loss
# that drops the rest: the teacher's softmax is then over the 64 best tokens alone. A
# second student gets all that the cache holds.

# %%
class WithoutRest(ft.Hinton):
    """Reads a cache, and drops the probability of the other tokens."""

    def read(self, batch):
        targets = super().read(batch)
        targets.teacher_tail = None                      # the rest
        return targets

without_rest = WithoutRest(cache, temperature=2.0, soft=1.0)
with_rest = ft.Hinton(cache, temperature=2.0, soft=1.0)
train("layers, cache without rest", ft.student(teacher, 2), without_rest)
train("layers, cache", ft.student(teacher, 2), with_rest)

# %% [markdown]
# How often is the label among the other 2,048 − 64 = 1,984 tokens? It is if 64 tokens
# or more have a larger logit. (The last position of a window has no label.)

# %%
labels = test_windows[:, 1:, None]
logits = z_teacher[:, :-1]
of_label = np.take_along_axis(logits, labels, axis=-1)   # (32, 63, 1)
larger = (logits > of_label).sum(axis=-1)
outside = (larger >= k).mean()
print(f"{100 * outside:.0f} % of the labels are not among the teacher's {k} best")

# %% [check]
perplexity = {name: result["perplexity"] for name, result in results.items()}
assert perplexity["layers, cache without rest"] > perplexity["layers, not trained"]
assert perplexity["layers, cache"] < perplexity["layers, labels"]
assert 0.15 < outside < 0.25

# %% [markdown]
# The first student is worse than before its training. It has learned to give nearly no
# probability to 1,984 of the tokens, and a fifth of the labels are among them. With the
# rest, one more number for each position, most of the harm is gone. So look at what a
# cache leaves out, above all at a high temperature.
#
# What does the cache save? The teacher's pass in each epoch. The table at the end has
# the seconds of each training. Our teacher is only 1.6 times as large as its student;
# a teacher that is a hundred times as large costs far more than the student does.
#
# ## How much smaller, how much faster?
# The abstract of DistilBERT says, and the lecture repeats: 40 % smaller, 60 % faster,
# 97 % of BERT's performance.
#
# **Predict first.** The student has half of the layers. Why is it only 40 % smaller?

# %%
C, F = 768, 3072                                         # width, width inside the MLP
norm = 2 * C                                             # a scale and a shift
embeddings = 30_522 * C + 512 * C + norm                 # of tokens and of positions
attention = 4 * (C * C + C)                              # query, key, value, output
mlp = (C * F + F) + (F * C + C)                          # up and down
block = attention + mlp + 2 * norm
only_bert = 2 * C + (C * C + C)                          # token types and a pooler
bert = embeddings + 12 * block + only_bert
distilbert = embeddings + 6 * block
print(f"BERT {bert / 1e6:.1f} million, DistilBERT {distilbert / 1e6:.1f} million")
print(f"{100 * (1 - distilbert / bert):.0f} % smaller")
print(f"embeddings: {100 * embeddings / distilbert:.0f} % of DistilBERT")

# %% [markdown]
# Only the blocks become fewer. The embeddings stay as they are. And "60 % faster"? The
# paper measured 668 seconds for BERT and 410 for DistilBERT, on a CPU:

# %%
print(f"{668 / 410:.2f} times as fast; {100 * (1 - 410 / 668):.0f} % less time")

# %% [markdown]
# So "60 % faster" means 1.63 times as many texts in the same time. The time is 39 %
# less, not 60 %. And 97 % is the ratio of the mean scores on GLUE, 77.0 to 79.5. How
# fast is our student?

# %%
def seconds_of_a_pass(model):
    """The processor time of the fastest of five passes."""
    taken = []
    for _ in range(5):
        begin = time.thread_time()
        with ft.no_grad():
            model(test_windows[:8])
        taken.append(time.thread_time() - begin)
    return min(taken)

for_teacher = seconds_of_a_pass(teacher)
for_student = seconds_of_a_pass(untrained)
print(f"{for_teacher / for_student:.1f} times as fast")

# %% [check]
assert bert == 109_482_240
assert distilbert == 66_362_880
assert round(668 / 410, 2) == 1.63
assert round(100 * 77.0 / 79.5, 1) == 96.9
assert for_student < for_teacher

# %% [markdown]
# The student is not twice as fast: the embeddings and the head cost it as much time as
# they cost the teacher.
#
# ## Where it stops
# We try two smaller students. The first has one layer of the teacher. The second has
# half the width. Its matrices have other shapes than the teacher's, so it must start
# with random weights. (It is small, and gets the largest learning rate.) The package
# ships a model of just this shape, trained on the labels of 12 million tokens.

# %%
train("one layer, teacher", ft.student(teacher, 1), hinton)
long_trained, _ = ft.load("base-gpt-small")
narrow = ft.GPT(long_trained.config, seed=3)
train("half the width, teacher", narrow, hinton, lr=4e-3)
keep("half the width, 12 M tokens", long_trained)
print(f"our students saw {len(text):,} tokens")

# %% [markdown]
# The narrow student has hardly begun to learn. A model of its shape can do much better:
# the shipped one has a far lower perplexity, after about 2,000 times as many tokens. So
# if the student cannot start as the teacher, distillation is pretraining: it needs much
# text, and the teacher must read all of it.
#
# ## The whole lesson in one table
# "layers" are students that started as two layers of the teacher. "random" students
# have the same shape and started with random weights. Each trained for the same few
# steps on the same text; only the last row is the shipped model. "KL" is $KL$ to the
# teacher. "same" is the share of positions at which the best token is the teacher's.
# "s" is the processor time of the training, in seconds.

# %%
print(f"{'':28}{'parameters':>10}{'perplexity':>11}{'KL':>7}{'same':>8}{'s':>6}")
for name, result in results.items():
    print(f"{name:28}{result['parameters']:10,}{result['perplexity']:11.1f}"
          f"{result['KL']:7.2f}{100 * result['same']:6.0f} %{result['seconds']:6.1f}")

# %% [check]
KL = {name: result["KL"] for name, result in results.items()}
assert KL["teacher, 4 layers"] == 0
assert KL["layers, teacher"] == min(list(KL.values())[1:])
assert KL["layers, teacher"] > 0.5
assert ft.count(teacher).total / ft.count(untrained).total > 1.55
assert KL["one layer, teacher"] > KL["layers, teacher"]
assert KL["half the width, teacher"] > 2 * KL["one layer, teacher"]
assert KL["half the width, 12 M tokens"] < KL["half the width, teacher"] / 2
assert 12_288_000 / (24 * 256) == 2000

# %% [markdown]
# No student answers as its teacher does: even the best $KL$ is above 0.5. Distillation
# is worth its cost if the student is used many times, if it can start as layers of the
# teacher, and if there is enough text for the teacher to answer.
#
# **Exercises.** `tinyft start distillation` writes five files:
#
# - `distillation_loss`: the student learns a distribution
# - `run_teacher`: a pass of the teacher that is not recorded
# - `largest`: what the cache keeps
# - `layer_map`: the layers from which the student starts
# - `cosine_loss`: the directions of the hidden states
