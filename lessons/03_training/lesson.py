# %% [markdown]
# # 03 Training
#
# **Reading:** 50 minutes. **You need:** lessons 01 and 02, running averages.
# **Exercises:** cross_entropy, adam_update, clip_norm, cosine_schedule (an hour and
# a half).
#
# Lesson 01 computes the gradient of a loss. Lesson 02 builds the model. What remains
# is the step: how do we change the parameters, now that we know the gradient?
#
# The plain answer is to go a little way against the gradient. It hardly trains a
# transformer. In this lesson we find out why, build a better step piece by piece, and
# train a small GPT with it.

# %%
import numpy as np

import tinyft as ft
from tinyft.learn.draw import bars, contours, curves, diagram, heat_map
from tinyft.learn.lessons import quote
from tinyft.optim.optimizers import adam_update, clip_norm
from tinyft.train.batch import compute_loss, read_batch

# %% [markdown]
# ## One parameter and one learning rate
# We begin with one parameter $w$ and the loss $\frac12 w^2$. Its gradient is $w$. In
# **gradient descent** we subtract a multiple of the gradient. The multiple $\eta$ is
# the **learning rate**:
#
# $$w \leftarrow w - \eta\, g$$

# %%
def descend(learning_rate, steps=10):
    w = 1.0
    path = [w]
    for _ in range(steps):
        gradient = w
        w = w - learning_rate * gradient
        path.append(w)
    return path


rates = [0.1, 1.0, 1.9, 2.1]
curves({f"learning rate {rate}": descend(rate) for rate in rates}, ylabel="w",
       caption="One parameter, four learning rates. The minimum is at w = 0.")

# %% [markdown]
# Each step multiplies $w$ by $1 - \eta$.
#
# - At 0.1 the factor is 0.9. The parameter creeps towards zero.
# - At 1 the factor is 0. One step is enough.
# - At 1.9 the factor is -0.9. Each jump crosses the minimum, but ends nearer to it.
# - At 2.1 the factor is -1.1. Each jump is longer: training **diverges**.
#
# The number 1 is not special. It is the **curvature** of this loss: how fast the
# gradient grows with $w$. With a curvature $c$ the factor is $1 - \eta c$. So the
# best rate is $1/c$, and above $2/c$ training diverges.
#
# ## Two parameters: a narrow valley
# A model has many parameters, and the loss is steep in some and flat in others. The
# smallest such loss has two parameters with the curvatures 1 and 100:
#
# $$\ell = \frac12 \left(w_1^2 + 100\, w_2^2\right)$$

# %%
curvature = np.array([1.0, 100.0])


def valley(w):
    return 0.5 * (curvature * w**2).sum(axis=-1)


def valley_gradient(w):
    return curvature * w


def gradient_descent(learning_rate, steps=80):
    w = np.array([-2.0, 1.0])
    path = [w]
    for _ in range(steps):
        w = w - learning_rate * valley_gradient(w)
        path.append(w)
    return np.array(path)

# %% [markdown]
# The steep parameter $w_2$ has the curvature 100. Its learning rate must be below
# $2/100$. We take 0.019, so its factor is $1 - 1.9 = -0.9$.
#
# **Predict first.** Both parameters share this learning rate. The factor of the flat
# parameter $w_1$ is $1 - 0.019$. After how many steps is $w_1$ half of what it was:
# about 4, about 40 or about 400?

# %%
sgd_path = gradient_descent(0.019)
halved = int(np.argmax(abs(sgd_path[:, 0]) <= 1))
print("steps until w1 is halved:", halved)
print("loss after 80 steps:", valley(sgd_path[-1]).round(3))

too_fast = gradient_descent(0.021)
print("with the rate 0.021, w2 after 80 steps:", too_fast[-1, 1].round())

# %% [check]
assert halved == 37
assert 2000 < too_fast[-1, 1] < 2100
assert abs(descend(1.0)[-1]) == 0 and abs(descend(2.1)[-1]) > 2.5

# %% [markdown]
# It takes 37 steps. The flat parameter would like a learning rate of 1. It gets
# 0.019, since one rate serves both. The steep parameter allows no more: with the rate
# 0.021 it grows to 2,000. Here is the path of both, from the ring towards the cross.

# %%
contours({"learning rate 0.019": (valley, sgd_path)}, levels=[1, 5, 20, 60, 120],
         caption="Steps are long across the valley and short along it.")

# %% [markdown]
# The lines join points of equal loss. The gradient is perpendicular to them, so it
# points across the valley, not along it. Most of each step is wasted on jumping from
# one wall to the other.
#
# ## Momentum: add up the gradients
# Look at the gradients along this path. Those of $w_2$ change their sign in each
# step. Those of $w_1$ always have the same sign. If we **add up** gradients, the
# first cancel and the second accumulate.
#
# **Momentum** does this. It keeps a sum $u$ of all gradients, the **velocity**. In
# each step it first multiplies the old sum by a factor $\mu$ below 1, so that old
# gradients fade. The parameter moves by the velocity. Here is the library's own code.
# Its arguments are arrays: `w` the parameters, `g` the gradient, `u` the velocity. The
# function writes into `w` and `u`. Its docstring writes $\theta$ for $w$, as papers
# do. `decay`, its $\lambda$, is a later subject of this lesson; until then it is 0.

