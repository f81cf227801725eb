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
# fewer bits. This lesson takes the other way: a *smaller* model learns to answer as
# the large one does. The large model is the **teacher**, the small one the
# **student**, and the training is called **distillation** (Hinton, Vinyals and Dean
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

STEPS = 16 if "TINYFT_FAST" in os.environ else 24
teacher, tokenizer = ft.load("base-gpt")                 # 4 layers, 128 wide
test = ft.data.pretraining("prose", "test")
V = teacher.config.vocab

# %% [markdown]
# ## What a label does not say
# Here are fifteen tokens of real text that the teacher has never seen: the docstring
# of a Python function. The text goes on with the token ` del`, the beginning of
# "delta". That token is the **label**. What does the teacher expect?

# %%
def log_softmax(z):
    """The logarithms of the probabilities, along the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

context = test[9035:9050]
label = test[9050]
with ft.no_grad():
    z = teacher(context[None]).numpy()[0, -1].astype(np.float64)      # (V,) logits
p = np.exp(log_softmax(z))

# %%
print(tokenizer.decode(context), "...")
best = np.argsort(-p)[:6]
for token in [*best, label]:
    print(f"{tokenizer.decode([token]):>12} {p[token]:.2g}")

# %% [markdown]
# The label says: ` del` is right, and the other 2,047 tokens are wrong, all equally
# wrong. The teacher does not know this label. It says: a function that gets lists of
# strings returns a list, a tuple, a string or a dictionary. It has learned that these
# words can stand in the same place. So a wrong answer is not just wrong: ` list` is a
# much better one than ` because`.

# %%
because = tokenizer.encode(" because").ids[0]
print(f"list: {p[best[0]]:.2f}   because: {p[because]:.1e}")
print(f"{p[best[0]] / p[because] / 1e6:.1f} million times as probable")

# %% [check]
assert [tokenizer.decode([token]) for token in best[:4]] == [
    " list", " tuple", " string", " dictionary"]
assert tokenizer.decode([label]) == " del"
assert p[label] < 0.001
assert p[best[0]] > 100_000 * p[because]

# %% [markdown]
# This knowledge is called **dark knowledge**: it lies in the small probabilities, and
# nobody sees it when the model only answers with its best token. A student that is
# trained on labels must read many texts until it has seen all of these words in such
# a place. One answer of the teacher shows all of them at once.
#
# ## Temperature
# Most of the dark knowledge lies in small numbers. In a loss they hardly count. So
# Hinton divides the logits by a **temperature** $T$ before the softmax:
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
             "logarithmic. A higher temperature brings all of them together; their "
             "order stays.")

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
# is the $T$-th root of what it was.
#
# There is a price. Our vocabulary has 2,048 tokens, and nearly all of them are
# nonsense in a given place. A high temperature lifts them, too. We measure it on 512
# tokens of test text: how much probability do the 64 best tokens have?

# %%
windows = test[:512].reshape(8, 64)
with ft.no_grad():
    z_teacher = teacher(windows).numpy().reshape(-1, V).astype(np.float64)
share = {}
for T in temperatures:
    ordered = np.sort(np.exp(log_softmax(z_teacher / T)), axis=-1)[:, ::-1]
    share[T] = ordered[:, :64].sum(axis=-1).mean()
    print(f"T = {T}: the 64 best tokens have {100 * share[T]:.0f} % of the probability")

# %% [check]
assert np.isclose(first / second, 100**0.25)
assert (np.argsort(-soft[4])[:6] == best).all()
assert 0.8 < share[1] < 0.95
assert 0.3 < share[2] < 0.55
assert share[4] < 0.25

# %% [markdown]
# Already at $T = 2$ more than half of the probability lies on tokens that do not
# matter much. For ten classes of pictures Hinton took temperatures up to 20. For
# language, 1 to 4 is usual.
#
# ## A loss for distributions
# Let $t$ be the teacher's probabilities at one position, and $s$ the student's. The
# cross-entropy of lesson 03 took one label. With a distribution it is
#
# $CE(t, s) = -\sum_i t_i \ln s_i$
#
# With a one-hot $t$ that is the old loss. Its smallest value is not 0, but the
# **entropy** of the teacher, $H(t) = -\sum t_i \ln t_i$, which $s = t$ reaches. The
# difference of the two is the **Kullback-Leibler divergence**:
#
# $KL(t \parallel s) = CE(t, s) - H(t) = \sum_i t_i (\ln t_i - \ln s_i)$
#
# It is never negative, and 0 only for $s = t$. The entropy does not depend on the
# student, so both have the same gradient. We use KL, since its 0 means "as the
# teacher".
#
# We need a student. For now it is a copy of the teacher without two of its four
# layers. Which two, we discuss below.

# %%
student = ft.student(teacher, 2)
with ft.no_grad():
    z_student = student(windows).numpy().reshape(-1, V).astype(np.float64)
log_t = log_softmax(z_teacher)
log_s = log_softmax(z_student)
t = np.exp(log_t)
cross_entropy = -(t * log_s).sum(axis=-1)                # (512,) one for each token
entropy = -(t * log_t).sum(axis=-1)
kl = (t * (log_t - log_s)).sum(axis=-1)
print(f"CE {cross_entropy.mean():.3f} = H {entropy.mean():.3f} + KL {kl.mean():.3f}")

# %% [markdown]
# The lecture (*Reduced Complexity Models and Pretraining*) writes the loss as
# $\sum_i t_i \ln s_i$. The minus sign is missing there. Does it matter? Training
# makes a loss *small*. We train three logits with both signs. The gradient of $CE$
# with respect to the logits is $s - t$.
#
# **Predict first.** The teacher has the probabilities 0.6, 0.3 and 0.1. Which
# probabilities does the student of the other sign have after 200 steps?

# %%
target = np.array([0.6, 0.3, 0.1])

def trained(sign):
    """The probabilities after 200 steps down the slope of sign · CE."""
    z = np.zeros(3)
    for _ in range(200):
        z -= 0.5 * sign * (np.exp(log_softmax(z)) - target)
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
# Without the minus the student learns to be sure of what the teacher finds least
# likely.
#
# ## Which way round?
# $KL(t \parallel s)$ and $KL(s \parallel t)$ are different losses. To see how, let a
# teacher have two peaks on a line of 41 places, and let the student be *too small*
# for that: it can make one peak, whose middle and width it may choose. We try all of
# them and take the best one under each loss.

# %%
places = np.arange(41)

def peak(middle, width):
    return np.exp(log_softmax(-((places - middle) / width) ** 2 / 2))

def divergence(p, q):
    return (p * np.log(p / q)).sum()

two_peaks = 0.6 * peak(10, 2.5) + 0.4 * peak(29, 2.5)
widths = np.linspace(1.5, 16, 59)
students = [peak(m, w) for m, w in itertools.product(places, widths)]
covers = min(students, key=lambda s: divergence(two_peaks, s))
chooses = min(students, key=lambda s: divergence(s, two_peaks))

# %%
curves({"teacher": two_peaks, "student, KL(teacher ‖ student)": covers,
        "student, KL(student ‖ teacher)": chooses}, x=places, xlabel="place",
       ylabel="probability",
       caption="A student that cannot have two peaks. The first loss asks: is there "
               "something that the teacher finds possible and the student does not? "
               "So the student covers both peaks. The second asks the opposite, and "
               "the student chooses one peak.")

# %% [check]
between = slice(16, 24)
assert covers[10] > 0.01 and covers[29] > 0.01
assert covers[between].sum() > 10 * two_peaks[between].sum()
assert chooses[10] > 0.1 and chooses[29] < 1e-6
one_hot = np.array([1.0, 0.0, 0.0])
with np.errstate(divide="ignore"):                       # the logarithm of x / 0
    assert np.isinf(divergence(target, one_hot))

# %% [markdown]
# Distillation uses $KL(t \parallel s)$, with the teacher's probabilities as weights.
# It is the cross-entropy that we know, and labels are a special case of it.
# $KL(s \parallel t)$ would be infinite for a label. The price is visible: the student
# gives probability to the places between the peaks, where the teacher gives none.
#
# ## A mean over what?
# The loss is the sum over the classes and the *mean over the tokens*. Whoever writes
# `mean()` for all of it divides by $V$ as well. In batches (B, T, V) there is a third
# way: the sum over everything, divided by B. PyTorch's `kl_div` has both, under the
# names `mean` (its default) and `batchmean`.

# %%
terms = (t * (log_t - log_s)).reshape(8, 64, V)          # (B, T, V)
print(f"mean over the tokens:  {terms.sum(axis=-1).mean():.4f}")
print(f"mean over everything:  {terms.mean():.6f}")
print(f"sum, divided by B:     {terms.sum() / 8:.1f}")

# %% [check]
assert np.isclose(terms.mean() * V, kl.mean())
assert np.isclose(terms.sum() / 8, 64 * kl.mean())

# %% [markdown]
# Beside a loss for the labels, the first error makes the teacher 2,048 times too
# quiet: it has next to no effect. The second makes it 64 times too loud. Neither
# gives an error message.
#
# ## Why T²?
# At a temperature, both models are softened: $t$ is the softmax of $z_t/T$, and $s$
# that of $z_s/T$. The gradient with respect to the student's logits is then
#
# $(s - t) / T$
#
# The $1/T$ comes from $z/T$. And $s - t$ itself becomes smaller: at a high
# temperature both distributions are nearly flat, and their difference is about $1/T$
# of what it was. Together that is about $1/T^2$. We measure it. (`distillation_loss`
# is the library's, with the factor $T^2$. We take 64 of the tokens.)
#
# **Predict first.** $T$ goes from 16 to 32. What happens to the gradient of KL,
# without any factor?

# %%
ones = np.ones(64)

def gradient_of(T, factor):
    """The gradient of factor · KL with respect to the student's logits (64, V)."""
    z = ft.Tensor(z_student[:64], requires_grad=True)
    loss = distillation_loss(z, ft.Tensor(z_teacher[:64]), ones, T)
    (loss * (factor / T**2)).backward()
    return z.grad