# %%
quote(ft.optim.optimizers.sgd_update)

# %% [markdown]
# With $\mu = 0$ this is gradient descent. An optimiser of the library, such as
# `ft.SGD`, calls such a function for all tensors of a model. We give it a "model" of
# one tensor and tell it the gradients ourselves:
#
# - `optimizer.start({name: tensor})` says which tensors it updates,
# - `optimizer.step()` reads their `.grad` and updates them.
#
# The function `drive` does so for any optimiser and any gradients, and returns the
# path of $w$. Its $w$ is a matrix of one row, because the library treats vectors
# differently (see weight decay). `clip` is a later subject too.

# %%
def drive(optimizer, gradient, start, steps, clip=None):
    "The path of w. gradient(w, t) is its gradient in step t = 0, 1, ..."
    w = ft.Parameter(np.array([start]))                  # (1, n)
    optimizer.start({"w": w})
    path = [w.numpy()[0].copy()]
    for t in range(steps):
        w.grad = np.array([gradient(path[-1], t)])
        optimizer.step(clip=clip)
        path.append(w.numpy()[0].copy())
    return np.array(path)


def in_valley(w, t):
    return valley_gradient(w)


start = [-2.0, 1.0]
momentum_path = drive(ft.SGD(0.019, momentum=0.8), in_valley, start, 80)
curves({"gradient descent": valley(sgd_path), "momentum 0.8": valley(momentum_path)},
       log="y", caption="Both with the learning rate 0.019.")

# %% [check]
assert np.allclose(drive(ft.SGD(0.019), in_valley, start, 80), sgd_path, atol=1e-4)
assert valley(sgd_path[-1]) > 0.05 and valley(momentum_path[-1]) < 1e-5

# %% [markdown]
# Along the flat direction the gradient hardly changes from step to step. There the
# velocity grows to $g + 0.8 g + 0.64 g + \dots = g / (1 - 0.8)$, which is $5g$. So
# the flat parameter moves five times as fast, at the same learning rate. (The curve
# goes up and down because the steep parameter still jumps across the valley.)
#
# Momentum helps, but two faults remain. All parameters still share one learning rate.
# And the step still has the units of the gradient. Suppose that we measure the loss
# in other units, so that all gradients are 1000 times as large:

# %%
def in_other_units(w, t):
    return 1000 * valley_gradient(w)


lost = drive(ft.SGD(0.019), in_other_units, start, 3)
print("w2 after each of three steps:", lost[1:, 1])

# %% [markdown]
# The problem is the same, and the learning rate is now far too large. We want a step
# that does not depend on the size of the gradient.
#
# ## Adam: divide the gradient by its size
# The first idea is to divide each entry of the gradient by its own absolute value.
# Only its sign is left, and every parameter moves by $\eta$ in every step. That is
# too crude. A gradient comes from a small batch of data, so it is noisy. A parameter
# whose gradients change their sign all the time should not move as far as one whose
# gradients agree.
#
# **Adam** (Kingma and Ba 2015) therefore uses averages over the last steps:
#
# - $m$, the average of $g$: which way do the gradients point?
# - $v$, the average of $g^2$: how large are they, whatever their sign?
#
# The step is $\eta\, m / \sqrt{v}$. If all gradients are the same, $m$ is $g$ and
# $\sqrt v$ is $|g|$, so the length of the step is $\eta$. If they cancel, $m$ is near
# 0, and so is the step.
#
# An average over the last steps is easy to keep up to date. Keep 90 % of the old
# average, and add 10 % of the new value. Let us watch it when every value is 1.

# %%
average = 0.0
for t in range(1, 6):
    average = 0.9 * average + 0.1 * 1.0
    corrected = average / (1 - 0.9**t)
    print(f"step {t}: average {average:.3f}   divided by 1 - 0.9^{t}: {corrected:.3f}")

# %% [check]
assert np.isclose(average, 1 - 0.9**5) and np.isclose(corrected, 1)

# %% [markdown]
# The average of ones should be 1. It starts at 0, so at first it is too small: after
# $t$ steps it is $1 - 0.9^t$. We know this number, so we divide by it. This is the
# **bias correction**. A corrected average gets a hat:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g$$
#
# $$v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2$$
#
# $$\hat m = \frac{m}{1 - \beta_1^t}$$
#
# $$\hat v = \frac{v}{1 - \beta_2^t}$$
#
# $$w \leftarrow w - \eta\, \frac{\hat m}{\sqrt{\hat v} + \varepsilon}$$
#
# The usual values are $\beta_1 = 0.9$ and $\beta_2 = 0.999$. An average with the
# factor $\beta$ looks back over about $1 / (1 - \beta)$ steps: $m$ over 10 steps, $v$
# over 1000. The small $\varepsilon = 10^{-8}$ prevents a division by zero.
#
# ## Adam, watched
# Two parameters start at 0. The gradient of the first is small and steady: 0.01 in
# every step. The gradient of the second is large and undecided: 10, -10, 10, -10, ...
# The learning rate is 0.1. We compute four steps by hand.

# %%
def gradients_at(t):
    return np.array([0.01, 10.0 if t % 2 == 0 else -10.0])


w, m, v = np.zeros((3, 2))
print("step   gradients       m hat           root of v hat   step taken")
for t in range(1, 5):
    g = gradients_at(t - 1)
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    m_hat = m / (1 - 0.9**t)
    root = np.sqrt(v / (1 - 0.999**t))
    taken = -0.1 * m_hat / (root + 1e-8)
    w = w + taken
    row = "".join(f"{a:8.2f}{b:7.2f}" for a, b in [g, m_hat, root])
    print(f"{t:3}{row}{taken[0]:9.3f}{taken[1]:7.3f}")

# %% [markdown]
# Each pair of columns shows the two parameters. In the first step both move by the
# learning rate, 0.1, although one gradient is a thousand times the other. Then they
# part. The first parameter keeps its pace. The second sees opposite gradients; its
# $\hat m$ falls below $\sqrt{\hat v}$, and its steps become short.
#
# The library does the same to many parameters at once. We let it run for 40 steps.

# %%
def steady_and_undecided(w, t):
    return gradients_at(t)


watched = drive(ft.Adam(0.1), steady_and_undecided, [0.0, 0.0], 40)
curves({"gradients 0.01, 0.01, 0.01, ...": watched[:, 0],
        "gradients 10, -10, 10, -10, ...": watched[:, 1]},
       ylabel="value of the parameter",
       caption="Adam moves a parameter by how well its gradients agree, not by how "
               "large they are.")

# %% [check]
assert np.allclose(watched[4], w, atol=1e-5)
assert np.allclose(watched[1], [-0.1, -0.1], atol=1e-5)
assert np.isclose(watched[-1, 0], -4, atol=0.01) and abs(watched[-1, 1]) < 0.3

# %% [markdown]
# ## Adam in the valley
# Now each parameter has its own scale. We run Adam in the valley with the learning
# rate 0.05, then in the valley whose loss is measured in other units. Last we turn
# the valley by 45 degrees: the same valley, but it no longer lies along one
# parameter. `turn` is the rotation: `w @ turn` are the coordinates of $w$ along the
# valley and across it. The gradient there is turned back with `turn @`.

# %%
turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5


def turned_valley(w):
    return valley(w @ turn)


def in_turned_valley(w, t):
    return turn @ valley_gradient(w @ turn)


adam_path = drive(ft.Adam(0.05), in_valley, start, 80)
units_path = drive(ft.Adam(0.05), in_other_units, start, 80)
turned_path = drive(ft.Adam(0.05), in_turned_valley, list(turn @ start), 80)
print("loss after 80 steps of gradient descent:", valley(sgd_path[-1]).round(4))
print("Adam:                ", valley(adam_path[-1]).round(4))
print("Adam, other units:   ", valley(units_path[-1]).round(4))
print("Adam, turned valley: ", turned_valley(turned_path[-1]).round(4))

# %% [check]
assert np.allclose(units_path, adam_path, atol=1e-3)
assert valley(adam_path[-1]) < valley(sgd_path[-1]) < turned_valley(turned_path[-1])
turned_sgd = drive(ft.SGD(0.019), in_turned_valley, list(turn @ start), 80)
assert np.allclose(turned_sgd, sgd_path @ turn.T, atol=1e-4)

# %% [markdown]
# Adam ends far below gradient descent, in both units. In the turned valley it does
# not. The three paths show why.

# %%
contours({"gradient descent": (valley, sgd_path), "Adam": (valley, adam_path),
          "Adam, turned valley": (turned_valley, turned_path)},
         levels=[1, 5, 20, 60, 120], caption="80 steps each.")

# %% [markdown]
# Adam moves both parameters at the same pace. But Adam has one scale for each
# *parameter*, not for each direction. In the turned valley both parameters share the
# steep direction, so their gradients have about the same size. Adam divides both by
# the same number, which does not help. Gradient descent does not notice the turn: its
# path turns with the valley, and its loss is again 0.0929. So here Adam is the worse.
#
# Why does Adam help so much in transformers? Because there the tensors differ in
# scale. We will measure it below.
#
# ## What the bias correction is for
# Suppose that we leave it out and use $m / \sqrt v$. What happens?
#
# To try it, we write a variant of the library's optimiser `ft.AdamW`. With a decay of
# 0 it is Adam; decay is the subject of the next section. An optimiser of the library
# keeps the parameters of many tensors one after another in a long array. Its method
# `update` gets a `piece` of such an array: `piece.w` are the parameters, `piece.g`
# their gradients, `piece.moments` the two arrays $m$ and $v$. `adam_update` is the
# function with the equations above. We tell it a huge $t$: then $\beta^t$ is 0, and
# its corrections divide by 1.
#
# **Predict first.** Both averages start at zero, so both are too small: after one
# step $m$ is $0.1\, g$, and $v$ is $0.001\, g^2$. Is the first step without
# correction shorter or longer than $\eta$? By what factor?