range_of_T = [1, 2, 4, 8, 16, 32, 64]
plain = [np.linalg.norm(gradient_of(T, 1)) for T in range_of_T]
squared = [np.linalg.norm(gradient_of(T, T**2)) for T in range_of_T]
print(f"without: T = 16 {plain[4]:.2e}, T = 32 {plain[5]:.2e}")

# %%
labels = test[1:65]
hard = np.exp(log_s[:64])
hard[np.arange(64), labels] -= 1                         # s − one-hot
hard_size = np.linalg.norm(hard / 64)
curves({"KL": plain, "T² KL": squared}, x=range_of_T, log="xy",
       levels={"cross-entropy with the labels": hard_size}, xlabel="T",
       ylabel="size of the gradient",
       caption="Without a factor the gradient falls with 1/T², and a mixed loss would "
               "soon hear only the labels. With T² it stays the same from T = 8 on.")

# %% [check]
soft_s = np.exp(log_softmax(z_student[:64] / 4))
soft_t = np.exp(log_softmax(z_teacher[:64] / 4))
assert np.allclose(gradient_of(4, 1), (soft_s - soft_t) / 4 / 64)
assert 3.5 < plain[4] / plain[5] < 4.5
assert plain[0] / plain[-1] > 30_000
assert 5 < max(squared) / min(squared) < 15
assert max(squared[3:]) / min(squared[3:]) < 1.1
assert 3.5 < plain[5] / plain[6] < 4.5
assert np.isclose(squared[6] / plain[6], 64**2)