# %%
class Uncorrected(ft.AdamW):
    "AdamW without bias correction."

    def update(self, piece, lr):
        adam_update(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps,
                    piece.decay, t=10**9)


def always_one(w, t):
    return [1.0]


raw_path = drive(Uncorrected(1.0, weight_decay=0), always_one, [0.0], 60)
lengths = -np.diff(raw_path[:, 0])
print("first step:", lengths[0].round(1), "times the learning rate")
print("longest:", lengths.max().round(1), "times, in step", lengths.argmax() + 1)
curves({"without correction": lengths}, x=range(1, 61),
       levels={"with correction": 1.0}, ylabel="length of the step",
       caption="Every gradient is 1, and the learning rate is 1.")

# %% [check]
assert 3.1 < lengths[0] < 3.2 and 6.5 < lengths.max() < 6.6 and lengths.argmax() == 11

# %% [markdown]
# The steps are *longer*. In the first, the numerator is a tenth of what it should be.
# But the divisor is the root of a thousandth, and that is smaller still:
# $0.1 / \sqrt{0.001} = 3.2$. In the next steps $m$ comes near its full size, but $v$
# needs about a thousand steps for that. So the steps grow to 6.6 times the learning
# rate, and then shrink slowly.
#
# This is what the bias correction is for: from the first step on, $\hat m$ and
# $\hat v$ have the size of $g$ and $g^2$. A parameter whose gradients agree moves by
# the learning rate in the first step as in the thousandth. Kingma and Ba (section 3)
# give the same reason.
#
# ## Weight decay, inside and outside
# **Weight decay** pulls every weight a little towards zero in every step, so that a
# weight that the data do not need disappears. There are two ways to write it, with a
# small number $\lambda$:
#
# - *inside*: add $\lambda w$ to the gradient. This is often called L2.
# - *outside*: subtract $\eta \lambda w$ from the weight, beside the step.
#
# For plain gradient descent the two are the same, because
# $\eta\,(g + \lambda w) = \eta g + \eta \lambda w$. For Adam they are not: what goes
# into the gradient is divided by $\sqrt{\hat v}$ like all the rest. `ft.Adam` decays
# inside, `ft.AdamW` outside (Loshchilov and Hutter 2019). Their whole difference:

# %%
quote(ft.Adam.update)
quote(ft.AdamW.update)

# %% [markdown]
# The method `run_update` calls the equations of Adam for the piece, with the gradient
# and the decay that it is given. In `Adam` the decay is added to the gradient, so it
# enters $m$ and $v$. In `AdamW` it does not.
#
# Two weights start at 1. Their gradients are pure noise: the data need neither. The
# noise of the first has the size 0.01, that of the second the size 10. We take 500
# steps with the learning rate 0.001 and $\lambda = 1$.
#
# **Predict first.** With the decay *inside*, $\lambda w$ is about 1 at the start.
# Which of the two weights does it shrink: the one with small noise, the one with
# large noise, or both?

# %%
noise = np.random.default_rng(0).standard_normal((500, 2)) * [0.01, 10.0]


def pure_noise(w, t):
    return noise[t]


inside = drive(ft.Adam(1e-3, weight_decay=1.0), pure_noise, [1.0, 1.0], 500)
outside = drive(ft.AdamW(1e-3, weight_decay=1.0), pure_noise, [1.0, 1.0], 500)
print("inside: ", inside[-1].round(2))
print("outside:", outside[-1].round(2))
curves({"inside, small noise": inside[:, 0], "inside, large noise": inside[:, 1],
        "outside, small noise": outside[:, 0], "outside, large noise": outside[:, 1]},
       ylabel="weight", caption="500 steps with a weight decay of 1.")

# %% [check]
assert inside[-1, 0] < 0.7 and inside[-1, 1] > 0.85
assert np.allclose(outside[-1], 0.999**500, atol=0.1)
sgd_inside = drive(ft.SGD(0.01, weight_decay=1.0), always_one, [1.0], 5)[-1]
sgd_outside = 1.0
for _ in range(5):
    sgd_outside = sgd_outside - 0.01 * 1.0 * sgd_outside - 0.01 * 1.0
assert np.allclose(sgd_inside, sgd_outside, atol=1e-6)

# %% [markdown]
# Inside, only the weight with small noise shrinks. There $\lambda w = 1$ is far
# larger than the noise of 0.01, so all gradients agree, and each step is the whole
# learning rate, 0.001. For the other weight $\sqrt{\hat v}$ is 10, and the decay
# moves it by a tenth of that. So the decay depends on the size of the gradient.
# Outside, both weights lose one part in a thousand in each
# step, and end near $0.999^{500} = 0.61$, up to the noise.
#
# The library decays matrices only. It leaves out vectors, which are the biases and
# the scales of the norms.
#
# ## Warm-up and schedules
# In Adam's first step $\hat m / \sqrt{\hat v}$ is $g / |g|$: every parameter moves by
# the whole learning rate, even if its gradient is pure noise. Later the noise
# averages out. Let us measure this with 1000 parameters whose gradients are nothing
# but noise. The typical step is the root of the mean square over all parameters.