# %% [markdown]
# At $T = 32$ the gradient is a quarter of that at 16, as the rule says. From $T = 1$
# to 64 it falls to less than a thirty-thousandth. With $T^2$ it falls to a tenth, and
# all of that happens below $T = 8$: there the distributions are not flat yet, and the
# rule does not hold. So $T^2$ does not make the gradient equal for all $T$, but it
# keeps its size comparable. That is why the loss is
#
# $T^2 \, KL(t \parallel s)$
#
# The lecture names the temperature and leaves the factor out. Some well-known
# programs did the same. At $T = 4$ the teacher then counts a sixteenth of what its
# weight in the loss says.
#
# ## A very high temperature
# What remains of the loss if $T$ is very large? For a small number $u$, $e^u$ is
# about $1 + u$. So the probabilities are about $(1 + \tilde z_i/T) / V$, where
# $\tilde z$ are the **centred** logits, with the mean 0. The gradient becomes
#
# $T (s - t) \to (\tilde z_s - \tilde z_t) / V$
#
# That is the gradient of a squared distance: $T^2 \, KL$ tends to the sum of
# $(\tilde z_s - \tilde z_t)^2$ over all classes, divided by $2V$.

# %%
def centred(z):
    return z - z.mean(axis=-1, keepdims=True)

distance = (centred(z_student) - centred(z_teacher)) ** 2
limit = distance.sum(axis=-1).mean() / (2 * V)
ratio = {}
for T in (1, 4, 16, 64, 256, 1024):
    log_soft = log_softmax(z_teacher / T)
    kl_at_T = np.exp(log_soft) * (log_soft - log_softmax(z_student / T))
    ratio[T] = T**2 * kl_at_T.sum(axis=-1).mean() / limit
    print(f"T = {T:4}: T² KL is {ratio[T]:.3f} of the limit")

# %% [check]
assert abs(ratio[1024] - 1) < 0.005
assert abs(ratio[64] - 1) < 0.1
assert 0.6 < ratio[1] < 0.8

# %% [markdown]
# In the limit the student matches logits, and every token of the vocabulary counts
# the same, also the 2,000 that the teacher would never say. A student that is too
# small for everything should spend its weights on the tokens that matter. At the
# other end, a teacher that is quite sure is a label. The temperature chooses a point
# between "only the best token" and "all logits alike".
#
# **Exercise:** `distillation_loss`.
#
# ## Teacher and labels
# If there are labels, use both. Hinton's loss is
#
# $(1 - \lambda) \, CE(y, s) + \lambda \, T^2 \, KL(t \parallel s)$
#
# The first term is at $T = 1$. In the library it is
# `ft.Hinton(teacher, temperature, soft)`, where `soft` is $\lambda$, and `fit` takes
# it as its `loss`. (`row_weights` gives 0 to a position without a label.)

# %%
quote(mixed_loss)

# %% [markdown]
# With $\lambda = 1$ no labels are needed. For a classifier this is a gift: any text
# will do, the teacher labels it. What is needed is the same tokens: logit number 700
# of the teacher must be about the token 700 of the student. And a temperature is for
# the training only. Later the student is used at $T = 1$.
#
# ## The teacher rests
# The teacher only answers. Three things keep it so:
#
# - It is in **evaluation mode**. With dropout it would give another answer each time.
# - Its pass is **not recorded**. Otherwise `backward` would go through the teacher,
#   too.
# - Its parameters are **not updated**. `fit` updates the student's alone.
#
# Suppose the second is forgotten. We measure the memory of one step, and look whether
# the teacher has gradients afterwards.

# %%
batch = {"ids": windows[:4]}

def step_at_rest():
    loss = ft.Hinton(teacher, temperature=2.0, soft=1.0)
    _, value = loss(student, loss.read(batch))
    value.backward()

def step_recorded():
    z_t = teacher(batch["ids"])
    ft.functional.kl_divergence(z_t, student(batch["ids"]), 2.0).backward()

peaks = []
for step in (step_at_rest, step_recorded):
    with ft.peak_memory() as memory:
        step()
    peaks.append(memory["bytes"])
    reached = any(w.grad is not None for w in teacher.parameters())
    print(f"{step.__name__:14} {peaks[-1] / 1e6:5.1f} MB, "
          f"the teacher has gradients: {reached}")