# %%
generator = np.random.default_rng(1)


def fresh_noise(w, t):
    return generator.standard_normal(1000)


walk = drive(ft.Adam(1.0), fresh_noise, [0.0] * 1000, 60)
sizes = np.sqrt((np.diff(walk, axis=0)**2).mean(axis=1))
curves({"pure noise": sizes}, levels={"the learning rate": 1.0},
       ylabel="typical step", caption="Adam's first steps follow the noise.")
print("typical step: first", sizes[0].round(2), "  later", sizes[-20:].mean().round(2))

# %% [check]
assert np.isclose(sizes[0], 1, atol=1e-3) and 0.18 < sizes[-20:].mean() < 0.28

# %% [markdown]
# The first step is four times as long as later ones, and it knows nothing but one
# batch. This is one reason for **warm-up**: the learning rate rises from near zero
# during the first steps. Afterwards it often falls again, in a straight line or as
# half a cosine, so that the last steps are small and the noise of the batches
# averages out.
#
# A schedule of the library is a function of the step $t$ and the number of steps $T$.
# It returns the factor on the learning rate.

# %%
schedules = {"constant": ft.constant_schedule(warmup=10),
             "linear": ft.linear_schedule(warmup=10),
             "cosine, floor 0.1": ft.cosine_schedule(warmup=10, floor=0.1)}
factors = {}
for name, schedule in schedules.items():
    factors[name] = [schedule(t, 100) for t in range(100)]
curves(factors, ylabel="factor on the learning rate",
       caption="Three schedules of 100 steps, 10 of them warm-up.")

# %% [check]
assert factors["cosine, floor 0.1"][0] == 0.1 and factors["linear"][9] == 1
assert factors["linear"][-1] > 0

# %% [markdown]
# The first step, $t = 0$, has the factor $1/10$ and not 0: a step of length zero
# would be wasted.
#
# ## Clipping: one bad batch
# Adam does not care if all gradients are large: $v$ grows with them. *One* batch with
# huge gradients among many others is another matter: the average $v$ remembers it.
#
# Against this there is **clipping**. It computes the norm of *all* gradients
# together. If it is above a limit, all gradients are multiplied by one factor, so
# that their norm becomes the limit. One factor for all keeps the direction.
# `clip_norm` writes into the gradients and returns the norm from before.

# %%
gradients = [np.array([30.0]), np.array([40.0])]
norm = clip_norm(gradients, 1.0)
after = np.concatenate(gradients).round(3)
print("norm before:", norm, "  gradients after:", after)

# %% [markdown]
# Now Adam, with gradients of 1 in every step, except step 50. There it is 1000
# instead of 1.

# %%
def one_outlier(w, t):
    return [1000.0 if t == 50 else 1.0]


free = -np.diff(drive(ft.Adam(1.0), one_outlier, [0.0], 300)[:, 0])
clipped = -np.diff(drive(ft.Adam(1.0), one_outlier, [0.0], 300, clip=1.0)[:, 0])
print(f"step 150, in learning rates: {free[150]:.3f}, with clipping {clipped[150]:.3f}")
curves({"no clipping": free, "clipped to the norm 1": clipped}, log="y",
       ylabel="length of the step", caption="One gradient of 1000, in step 50.")

# %% [check]
assert norm == 50 and np.allclose(gradients, [[0.6], [0.8]])
assert free[150] < 0.05 and np.allclose(clipped, 1, atol=1e-3)

# %% [markdown]
# Without clipping the parameter stands nearly still: a hundred steps later its steps
# are a hundredth of what they were. The average $m$ forgets the outlier in a few
# dozen steps; $v$ keeps it for a thousand. With clipping nothing happens at all.
#
# ## The loss: cross-entropy
# A language model reads a text and gives a score to every token that could come next.
# The softmax turns the scores $z$ into probabilities $p$. The loss of one position is
# $-\ln p$ of the token that really came next: 0 if the model was sure of it, and
# large if the model thought it impossible. **Cross-entropy** is the mean of this over
# all $N$ positions:
#
# $$\ell = -\frac1N \sum_n \ln p_n[y_n]$$
#
# We take three positions and a vocabulary of four words.

# %%
words = ["the", "cat", "sat", "down"]
scores = ft.Parameter(np.array([[2.0, 1.0, 0.0, 0.0],
                                [0.0, 3.0, 0.0, 0.0],
                                [0.0, 0.0, 0.0, 0.0]]))
labels = np.array([1, 1, 3])                             # the words that came next
p = ft.ops.softmax(scores).numpy()
by_hand = -np.log(p[[0, 1, 2], labels]).mean()           # p[n, labels[n]] of each row
loss = ft.ops.cross_entropy(scores, labels)
print("by hand:", by_hand.round(4), "  library:", round(loss.item(), 4))