# %% [check]
assert reached
assert peaks[1] > 1.5 * peaks[0]
teacher.zero_grad()
student.zero_grad()
step_at_rest()
assert all(w.grad is None for w in teacher.parameters())
assert any(w.grad is not None for w in student.parameters())
student.zero_grad()

# %% [markdown]
# The student's gradients are the same, and nobody uses those of the teacher. They
# only cost memory and time. But if an optimiser held the teacher's parameters as
# well, the teacher would learn to answer as the *student* does.
#
# **Exercise:** `run_teacher`.
#
# ## The teacher's answers on disk
# The teacher gives the same answer to the same text in every epoch. So it may answer
# once. A full answer is 2,048 numbers for each token; the `TeacherCache` keeps the
# $k$ largest logits and their classes, $8k$ bytes. It also keeps, for the temperatures
# 1 and 2, how much probability lies on all other classes together, $8$ bytes.

# %%
valid = ft.data.pretraining("prose", "valid")
text = valid[:STEPS * 256]                               # one epoch: STEPS batches
batches = ft.data.lm_batches(text, T=64, batch_size=4, seed=1)
folder = tempfile.TemporaryDirectory()
cache = ft.TeacherCache(folder.name, teacher, k=64)
rows = cache.fill(batches)
again = cache.fill(batches)
print(f"{rows} texts computed, {again} the second time")
print(f"{8 * 64 * len(text) / 1e6:.1f} MB; all logits would be "
      f"{4 * V * len(text) / 1e6:.0f} MB")

# %% [markdown]
# `ft.Hinton(cache)` reads it. The other classes count as one, for teacher and student.
# Are those 8 bytes worth it? Think of the shares above: at $T = 1$ the 64 best tokens
# have most of the probability, at $T = 2$ less than half of it. We will measure what
# comes of a student who is taught that the rest has none.
#
# There is a second limit. BERT's random masks make a new text in every epoch, and
# nothing is found in the cache.
#
# **Exercise:** `largest`.
#
# ## The student's first weights
# Where does the student start? If it has the teacher's width, it can start *as* the
# teacher, with some of the layers. DistilBERT (Sanh et al. 2019) takes 6 of the 12
# layers of BERT. The paper says: "one layer out of two". The authors' program takes
# the layers 0, 2, 4, 7, 9 and 11, spread evenly from the first to the last:

# %%
print(layer_map("spread", 12, 6))
print(layer_map("every_other", 12, 6))

# %%
boxes = {"t": (-1.2, 0, "teacher", "none"), "s": (-1.2, 1, "student", "none")}
chosen = layer_map("spread", 12, 6)
for i in range(12):
    kind = "data" if i in chosen else ""
    boxes |= {f"teacher {i}": (0.62 * i, 0, f"{i}", kind)}
arrows = []
for i, layer in enumerate(chosen):
    boxes |= {f"student {i}": (0.62 * 11 / 5 * i, 1, f"{i}", "trained")}
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
windows = test[:2048].reshape(32, 64)
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
assert rows == len(text) // 64
assert again == 0
assert all(start[pair] < 3 * whole for pair in start if 0 in pair)
assert all(start[pair] > 5000 for pair in start if 0 not in pair)
assert start[0, 2] < start[0, 3] < start[0, 1]

# %% [markdown]
# It is the first: the other layers have learned to read its output, not embeddings.
# Of the rest, 0 and 2 are the best pair here, slightly before 0 and 3, the pair that
# `"spread"` takes. "Evenly, with both ends" is a good guess, but no law. In
# `ft.student(teacher, 2, kind)`, `kind` may be any list of layers. We take the
# default, 0 and 3.
#
# **Exercise:** `layer_map`.
#
# ## DistilBERT's three losses
# DistilBERT adds a third term. Teacher and student have the same width, so their last
# hidden states can be compared. The term wants them to have the same *direction*:
#
# $L = 5 \, L_{ce} + 2 \, L_{mlm} + 1 \, L_{cos}$
#
# - $L_{ce}$ is $T^2 \, KL(t \parallel s)$ with $T = 2$, the mean over all real
#   tokens.
# - $L_{mlm}$ is the loss of the masked tokens with their labels. For a GPT it is the
#   loss of the next tokens.
# - $L_{cos}$ is the mean of $1 - \cos(h_s, h_t)$ over all real tokens. The cosine is
#   taken along the entries of a state, after the last norm. Lengths do not count, and
#   padding does not count.
#
# The lecture lists the three terms without their weights. The weights 5, 2 and 1 are
# those with which the authors trained. Here are the three for our student, before
# training:

# %%
def states_of(model):
    """The Context of a pass over the batch: it keeps the last hidden states."""
    ctx = ft.Context()
    with ft.no_grad():
        model(batch["ids"], ctx)
    return ctx

ours = states_of(student)
theirs = states_of(teacher)
real = np.ones((4, 64), bool)
# position 63 has no next token in the batch, so the loss of the library leaves it out
real[:, -1] = False
z_s = ft.Tensor(ours.output.numpy()[real])
z_t = ft.Tensor(theirs.output.numpy()[real])

# %%
next_tokens = batch["ids"][:, 1:].reshape(-1)
soft_term = distillation_loss(z_s, z_t, np.ones(len(next_tokens)), 2.0)
hard_term = ft.ops.cross_entropy(z_s, next_tokens)
cosine_term = cosine_loss(ours.last_hidden_state, theirs.last_hidden_state, real)
terms = [float(term.numpy()) for term in (soft_term, hard_term, cosine_term)]
weights = [5, 2, 1]
for weight, term in zip(weights, terms):
    print(f"{weight} x {term:.3f}")
triple = ft.DistilBERTLoss(teacher)
_, value = triple(student, triple.read(batch))
print(f"their sum:     {np.dot(weights, terms):.3f}")
print(f"the library's: {float(value.numpy()):.3f}")

# %% [check]
assert (triple.soft, triple.hard, triple.cosine, triple.temperature) == (5, 2, 1, 2)
assert np.isclose(np.dot(weights, terms), float(value.numpy()), rtol=1e-4)
longer = ft.Tensor(3 * ours.last_hidden_state.numpy())
stretched = cosine_loss(longer, theirs.last_hidden_state, real)
assert np.isclose(float(stretched.numpy()), terms[2], rtol=1e-4)

# %% [markdown]
# **Exercise:** `cosine_loss`.
#
# ## Does a teacher help?
# Now we train students with half of the layers, each for the same few steps on the
# same text. Some start as layers of the teacher, some with random weights. Some learn
# from the labels alone, some from the teacher. We measure on 2,048 tokens of test
# text: the perplexity; KL to the teacher at $T = 1$; and how often the best token is
# the teacher's. (Random weights get a larger learning rate than the copied ones.)

# %%
with ft.no_grad():
    z_teacher = teacher(windows).numpy()
log_t = log_softmax(z_teacher)                           # (32, 64, V), float32

def measure(model):
    """(perplexity, KL to the teacher, share of equal best tokens)"""
    with ft.no_grad():
        z = model(windows).numpy()
    log_s = log_softmax(z)
    of_labels = np.take_along_axis(log_s[:, :-1], windows[:, 1:, None], axis=-1)
    kl = (np.exp(log_t) * (log_t - log_s)).sum(axis=-1).mean()
    same = (z.argmax(axis=-1) == z_teacher.argmax(axis=-1)).mean()
    return float(np.exp(-of_labels.mean())), float(kl), float(same)

# %%
results = {}

def keep(name, model, taken=0.0):
    """Measure a model, and keep the results under its name."""
    results[name] = [ft.count(model).total, *measure(model), taken]

def train(name, student, loss=None, lr=1e-3):
    """Train a student, and keep its results under its name."""
    batches = ft.data.lm_batches(text, T=64, batch_size=4, seed=1)
    begin = time.thread_time()
    ft.fit(student, batches, STEPS, ft.AdamW(lr), ft.linear_schedule(warmup=0.1),
           loss=loss, progress=False)
    taken = time.thread_time() - begin
    keep(name, student, taken)
    print(f"{name:28} perplexity {results[name][1]:6.1f}")

# %%
distilled = ft.Hinton(teacher, temperature=2.0, soft=1.0)    # no labels at all
untrained = ft.student(teacher, 2)
keep("teacher, 4 layers", teacher)
keep("layers, not trained", untrained)
train("layers, labels", ft.student(teacher, 2))
train("layers, teacher", ft.student(teacher, 2), distilled)
train("layers, three losses", ft.student(teacher, 2), ft.DistilBERTLoss(teacher))
small = untrained.config
train("random, labels", ft.GPT(small, seed=3), lr=2e-3)
train("random, teacher", ft.GPT(small, seed=3), distilled, lr=2e-3)

# %% [check]
perplexity = {name: row[1] for name, row in results.items()}
assert perplexity["layers, teacher"] < 0.95 * perplexity["layers, labels"]
assert perplexity["layers, labels"] < perplexity["layers, not trained"]
three = perplexity["layers, three losses"] / perplexity["layers, teacher"]
assert 0.9 < three < 1.1
assert perplexity["random, labels"] > 5 * perplexity["layers, labels"]
assert perplexity["random, teacher"] > 5 * perplexity["layers, teacher"]
assert 0.8 < perplexity["random, teacher"] / perplexity["random, labels"] < 1.25
assert np.isclose(perplexity["layers, not trained"], start[0, 3], rtol=0.05)

# %% [markdown]
# Two things are clear, even after so few steps. **The first weights matter most**: no
# student that starts at random comes near, with or without a teacher. And **from the
# layers of the teacher, its answers teach more than the labels do**, although
# `distilled` has not seen one label.
#
# The three losses do about as well as the teacher alone. The authors of DistilBERT
# trained much longer, and left out one thing at a time. On the tasks of GLUE a random
# start cost most (3.7 points), then came the teacher's distribution (3.0), the cosine
# (1.5), and the labels of the masked tokens (0.3).
#
# ## What the cache costs
# And a student of the cache, at $T = 2$? We train one with all that the cache holds,
# and before it one whose loss throws away the probability of the other 1,984 tokens.

# %%
class WithoutRest(ft.Hinton):
    """Takes the probability of the other tokens as 0."""

    def read(self, batch):
        targets = super().read(batch)
        targets.teacher_tail = None
        return targets

# %%
for name, kind in (("layers, cache", WithoutRest), ("layers, cache and rest", ft.Hinton)):
    train(name, ft.student(teacher, 2), kind(cache, temperature=2.0, soft=1.0))

# %% [check]
perplexity = {name: row[1] for name, row in results.items()}
assert perplexity["layers, cache"] > perplexity["layers, not trained"]
assert perplexity["layers, cache and rest"] < perplexity["layers, labels"]

# %% [markdown]
# The first student is worse than before its training. It has learned to give next to
# nothing to 1,984 of the tokens, and the right token is among them often enough. One
# more number for each position repairs most of it. So look at what a cache leaves
# out, above all at a high temperature.
#
# What does the cache save? The teacher's pass: little here, since our teacher is
# hardly larger than the student, and much if the teacher is a hundred times larger.
#
# ## How much smaller, how much faster?
# "40 % smaller, 60 % faster, 97 % of BERT's performance": so the abstract of
# DistilBERT, and so the lecture.
#
# **Predict first.** The student has half of the layers. Why is it only 40 % smaller?

# %%
C, F = 768, 3072                                         # width, width inside the MLP
embeddings = (30_522 + 512) * C + 2 * C                  # tokens, positions, a norm
block = 4 * (C * C + C) + (C * F + F) + (F * C + C) + 4 * C
bert = embeddings + 2 * C + 12 * block + (C * C + C)     # token types and a pooler
distilbert = embeddings + 6 * block
print(f"BERT {bert / 1e6:.1f} million, DistilBERT {distilbert / 1e6:.1f} million")
print(f"{100 * (1 - distilbert / bert):.0f} % smaller; "
      f"the embeddings are {100 * embeddings / distilbert:.0f} % of it")