# %% [markdown]
# What is the gradient with respect to the scores? For one position
# $-\ln p_y = \ln \sum_j e^{z_j} - z_y$. The derivative of the first term with respect
# to $z_j$ is $e^{z_j} / \sum e^z$, which is $p_j$. The second term gives $-1$ at the
# label. So the gradient is $(p - q) / N$, where $q$ is 1 at the label and 0 elsewhere.

# %%
loss.backward()
heat_map(scores.grad, rows=["label cat", "label cat", "label down"], columns=words,
         values=".2f", caption="The gradient of the loss with respect to the scores.")

# %% [check]
one_hot = np.eye(4)[labels]
assert np.allclose(scores.grad, (p - one_hot) / 3, atol=1e-6)
assert np.isclose(by_hand, loss.item(), atol=1e-6)
assert np.allclose(scores.grad.sum(axis=1), 0, atol=1e-6)

# %% [markdown]
# Red entries are negative. A step goes *against* the gradient, so red means "raise this
# score", and blue means "lower it". In the first row the model preferred "the", and the
# label is "cat": a large correction. In the second row the model was nearly right, and
# the correction is small. In the third it knew nothing, and the correction is spread
# over all other words. Every row adds up to zero.
#
# A model that knows nothing gives each of $V$ tokens the probability $1/V$. Its loss
# is $\ln V$. The vocabulary of our model has 2048 tokens, so its loss starts near
# $\ln 2048 = 7.6$. This is the first thing to look at when a training run begins.
#
# ### Two mistakes with the mean
# Texts have different lengths. They are padded to one length, and padding has no
# label. The first mistake is to count the padding in $N$: the loss is then too small.
# In the library such positions have the label -100, and they count nowhere.
#
# The second mistake hides in **accumulation**. If a batch is too large for the
# memory, we send it through the model in parts and add up the gradients. Each part
# has its own mean. A part with few labels must not count as much as a part with many.
# We measure it with eight sentences from the documentation of Python, which comes with
# the library. `pad` makes one array `ids` of them, here sorted by length. `mask` is
# True where a token is real, and False at the padding.

# %%
tokenizer = ft.data.shipped_tokenizer()
sentences = []
for record in ft.data.snapshot()[:5]:
    sentences.extend(ft.data.sentences(record.text))
encoded = [tokenizer.encode(sentence).ids for sentence in sentences[:8]]
ids, mask = ft.data.pad(sorted(encoded, key=len))
print("lengths:", mask.sum(axis=1))

# %% [markdown]
# We need the gradient of a small GPT for some rows of this batch. `read_batch` turns
# a batch into targets: the labels are the next tokens, and `targets.weight` is their
# number. (A sentence of $n$ tokens has $n - 1$ next tokens.) `compute_loss` runs the
# model and returns its output and the cross-entropy.

# %%
shape = ft.GPTConfig(vocab=2048, positions=64, width=32, layers=2, heads=2)
model = ft.GPT(shape, seed=0)


def gradient_of(rows):
    "(the gradient as one vector, the number of labels) for these rows of the batch."
    targets = read_batch({"ids": ids[rows], "mask": mask[rows]})
    model.zero_grad()
    _, loss = compute_loss(model, targets)
    loss.backward()
    gradient = np.concatenate([p.grad.ravel() for p in model.parameters()])
    return gradient, targets.weight

# %% [markdown]
# Now the whole batch, its four short rows and its four long rows.

# %%
whole, count = gradient_of(slice(0, 8))
short, short_count = gradient_of(slice(0, 4))
long, long_count = gradient_of(slice(4, 8))


def error(gradient):
    return np.linalg.norm(gradient - whole) / np.linalg.norm(whole)


weighted = (short_count * short + long_count * long) / count
print("labels in the halves:", short_count, long_count)
print(f"weighted by labels: error {error(weighted):.0e}")
print(f"mean of the means:  error {error((short + long) / 2):.2f}")

# %% [check]
assert error(weighted) < 1e-4 and error((short + long) / 2) > 0.02
assert short_count + long_count == count

# %% [markdown]
# The mean of the means is wrong by about a fifth, and no error message tells you.
# The argument `accumulate` of `ft.fit` weighs by labels.
#
# ## A real model
# Now everything together. A GPT of two layers learns 1024 tokens of real text by heart,
# cut into 32 pieces of 32. `ft.fit` is the training loop, here of 48 steps. In each
# step it takes a batch of 16 pieces, runs the model, computes the loss and its
# gradient, clips, and calls the optimiser. It returns a history with the loss of every
# step. The learning rates of SGD are the best of several that we tried.

# %%
text = ft.data.pretraining("prose", "valid")[:1024]


def train(optimizer, schedule=None, clip=None, seed=0):
    "(the trained model, the loss of each step)"
    model = ft.GPT(shape, seed=seed)
    batches = ft.data.lm_batches(text, 32, 16)           # of 16 pieces of 32 tokens
    history = ft.fit(model, batches, 48, optimizer, schedule, clip=clip, progress=False)
    return model, history.losses


optimizers = {"SGD": ft.SGD(1.0), "SGD, momentum": ft.SGD(0.3, momentum=0.9),
              "AdamW, uncorrected": Uncorrected(0.005), "AdamW": ft.AdamW(0.005)}
losses = {}
for name, optimizer in optimizers.items():
    model, losses[name] = train(optimizer)
curves(losses, ylabel="loss per token",
       caption="The same model, data and number of steps.")

# %% [markdown]
# All start at 7.6, as they should. SGD stops at a loss of about 5.5. A model that
# knows only how often each token occurs in this text would have a loss of 5.3, so SGD
# has learned little more than that. AdamW goes on to about 3. Without bias correction
# it is fast at first, because its steps are too long. After about 20 steps it falls
# behind.
#
# Why does SGD fail? The valley gave the reason: directions of different scale. Let us
# see if the tensors of this GPT differ in scale. The variables `model` and `optimizer`
# still hold the last run, AdamW. We take one more step with them, and keep the values
# from before. (We leave out the biases of the keys. The softmax does not see them, so
# their gradient is zero.)

# %%
batch = read_batch(text.reshape(32, 32))                 # all 32 pieces of 32 tokens
compute_loss(model, batch)[1].backward()
tensors = {n: p for n, p in model.named_parameters().items() if "k.bias" not in n}
before = {n: p.numpy().copy() for n, p in tensors.items()}
optimizer.step()

# %% [markdown]
# For each tensor we compare the size of its gradient with the size of its step.

# %%
def typical(array):
    return float(np.sqrt((array**2).mean()))


by_size = sorted(tensors, key=lambda name: typical(tensors[name].grad))
sizes_of_gradients = [typical(tensors[n].grad) for n in by_size]
moves = [typical(tensors[n].numpy() - before[n]) / optimizer.lr for n in by_size]
curves({"gradient": sizes_of_gradients, "Adam's step, in learning rates": moves},
       log="y", xlabel="tensors of the GPT, sorted by gradient", ylabel="typical entry",
       caption="What Adam evens out.")

spread = sizes_of_gradients[-1] / sizes_of_gradients[0]
print(f"gradients: the largest is {spread:.0f} times the smallest")
print(f"steps:     the largest is {max(moves) / min(moves):.0f} times the smallest")

# %% [check]
assert spread > 50 and max(moves) / min(moves) < 30
share = np.unique(text, return_counts=True)[1] / len(text)
assert np.isclose(-(share * np.log(share)).sum(), 5.3, atol=0.05)

# %% [markdown]
# From tensor to tensor the gradients differ by a factor of some hundred. One learning
# rate cannot serve them all. Adam's steps differ far less.
#
# ## One run says little
# Next we double the learning rate of AdamW, and try it with clipping and with
# warm-up. At such a rate luck plays a part. So we train three models for each
# setting, with different initial values.

# %%
warmup = ft.constant_schedule(warmup=5)
settings = {"AdamW 0.01": (None, None),                  # (schedule, clip)
            "clipping": (None, 1.0),
            "clipping, warm-up": (warmup, 1.0)}


def end(history):
    return float(np.mean(history[-4:]))


at_double = {}
for name, (schedule, clip) in settings.items():
    at_double[name] = {}
    for seed in (0, 1, 2):
        _, history = train(ft.AdamW(0.01), schedule, clip, seed)
        at_double[name][f"seed {seed}"] = end(history)
bars(at_double, ylabel="loss at the end",
     caption="The learning rate 0.01, three seeds.")

# %% [check]
averages = {name: np.mean(list(ends.values())) for name, ends in at_double.items()}
plain, with_clip, with_both = averages.values()
assert with_both + 0.2 < with_clip < plain - 0.5
assert with_both + 0.5 < end(losses["AdamW"])
assert end(losses["AdamW"]) + 0.1 < min(end(losses[n]) for n in list(losses)[:3])
assert max(at_double["AdamW 0.01"].values()) > min(at_double["AdamW 0.01"].values()) + 1

# %% [markdown]
# Alone, the larger learning rate is a lottery: one seed ends near 5, another near 2.
# With clipping all three do well. With warm-up too, they do best. Neither makes a
# step better in itself. They make a larger learning rate safe.
#
# With one seed only, we might have concluded that the larger rate is useless (seed 0)
# or excellent (seed 2).
#
# ## Where the memory goes
# Adam keeps two moments for each trainable parameter, $m$ and $v$. Together with the
# parameter and its gradient these are four numbers, or 16 bytes in float32.
#
# The forward pass also keeps arrays: the **activations** that the pullbacks will need
# (lesson 01). Their number depends on the batch.
#
# The function `ft.peak_memory()` measures the largest rise of memory inside its
# block. We measure the smallest GPT that comes with the library.