# %% [markdown]
# The embeddings stay as they are. And "60 % faster"? The paper measured 668 seconds
# for BERT and 410 for DistilBERT, on a CPU:

# %%
print(f"{668 / 410:.2f} times as fast; {100 * (1 - 410 / 668):.0f} % less time")

# %% [markdown]
# So "60 % faster" means 1.63 times as many texts in the same time. The time is 39 %
# less, not 60 %. The 97 % are the ratio of the mean scores on GLUE, 77.0 against
# 79.5. How fast is our student?

# %%
def seconds(model):
    """The least processor time of a pass, of five."""
    taken = []
    for _ in range(5):
        begin = time.thread_time()
        with ft.no_grad():
            model(windows[:8])
        taken.append(time.thread_time() - begin)
    return min(taken)

for_teacher = seconds(teacher)
for_student = seconds(untrained)
print(f"{for_teacher / for_student:.1f} times as fast")

# %% [check]
assert bert == 109_482_240
assert distilbert == 66_362_880
assert round(668 / 410, 2) == 1.63
assert round(100 * 77.0 / 79.5, 1) == 96.9
assert for_student < for_teacher

# %% [markdown]
# ## Where it stops
# We take one layer of the teacher instead of two. And we take a student of half the
# width. It cannot start as the teacher at all: its matrices have other shapes. The
# package ships a model of just this shape, trained on labels for 12 million tokens.

# %%
train("one layer, teacher", ft.student(teacher, 1), distilled)
long_trained, _ = ft.load("base-gpt-small")
narrow = ft.GPT(long_trained.config, seed=3)
train("half the width, teacher", narrow, distilled, lr=4e-3)
keep("half the width, 12 M tokens", long_trained)
print(f"our students saw {STEPS * 256:,} tokens")

# %% [markdown]
# The narrow student has hardly begun to learn. The shipped model shows that there is
# room for more in its shape: its perplexity is far lower, after about 2,000 times as
# many tokens. So without a start from the teacher, distillation is pretraining: it
# needs much text, and the teacher must read all of it.
#
# ## The whole lesson in one table
# "layers" are students that started as two layers of the teacher, "random" have the
# same shape and started with random weights. All trained ones but the last saw the
# same text, for the same few steps. KL is that to the teacher. "same" is the share of
# positions where the best token is the teacher's, "s" the processor time of the
# training in seconds.

# %%
print(f"{'':28}{'parameters':>10}{'perplexity':>11}{'KL':>7}{'same':>8}{'s':>6}")
for name, (size, found, kl, same, taken) in results.items():
    print(f"{name:28}{size:10,}{found:11.1f}{kl:7.2f}{100 * same:6.0f} %{taken:6.1f}")

# %% [check]
KL = {name: row[2] for name, row in results.items()}
assert KL["teacher, 4 layers"] == 0
assert KL["layers, teacher"] == min(list(KL.values())[1:])
assert KL["layers, teacher"] > 0.1
assert KL["one layer, teacher"] > KL["layers, teacher"]
assert KL["half the width, teacher"] > 2 * KL["one layer, teacher"]
assert KL["half the width, 12 M tokens"] < KL["half the width, teacher"] / 2
assert 12_288_000 / (24 * 256) == 2000

# %% [markdown]
# No student is near its teacher: the best KL is far from 0. More steps bring it down,
# but two layers do not become four. Distillation is worth its cost if the student
# serves many times, if it can start from the teacher, and if there is enough text for
# the teacher to answer.
#
# **Exercises.** `tinyft start distillation` writes five files:
#
# - `distillation_loss`: the student learns a distribution
# - `run_teacher`: a pass of a teacher that rests
# - `largest`: what the cache keeps
# - `layer_map`: the layers from which the student starts
# - `cosine_loss`: the directions of the hidden states