# %%
shape = ft.GPTConfig(vocab=2048, positions=128, width=64, layers=2, heads=2)
model = ft.GPT(shape)
size = sum(p.size for p in model.parameters())
with ft.peak_memory() as state:
    ft.AdamW(1e-3).start(model.named_parameters())
print(f"{size:,} parameters of 4 bytes: {4 * size / 1e6:.1f} MB")
print(f"bytes a parameter, for parameters and moments: {state['bytes'] / size:.1f}")

# %% [markdown]
# 12 bytes: four for the parameter, which `start` moves into one long array, and four
# for each moment. The gradient adds four more.
#
# **Predict first.** The parameters take 1 MB. We send eight texts of 64 tokens
# through the model, forward and backward. Its last array has a score for each of 2048
# tokens at each of the 512 positions. How much more memory does this need: about 1,
# 4 or 15 MB?

# %%
pieces = ft.data.pretraining("prose", "valid")


def peak_of(texts):
    "The memory, in MB, of one forward and backward pass. Each text has 64 labels."
    batch = read_batch(pieces[:texts * 65].reshape(texts, 65))
    with ft.peak_memory() as peak:
        compute_loss(model, batch)[1].backward()
    return peak["bytes"] / 1e6


peak_of(1)                                               # the first call fills caches
counts = [1, 2, 4, 8]
peaks = [peak_of(texts) for texts in counts]
for texts, peak in zip(counts, peaks):
    print(f"{texts} texts: {peak:5.1f} MB")
curves({"one pass": peaks}, x=counts, xlabel="texts of 64 tokens in a batch",
       levels={"parameters, gradients, moments": 16 * size / 1e6}, ylabel="MB",
       caption="The memory of one pass grows with the batch.")

# %% [check]
assert abs(state["bytes"] / size - 12) < 0.5
assert np.allclose(np.array(peaks[1:]) / counts[1:], peaks[-1] / 8, rtol=0.15)
assert 12 < peaks[-1] < 20
half = ft.GPT(ft.GPTConfig(vocab=1024, positions=128, width=64, layers=2, heads=2))
batch = read_batch(pieces[:520].reshape(8, 65) % 1024)
compute_loss(half, batch)[1].backward()                  # now its gradients exist
with ft.peak_memory() as peak:
    compute_loss(half, batch)[1].backward()
assert 3.7 < peaks[-1] - peak["bytes"] / 1e6 < 4.7       # half of 2 · 4.2 MB

# %% [markdown]
# 13 to 15 MB (it depends on the kernels), some fourteen times the parameters, and it
# grows with the number of texts. The
# scores alone are $512 \cdot 2048 \cdot 4$ bytes, 4.2 MB. The backward pass needs their
# gradient at the same time, another 4.2 MB. So more than half of the memory belongs
# to the last array of the model. (With half the vocabulary we measure 4.2 MB less.) The
# rest are the activations inside the two layers.
#
# The picture shows a training step and what each part keeps.

# %%
one = f"{4 * size / 1e6:.1f} MB"
two = f"{8 * size / 1e6:.1f} MB"
boxes = {"parameters": (0, 0, f"parameters\n{one}", "trained"),
         "activations": (2, 0, f"activations\n{peaks[-1] / 8:.0f} MB a text", "data"),
         "gradients": (2, 1.3, f"gradients\n{one}"),
         "moments": (0, 1.3, f"moments m and v\n{two}")}
arrows = [("parameters", "activations", "forward"),
          ("activations", "gradients", "backward"),
          ("gradients", "moments", "running averages"),
          ("moments", "parameters", "Adam's step")]
diagram(boxes, arrows, height=2.4,
        caption="A training step. The orange and grey boxes together take 16 bytes a "
                "parameter. The blue box grows with the batch.")

# %% [markdown]
# Two remedies follow. *Accumulation* cuts the blue box: with parts of one text it
# pays for one text. *Training fewer parameters* cuts the grey boxes: a frozen
# parameter has no gradient and no moments. Most of this course is about the second.
# Lesson 08 measures what it does for the blue box.
#
# ## The table
# We end with the measured values of all runs.

# %%
print(f"{'':22}{'rate':>6}{'final loss':>12}{'bytes of moments':>18}")
for name, optimizer in optimizers.items():
    moments = len(optimizer.moment_names)
    print(f"{name:22}{optimizer.lr:6g}{end(losses[name]):12.2f}{4 * moments:18}")
for name, average in averages.items():
    print(f"{name:22}{0.01:6g}{average:12.2f}{8:18}")

# %% [markdown]
# "Bytes of moments" is for each trainable parameter. The last three rows are means of
# three seeds. The library's SGD keeps a velocity even if its momentum is 0.
#
# **Where this stops.** The model learns its text by heart. A loss of 1.5 says nothing
# about other texts, which lesson 04 is about. And a learning rate that is good here
# need not be good for another model: it is the first thing to tune.
#
# **Exercises:** `tinyft start training` writes four files for you. Begin with
# `clip_norm` and `cosine_schedule`, which are short. `adam_update` is Adam as in this
# lesson. In `cross_entropy` you meet the two mistakes with the mean again.
