"""minidiff: audio latent diffusion in one file that you can read, run, and take apart.

A codec turns a second of sound into 63 short vectors, its latents. A network learns to turn noise
into such latents: ask for a pitch, and noise becomes a note that nobody has played. Read from the
top: no definition uses a name that stands below it. To copy a piece, take the imports, and what its
docstring lists after "Lifts out with" (chapters 0 to 8).

    python minidiff.py toy                                     the whole idea, in ten seconds
    python minidiff.py train                                   an instrument, in minutes
    python minidiff.py sample --run runs/plucks --pitch 60     play a note of it

The alphabet
    B batch    T audio samples    C latent channels    L latent frames    D features    N how many
    Brackets hold axes. Audio is [B, T], mono, float32; latents are [B, C, L]; times are [B].
    x_0 is data, noise is N(0, 1), and x_t = alpha(t) x_0 + sigma(t) noise lies between them.
    N(m, s^2) is the normal distribution of mean m and deviation s.
    t = 0 is data and the largest t is noise. Samplers walk from there down to 0.
    velocity is dx/dt, away from the data; in rectified flow the network answers v = -velocity.
    w is the guidance scale: w = 1 is no guidance, w = 0 ignores the condition.
    A condition that is not given is -1 where it is an integer (a label), NaN where it is a curve.
    A pitch is a MIDI number: 60 is middle C, 69 is A at 440 Hz, 1 is a semitone, 0.01 is a cent.
    A MIDI velocity, 0 to 127, says how hard a note is struck. It has nothing to do with dx/dt.

The chapters
    0 The whole idea on one page          4 The U-Net         8 Data
    1 Noising and objectives              5 Sound             9 Training
    2 Guidance                            6 The Snake VAE    10 Listening and measuring
    3 Samplers                            7 Its losses       11 The command line

References, cited by number (arXiv)
     [1] Rectified flow 2209.03003   [2] Logit-normal t 2403.03206   [3] EDM              2206.00364
     [4] Guidance       2207.12598   [5] Rescaling      2305.08891   [6] DPM-Solver++     2211.01095
     [7] DITTO          2401.12179   [8] Diff-A-Riff    2406.08384   [9] Stable Audio     2407.14358
    [10] Snake          2006.08195  [11] EnCodec        2210.13438  [12] VAE              1312.6114
    [13] NSynth         1704.01279  [14] Music2Latent   2408.06500  [15] Frechet distance 1706.08500
    [16] v-prediction   2202.00512  [17] Score SDEs     2011.13456  [18] Attention        1706.03762
    [19] Parallel WaveGAN 1910.11480
"""
import argparse
import base64
import csv
import datetime
import hashlib
import html
import json
import math
import os
import pathlib
import re
import struct
import sys
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

# ----------------------------------------------------------------------
# 0. The whole idea on one page
# ----------------------------------------------------------------------
# We have examples x_0 and want more of the kind. Mix one with noise, x_t = (1 - t) x_0 + t noise,
# and let a network predict, from x_t and t alone, the direction from noise to example: x_0 - noise.
# Many such lines pass through one point; it learns their mean. For a new example, start at fresh
# noise and follow the network in small steps from t = 1 to t = 0. This is rectified flow [1],
# complete. Here an example is a point on one of two half moons. Later it is a note.
#
# Try: `python minidiff.py toy`. Then set steps = 200 and run it again: the moons blur.

def toy(steps=3000, seed=0):
    """Learn two moons, draw them; returns the shares of samples and data within 0.1 of a moon."""
    torch.manual_seed(seed)

    def moons(n, blur=0.05):
        angle = math.pi * torch.rand(n)
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)  # [n, 2]
        lower = torch.tensor([1.0, 0.5]) - upper
        return torch.where(torch.rand(n, 1) < 0.5, upper, lower) + blur * torch.randn(n, 2)

    net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                        nn.Linear(64, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        x_0 = 2 * moons(1024)                                   # 2: as large as the noise
        noise = torch.randn(1024, 2)
        t = torch.rand(1024, 1)
        x_t = (1 - t) * x_0 + t * noise
        loss = (net(torch.cat([x_t, t], dim=1)) - (x_0 - noise)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    x = torch.randn(2000, 2)
    with torch.no_grad():
        for i in range(100):                                    # Euler's rule: small straight steps
            t = torch.full((2000, 1), 1 - i / 100)
            x = x + net(torch.cat([x, t], dim=1)) / 100
    samples = x / 2
    data = moons(2000)
    curve = moons(2000, blur=0)
    shares = [(torch.cdist(points, curve).amin(1) < 0.1).float().mean().item()
              for points in (samples, data)]
    beside = torch.cat([samples[:600], data[:600] + torch.tensor([4.0, 0.0])])
    counts, _ = torch.histogramdd(beside, [76, 14], range=[-1.5, 6.5, -1.0, 1.5])
    for row in counts.clamp(max=4).int().T.flip(0):
        print("".join(" .:*#"[n] for n in row))
    print("within 0.1 of a moon: {:.3f} of the samples (left), {:.3f} of the data".format(*shares))
    return shares

# ----------------------------------------------------------------------
# 1. Noising and objectives: what does the network learn?
# ----------------------------------------------------------------------
# Mix a clean latent with noise, x_t = alpha(t) x_0 + sigma(t) noise. Show x_t and t to a network
# and ask for some y that is made of x_0 and noise. It cannot know y, because many pairs of x_0 and
# noise give the same x_t. On average over those pairs, the squared error of an answer a is
#
#     E[(a - y)^2 | x_t]  =  (a - E[y | x_t])^2  +  the variance of y given x_t,
#
# so the best answer is the mean E[y | x_t]. Write ^ for such a mean. x_t itself is known, so
# x_t = alpha x_0^ + sigma noise^: whether the network answers x_0^, noise^ or a mixture of them,
# x_t gives the others. With ' for d/dt:
#
#     noise^    =  (x_t - alpha x_0^) / sigma
#     velocity  =  alpha' x_0^ + sigma' noise^,      the mean of dx_t/dt at x_t
#     score     =  (alpha x_0^ - x_t) / sigma^2,     the gradient of ln p(x_t)
#
# (For one x_0, x_t is N(alpha x_0, sigma^2), whose ln has the gradient (alpha x_0 - x_t) / sigma^2;
# the score is the mean of that.) Each pair of x_0 and noise is a path. Where paths cross, the
# velocity is their mean direction. A density changes only by the net flow through each point, and
# the mean carries the same net flow. So points that follow it have, at every t, the density of x_t
# ([1] theorem 3.3): noise at the largest t arrives at t = 0 distributed as the data.
#
# Rectified flow [1] takes straight paths and asks for v = x_0 - noise = -dx_t/dt. So velocity = -v
# and x_0^ = x_t + t v^. The others differ in alpha, sigma and target. They are one method on
# several scales: x_t / alpha is EDM's x_t at the noise level sigma/alpha.
#
#                     alpha        sigma        target of the network         t goes from
#     RectifiedFlow   1 - t        t            x_0 - noise                   0 to 1
#     VPDiffusion     cos(angle)   sin(angle)   alpha noise - sigma x_0       0 to 1
#     EDM             1            t            (x_0 - c_skip x_t) / c_out    0.002 to 80
#
# Try: `python minidiff.py train --objective edm --run runs/edm`. It plays in tune as well.

def expand(t, x):
    """t, a float or [B], as [B, 1, ...] to go with x [B, ...]."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
    return t.reshape(-1, *[1] * (x.ndim - 1))

def standard_normal(shape, generator=None, device="cpu"):
    """N(0, 1) numbers [B, ...], drawn on the CPU, so that they are the same on any device. With a
    list of generators, one per item, item i is also the same in any batch."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator).to(device)

def linear_times(steps, start=1.0):
    """Even times from `start` to 0: [steps + 1], float64."""
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)

def karras_times(steps, sigma_min, sigma_max, rho=7.0):
    """Noise levels even in sigma^(1/rho), then 0: [steps + 1], float64 ([3] eq. 5)."""
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return F.pad(torch.linspace(*ends, steps, dtype=torch.float64) ** rho, (0, 1))

def polyexponential_times(steps, sigma_min, sigma_max, rho=1.0):
    """Noise levels, even in ln sigma if rho = 1, then 0: [steps + 1], float64 ([9])."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    return F.pad(sigma_min * (sigma_max / sigma_min) ** ramp, (0, 1))

class Objective:
    """What objectives share. Each adds alpha, sigma, target, denoise, velocity, sample_times, and
    time_at(ratio), the t where sigma / alpha = ratio. x, noise, x_t: [B, ...].  t: a float or [B].
    net: (x [B, ...], t [B], **cond) -> [B, ...].
    Lifts out with: expand, linear_times, standard_normal."""
    t_max = 1.0

    def add_noise(self, x, noise, t):
        t = expand(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def answer(self, net, x_t, t, **cond):
        return net(x_t, expand(t, x_t).flatten(), **cond)

    def loss_at(self, net, x, noise, t, reduce=True, **cond):
        """Mean squared error at given noise and times: a scalar, or [B] if not `reduce`."""
        answer = self.answer(net, self.add_noise(x, noise, t), t, **cond)
        error = (answer - self.target(x, noise, t)).square().flatten(1).mean(1)  # [B]
        return error.mean() if reduce else error

    def loss(self, net, x, generator=None, reduce=True, **cond):
        """The same at fresh noise and a fresh time for each item: this is training."""
        t = self.sample_times(len(x), generator).to(x)
        noise = standard_normal(x.shape, generator, x.device).to(x)
        return self.loss_at(net, x, noise, t, reduce, **cond)

    def times(self, steps, start=None):
        return linear_times(steps, start or self.t_max)

@dataclass
class RectifiedFlow(Objective):
    """Straight paths, x_t = (1 - t) x_0 + t noise; the network answers v = x_0 - noise ([1]).

    Training times are sigmoid(N(p_mean, p_std^2)): mostly the middle, where x_0 is neither lost nor
    plain to see ([2] section 3.1). An answer of 0 has loss 2 on data of variance 1.
    Lifts out with: Objective, expand, linear_times, standard_normal."""
    p_mean: float = 0.0
    p_std: float = 1.0

    def alpha(self, t):
        return 1 - t
    def sigma(self, t):
        return t
    def target(self, x, noise, t):
        return x - noise
    def denoise(self, net, x_t, t, **cond):
        return x_t + expand(t, x_t) * self.answer(net, x_t, t, **cond)
    def velocity(self, net, x_t, t, **cond):
        return -self.answer(net, x_t, t, **cond)
    def sample_times(self, n, generator=None):
        return torch.sigmoid(self.p_mean + self.p_std * standard_normal((n,), generator))
    def time_at(self, ratio):
        return ratio / (1 + ratio)

@dataclass
class VPDiffusion(Objective):
    """Variance preserving: alpha = cos(angle), sigma = sin(angle), angle = pi/2 (t + s)/(1 + s).

    The network answers v = alpha noise - sigma x_0 = dx_t/dangle ([16] appendix D). An answer of 0
    has loss 1. s keeps sigma(0) just above 0.
    Lifts out with: Objective, expand, linear_times, standard_normal."""
    s: float = 0.008

    def angle(self, t):
        return math.pi / 2 * (torch.as_tensor(t) + self.s) / (1 + self.s)
    def alpha(self, t):
        return torch.cos(self.angle(t))
    def sigma(self, t):
        return torch.sin(self.angle(t))
    def target(self, x, noise, t):
        t = expand(t, x)
        return self.alpha(t) * noise - self.sigma(t) * x
    def denoise(self, net, x_t, t, **cond):
        v = self.answer(net, x_t, t, **cond)
        t = expand(t, x_t)
        return self.alpha(t) * x_t - self.sigma(t) * v
    def velocity(self, net, x_t, t, **cond):            # dx/dt = dangle/dt dx/dangle
        return math.pi / 2 / (1 + self.s) * self.answer(net, x_t, t, **cond)
    def sample_times(self, n, generator=None):
        return torch.rand(n, generator=generator)
    def time_at(self, ratio):
        angle = torch.as_tensor(ratio).atan()
        return (angle * (1 + self.s) / (math.pi / 2) - self.s).clamp_min(0)

@dataclass
class EDM(Objective):
    """Variance exploding: x_t = x_0 + t noise, so that t *is* the noise level ([3] Table 1).

    x_0^ = c_skip x_t + c_out net(c_in x_t, c_noise) ([3] eq. 7). c_in and c_out give the network's
    input and target variance 1, so an answer of 0 has loss 1. c_out multiplies the network's error;
    c_skip makes c_out^2 = (1 - c_skip)^2 sigma_data^2 + c_skip^2 t^2 as small as it can be ([3]
    appendix B.6). Training levels are e^N(p_mean, p_std^2).
    Lifts out with: Objective, expand, karras_times, linear_times, standard_normal."""
    sigma_data: float = 1.0
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        self.t_max = self.sigma_max

    def alpha(self, t):
        return t ** 0                                   # 1, shaped like t
    def sigma(self, t):
        return t

    def preconditioning(self, sigma):
        variance = sigma ** 2 + self.sigma_data ** 2    # of x_t
        c_skip = self.sigma_data ** 2 / variance
        c_out = sigma * self.sigma_data / variance ** 0.5
        c_in = 1 / variance ** 0.5
        c_noise = torch.as_tensor(sigma).log() / 4
        return c_skip, c_out, c_in, c_noise

    def answer(self, net, x_t, t, **cond):
        _, _, c_in, c_noise = self.preconditioning(expand(t, x_t))
        return net(c_in * x_t, c_noise.flatten(), **cond)
    def target(self, x, noise, t):
        c_skip, c_out, _, _ = self.preconditioning(expand(t, x))
        return (x - c_skip * self.add_noise(x, noise, t)) / c_out
    def denoise(self, net, x_t, t, **cond):
        c_skip, c_out, c_in, c_noise = self.preconditioning(expand(t, x_t))
        return c_skip * x_t + c_out * net(c_in * x_t, c_noise.flatten(), **cond)
    def velocity(self, net, x_t, t, **cond):            # noise^
        return (x_t - self.denoise(net, x_t, t, **cond)) / expand(t, x_t)
    def sample_times(self, n, generator=None):
        return torch.exp(self.p_mean + self.p_std * standard_normal((n,), generator))
    def times(self, steps, start=None):
        return karras_times(steps, self.sigma_min, start or self.t_max, self.rho)
    def time_at(self, ratio):
        return ratio

# ----------------------------------------------------------------------
# 2. Guidance: how do we ask for a note?
# ----------------------------------------------------------------------
# A condition, such as "pitch 60", is one more argument of the network. In training it is withheld
# now and then, so one network learns both p(x | condition) and p(x). By Bayes their ratio is
# proportional to p(condition | x). To get more of the condition, raise this to a power w:
#
#     p_w(x)  ~  p(x) p(condition | x)^w  ~  p(x)^(1 - w) p(x | condition)^w     (~: proportional).
#
# The scores, gradients of logarithms, add up: (1 - w) score_u + w score_c, with c for conditional
# and u for unconditional. A network's answer is a(t) score + b(t) x_t. The x_t term is the same in
# both and the weights sum to one, so answers mix as scores do: classifier-free guidance [4]. With
# w > 1, notes are more clearly pitch 60 than the data, but also more alike, and the answers deviate
# more, which `rescale` undoes [5]. (Left out: guidance by a classifier, or at some times only.)
#
# Try: `python minidiff.py sample --run runs/plucks --pitch 60 --cfg 8`. It is still note 60, but
# far too soft: the level is a latent as well, and is exaggerated with the others.

def guide(conditional, unconditional, scale, rescale=0.0):
    """u + w (c - u) for answers c, u [B, ...] ([4] eq. 6 has w - 1). rescale, 0 to 1, brings the
    deviation of each item towards that of c ([5] section 3.4)."""
    guided = unconditional + scale * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    wanted = conditional.std(axes, correction=0, keepdim=True)  # [B, 1, ...]
    found = guided.std(axes, correction=0, keepdim=True).clamp_min(1e-12)
    return guided * (1 - rescale + rescale * wanted / found)

@dataclass
class GuidedNet:
    """A network with guidance inside, called like the plain one. For u it withholds the conditions,
    or puts in their place what `negative` holds: "not like this". Lifts out with: guide."""
    net: object                                         # (x, t, **cond) -> answer
    scale: float
    rescale: float = 0.0
    negative: dict = None

    def __call__(self, x, t, **cond):
        withheld = {name: torch.full_like(value, math.nan if value.is_floating_point() else -1)
                    for name, value in cond.items()} | (self.negative or {})
        if not cond or self.scale == 1:
            return self.net(x, t, **cond)
        if self.scale == 0:
            return self.net(x, t, **withheld)
        both = {name: torch.cat([cond[name], withheld[name]]) for name in cond}  # [2B, ...]
        conditional, unconditional = self.net(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return guide(conditional, unconditional, self.scale, self.rescale)

# ----------------------------------------------------------------------
# 3. Samplers: how do we get from noise to a note?
# ----------------------------------------------------------------------
# A sampler follows velocity(x, t) = dx/dt from noise down a list of times to 0. It solves an
# ordinary differential equation (ODE), and need not know what diffusion is. What takes time is the
# network. Euler's rule asks it once per step. Heun's asks again where Euler's step has landed, and
# averages. With half the step, Euler's error halves, and Heun's falls to a quarter.
#
# The third solver works on the denoiser, and fits a parabola to its last three answers [6]. It can
# also add fresh noise on the way. Noise of variance 2 q dt spreads a density, and a drift of
# q score dt undoes it. Together they leave the density at every t as it was, while early
# errors are forgotten ([17] eq. 6, 13). eta = 0 is the ODE, eta = 1 reverses the noising process.
#
# Try: `python minidiff.py sample --run runs/plucks --sampler euler --steps 1`, then `--steps 30`.
# One step lands on the mean of all notes, a hum without a pitch. Thirty lead to one note.

def euler(velocity, x, times):
    """Follow dx/dt = velocity(x, t) down `times` [n + 1] by Euler's rule, with an error of order h.

    velocity: (x [B, ...], t [B]) -> dx/dt [B, ...]."""
    for t, t_next in zip(times.tolist(), times[1:].tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x

def heun(velocity, x, times):
    """Do as euler by Heun's rule ([3] Algorithm 1), with an error of order h^2.

    x_euler = x + h d,   x <- x + h (d + d_next) / 2,   d = velocity(x, t),   d_next = velocity(
    x_euler, t_next),   h = t_next - t < 0."""
    for t, t_next in zip(times.tolist(), times[1:].tolist()):
        h = t_next - t
        d = velocity(x, x.new_full((len(x),), t))       # [B, ...]
        x_euler = x + h * d
        if t_next == 0:
            return x_euler                              # EDM's velocity at 0 would be 0/0
        d_next = velocity(x_euler, x.new_full((len(x),), t_next))
        x = x + h * (d + d_next) / 2
    return x

def dpmpp_3m_sde(denoise, x, sigmas, eta=1.0, generator=None):
    """DPM-Solver++(3M) SDE for x_t = x_0 + sigma noise, with an error of order h^3 ([6]).

    Let lambda = -ln sigma, h > 0 its step, ' the derivative by lambda. If eta = 0, dx/dlambda =
    x_0^ - x, so that x <- e^-h x + integral of e^-(h - s) x_0^(s) ds from 0 to h. Put x_0^ + s x_0'
    + s^2/2 x_0'' in for x_0^(s). With noise of variance 2 eta sigma^2 dlambda and the drift that
    undoes it, and g = (1 + eta) h, this is
        x <- sigma_next/sigma e^(-eta h) x + (1 - e^-g) x_0^ + h phi_2 x_0' - h^2 phi_3 x_0''
             + sigma_next sqrt(1 - e^(-2 eta h)) noise,
        phi_2 = 1 - (1 - e^-g)/g,   phi_3 = phi_2/g - 1/2.
    (Published codes take half of the x_0'' term, which leaves them at second order.)
    denoise: (x, sigma) -> x_0^.  sigmas: best even in lambda. Lifts out with: standard_normal."""
    past = []                                           # (lambda, x_0^), newest first
    for sigma, sigma_next in zip(sigmas.tolist(), sigmas[1:].tolist()):
        x_0 = denoise(x, x.new_full((len(x),), sigma))  # [B, ...]
        if sigma_next == 0:
            return x_0
        past = [(-math.log(sigma), x_0)] + past[:2]
        h = math.log(sigma / sigma_next)
        g = (1 + eta) * h
        phi_1 = -math.expm1(-g)                         # 1 - e^-g
        phi_2 = 1 - phi_1 / g
        phi_3 = phi_2 / g - 1 / 2
        x = sigma_next / sigma * math.exp(-eta * h) * x + phi_1 * x_0
        if len(past) > 1:
            (l0, new), (l1, old) = past[:2]
            slope = (new - old) / (l0 - l1)             # x_0' from two estimates
            if len(past) > 2:
                l2, older = past[2]
                bend = 2 * (slope - (old - older) / (l1 - l2)) / (l0 - l2)  # x_0''
                slope = slope + bend * (l0 - l1) / 2    # x_0' of the parabola
                x = x - h ** 2 * phi_3 * bend
            x = x + h * phi_2 * slope
        noise = standard_normal(x.shape, generator, x.device).to(x)
        x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise
    return x

def optimise_noise(sample, noise, loss, steps, lr):
    """DITTO: the noise [B, ...] whose sample has the smallest loss, found by Adam ([7] section 3).

    sample: noise -> x [B, ...], such as lambda noise: generate(..., noise=noise): a sampler is
    differentiable.  loss: x -> scalar, such as the distance from a wanted loudness."""
    noise = noise.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([noise], lr)
    smallest = math.inf
    for _ in range(steps):
        value = loss(sample(noise))
        if value.item() < smallest:
            smallest = value.item()
            best = noise.detach().clone()
        noise.grad, = torch.autograd.grad(value, noise)  # the network gets none
        optimiser.step()
    return best

def generate(net, objective, shape, sampler="heun", steps=9, seed=0, schedule=None, eta=1.0,
             init=None, init_noise=None, keep=None, noise=None, device="cpu", **cond):
    """Draw latents of `shape` [B, C, L]; item i, from noise of seed + i, is the same in any batch.

    sampler: euler, heun, dpmpp_3m_sde.  schedule: noise levels sigma/alpha that end with 0, such as
    karras_times(9, 0.002, 80), instead of `steps` that are even in sigma/(alpha + sigma).
    init [B, C, L]: starts from it, noised to the time init_noise: None is where sigma = alpha, 0
    gives init back, the largest ignores it.  keep [L], bool: these frames of init stay.
    noise: starts from it, with gradients.  ValueError: unknown sampler, wrong init_noise.
    Lifts out with: dpmpp_3m_sde, euler, expand, heun, linear_times, polyexponential_times,
    standard_normal."""
    if sampler not in ("euler", "heun", "dpmpp_3m_sde"):
        raise ValueError(f"sampler must be euler, heun or dpmpp_3m_sde, got {sampler!r}")
    start = objective.t_max
    if init is not None:
        start = float(objective.time_at(1.0) if init_noise is None else init_noise)
    if not 0 <= start <= objective.t_max:
        raise ValueError(f"init_noise must be from 0 to {objective.t_max:g}, got {start:g}")
    if start == 0:
        return init
    t = torch.tensor(start, dtype=torch.float64)
    share = objective.sigma(t) / (objective.alpha(t) + objective.sigma(t))
    if schedule is None and sampler == "dpmpp_3m_sde":  # even in lambda, from 80 at most
        high = min(80.0, (share / (1 - share)).item())  # share / (1 - share) = sigma / alpha
        schedule = polyexponential_times(steps, min(0.002, high / 2), high)
    if schedule is None:
        share = linear_times(steps, share.item())
        times = objective.time_at(share / (1 - share))
        times[0] = start                                # was NaN if alpha = 0
    else:
        times = objective.time_at(schedule)

    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    if noise is None:
        noise = standard_normal(shape, generators, device)
    data = init if start < objective.t_max else torch.zeros_like(noise)

    def keeping(x_t, t):  # what stays is put back, noised as befits time t
        return x_t if keep is None else torch.where(keep, objective.add_noise(init, noise, t), x_t)
    def velocity(x_t, t):
        return objective.velocity(net, keeping(x_t, t), t, **cond)
    def denoise(z, ratio):  # z = x_t / alpha = x_0 + (sigma/alpha) noise
        t = objective.time_at(ratio)
        return objective.denoise(net, keeping(expand(objective.alpha(t), z) * z, t), t, **cond)

    with torch.set_grad_enabled(noise.requires_grad):
        if sampler == "dpmpp_3m_sde":
            z = data + schedule[0].item() * noise
            x = dpmpp_3m_sde(denoise, z, schedule, eta, generators)
        else:
            x = objective.add_noise(data, noise, times[0].item())
            x = (euler if sampler == "euler" else heun)(velocity, x, times)
    return x if keep is None else torch.where(keep, init, x)

# ----------------------------------------------------------------------
# 4. The U-Net: which network can learn this?
# ----------------------------------------------------------------------
# Fine noise is judged by looking close, a pitch by looking at the whole note. So the network halves
# L several times, then doubles it back, with a skip connection at each level to carry the detail.
# `TutorialUNet` does just that. `UNet1d`, after Diff-A-Riff [8], adds five things:
#
#     time       in every block, to scale and shift its features: each t asks different things
#     residuals  x + f(x), so that gradients pass many blocks unchanged
#     norm       features of size 1 at any noise; frame by frame, whatever the length
#     attention  at the coarse levels every frame looks at all others
#     position   each frame's number: near t = 1 nothing in x_t tells the attack from the end
#
# Try: `python minidiff.py train --net tutorial --run runs/tutorial`, and compare the last tables.

class TutorialUNet(nn.Module):
    """Stride-2 convolutions, ReLU, skips by addition; t enters once, at the bottom. Any L."""

    def __init__(self, channels, width=128, depth=5):
        super().__init__()
        widths = [channels] + [width * 2 ** i for i in range(depth)]
        pairs = list(zip(widths, widths[1:]))
        self.down = nn.ModuleList(nn.Conv1d(a, b, 4, 2, 1) for a, b in pairs)
        self.middle = nn.Conv1d(widths[-1], widths[-1], 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, widths[-1]))
        self.up = nn.ModuleList(nn.ConvTranspose1d(b, a, 4, 2, 1) for a, b in pairs[::-1])
        self.exit = nn.Conv1d(channels, channels, 1)

    def forward(self, x, t):
        L = x.shape[2]
        x = F.pad(x, (0, -L % 2 ** len(self.down)))
        skips = []
        for conv in self.down:
            skips.append(x)
            x = F.relu(conv(x))                                 # [B, 2D, L/2]
        x = F.relu(self.middle(x)) + self.time_mlp(t[:, None])[:, :, None]
        for conv in self.up:
            x = F.relu(conv(x)) + skips.pop()                   # [B, D/2, 2L]
        return self.exit(x)[:, :, :L]

def time_embedding(t, D):
    """Sines and cosines of 1000 t, since [18] section 3.5 is made for integers: [B] -> [B, D]."""
    powers = torch.arange(D // 2, device=t.device) / (D // 2)
    angles = 1000 * t.float()[:, None] * 10_000 ** -powers      # [B, D/2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)

class FrameNorm(nn.LayerNorm):
    """LayerNorm over the features of each frame: [B, D, L] -> same."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)

class ResidualBlock(nn.Module):
    """x + f(x, embedding): [B, D, L] -> [B, D', L]. Lifts out with: FrameNorm."""

    def __init__(self, inputs, outputs, embedding):
        super().__init__()
        self.norm1 = FrameNorm(inputs)
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm2 = FrameNorm(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.modulate(F.silu(embedding))[:, :, None].chunk(2, dim=1)
        f = self.conv1(F.silu(self.norm1(x)))                   # [B, D', L]
        f = self.conv2(F.silu(self.norm2(f) * (1 + scale) + shift))
        return self.skip(x) + f

class SelfAttention(nn.Module):
    """x + attention over L ([18] section 3.2): [B, D, L] -> same. Lifts out with: FrameNorm."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = FrameNorm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1))  # [B, 3, heads, ., L]
        q, k, v = qkv.transpose(3, 4).unbind(1)                 # [B, heads, L, .]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(2, 3).flatten(1, 2))

class UNet1d(nn.Module):
    """A U-Net with time, labels and curves ([8] section 3): x [B, C, L] -> same. Any L.

    labels [B, n]: one for each of label_sizes; -1 is "not given".  controls [B, n, L]: curves; NaN
    is "not given".  window: number of distinct positions; later frames share the last.
    Lifts out with: FrameNorm, ResidualBlock, SelfAttention, time_embedding."""

    def __init__(self, channels, width=128, multipliers=(1, 2, 2), label_sizes=(), controls=0,
                 heads=4, window=1):
        super().__init__()
        self.width = width
        self.controls = controls
        self.window = window
        widths = [width] + [width * m for m in multipliers]
        D = 2 * width                                           # of the embedding
        self.time_mlp = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.tables = nn.ModuleList(nn.Embedding(size + 1, D) for size in label_sizes)
        # Ten inputs per curve: its value, whether it is given, four sines and four cosines.
        self.enter = nn.Conv1d(channels + 10 * controls, width, 3, padding=1)
        self.position = nn.Linear(width, width)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            # The finest level keeps its L and has no attention: there it costs most, tells least.
            halve = nn.Conv1d(a, a, 4, 2, 1) if i > 0 else nn.Identity()
            attend = SelfAttention if i > 0 else nn.Identity    # which ignores its arguments
            self.down.append(nn.ModuleList([halve, ResidualBlock(a, b, D), attend(b, heads)]))
            self.up.insert(0, nn.ModuleList([ResidualBlock(2 * b, a, D), attend(a, heads)]))
        self.middle = ResidualBlock(b, b, D)
        self.norm = FrameNorm(width)
        self.exit = nn.Conv1d(width, channels, 3, padding=1)

    def forward(self, x, t, labels=-1, controls=math.nan):
        B, _, L = x.shape
        embedding = self.time_mlp(time_embedding(t, self.width))  # [B, D]
        labels = torch.as_tensor(labels, device=x.device).expand(B, len(self.tables))
        for table, label in zip(self.tables, labels.unbind(1)):
            embedding = embedding + table(label + 1)            # row 0: not given
        controls = torch.as_tensor(controls, device=x.device).expand(B, self.controls, L)
        # A curve has 10 channels. A cent, 1/1200 of an octave, is 2.4 degrees of the last wave.
        angles = [2 * math.pi * controls * 2 ** k for k in range(4)]
        waves = [f(angle) for angle in angles for f in (torch.sin, torch.cos)]
        curves = torch.cat([controls, ~controls.isnan(), *waves], dim=1).nan_to_num()
        x = F.pad(torch.cat([x, curves], dim=1), (0, -L % 2 ** (len(self.down) - 1)))
        frame = torch.arange(x.shape[2], device=x.device).clamp(max=self.window - 1)
        x = self.enter(x) + self.position(time_embedding(frame / 1000, self.width)).T  # [B, D, L]
        skips = []
        for halve, block, attend in self.down:
            x = attend(block(halve(x), embedding))              # [B, D, L/2^i]
            skips.append(x)
        x = self.middle(x, embedding)
        for block, attend in self.up:
            x = attend(block(torch.cat([x, skips.pop()], dim=1), embedding))
            if skips:
                x = x.repeat_interleave(2, dim=2)               # [B, D, 2L]
        return self.exit(F.silu(self.norm(x)))[:, :, :L]

# ----------------------------------------------------------------------
# 5. Sound: what is a note, and how do we hear that it is in tune?
# ----------------------------------------------------------------------
# A plucked string is a sum of harmonics. The k-th has the frequency f_k = k f_0 (a little more, for
# the string is stiff). How loud it starts depends on the place p of plucking and the dullness b of
# the pick; it dies away at the rate d_k, higher ones faster:
#
#     x(time)  =  sum over k of  sin(pi k p)/k e^(-(k-1) b) e^(-d_k time) cos(2 pi f_k time).
#
# So we can make data that are in tune. To hear a pitch, ask at which delay a sound is most like
# itself: the autocorrelation peaks at the period. (The largest peak of the spectrum is often the
# second harmonic.) One period later harmonics repeat and noise does not, so the peak's height r is
# the harmonic share of the power, and harmonics to noise are 10 log10(r / (1 - r)) dB (Boersma,
# IFA Proceedings 17, 1993).
#
# Try: `python minidiff.py sample --run runs/plucks --pitch 43`. It prints the pitch that it hears.

def resample(audio, from_rate, to_rate):
    """Cut off or extend spectra: [..., T] -> [..., ceil(T to_rate / from_rate)]; rates in Hz."""
    if from_rate == to_rate:
        return audio
    T = audio.shape[-1]
    # Whole seconds, a tenth or more of silence: else the end would ring into the beginning.
    seconds = math.ceil(1.1 * T / from_rate)
    spectrum = torch.fft.rfft(audio.double(), n=seconds * from_rate)
    out = torch.fft.irfft(spectrum, n=seconds * to_rate) * (to_rate / from_rate)
    return out[..., :math.ceil(T * to_rate / from_rate)].to(audio.dtype)

def load_audio(path, sample_rate, start=0.0, seconds=math.inf):
    """Read a sound file from `start` for `seconds`: mono [T] at `sample_rate` Hz.

    ValueError names a file that has no finite samples there. Lifts out with: resample."""
    try:
        info = soundfile.info(path)
        rate = info.samplerate
        frames = round(min(seconds * rate, info.frames))
        data, _ = soundfile.read(path, frames, round(start * rate), dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as audio: {str(error).split(': ')[-1]}") from None
    if len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"{path}: holds no samples after {start:.2f} s, or NaN or infinity")
    return resample(torch.from_numpy(data.mean(axis=1)), rate, sample_rate)

def save_audio(path, audio, sample_rate):
    """Write audio [T] in 16 bits, scaled down if its peak max |x| is above 1; returns the peak."""
    if not audio.isfinite().all():
        raise ValueError(f"{path}: expected finite samples")
    peak = audio.abs().max().item()
    soundfile.write(path, (audio / max(peak, 1.0)).detach().cpu().numpy(), sample_rate)
    return peak

def pluck(pitch, velocity, seconds, sample_rate, generator=None, harmonics=40):
    """A plucked string, |x| <= 0.9, by the equation of this chapter, with random p, b and d: [T].

    pitch: MIDI.  velocity: 0 to 127; harder is louder and brighter."""
    point, bright, decay = torch.rand(3, generator=generator).double()
    force = velocity / 127
    f_0 = 440 * 2 ** ((pitch - 69) / 12)                        # Hz
    k = torch.arange(1, harmonics + 1).double()[:, None]        # [harmonics, 1]
    # 1e-4 is a guitar string's stiffness. Divided so that f_1 = f_0.
    f = f_0 * k * ((1 + 1e-4 * k ** 2) / (1 + 1e-4)).sqrt()
    p = 0.1 + 0.4 * point                                       # of the string
    b = 0.45 - 0.2 * bright - 0.2 * force
    d = (1 + 3 * decay) * (1 + 0.15 * (k - 1)) * math.sqrt(f_0 / 220)  # 1/s
    loud = torch.sin(math.pi * k * p) / k * torch.exp(-(k - 1) * b) * (f <= 0.45 * sample_rate)
    when = torch.arange(round(seconds * sample_rate)) / sample_rate  # s, [T]
    turns = (f * when.double()).frac().float()                  # whole turns go: precise in float32
    audio = (loud.float() * torch.exp(-d.float() * when) * torch.cos(2 * math.pi * turns)).sum(0)
    fade = (when / 0.003).clamp(max=1) * ((seconds - when) / 0.02).clamp(0, 1)  # in, out
    level = (0.1 + 0.8 * force) / audio.abs().max().clamp_min(1e-12)  # not 0/0
    return level * fade * audio

def envelope(audio, hop):
    """The largest |x| in every hop: [B, T] -> [B, ceil(T / hop)]."""
    return F.max_pool1d(audio.abs(), hop, ceil_mode=True)

def periodicity(audio, sample_rate, hop, low=34.0, finer=4):
    """MIDI pitch around the middle of each hop, and how periodic it is, r: [B, T] -> 2 [B, L].

    The autocorrelation of a Hann window of four periods of pitch `low` is divided by the window's
    own (Boersma): a periodic sound has r = 1 at its period and its multiples. Noise lowers all
    alike. So the pitch is the first peak whose shortfall 1 - r is at most twice the best peak's,
    plus 0.03 (in much noise: the first of 0.8 times the best). r is the best peak's height.
    60 dB below the sound's peak r is 0; where r <= 0.5 the pitch is 0.  L = ceil(T / hop).
    finer: lags per sample. Lifts out with: envelope."""
    longest = math.ceil(sample_rate / (440 * 2 ** ((low - 69) / 12)))  # period, in samples
    shortest = math.ceil(finer * sample_rate / 2637)            # of MIDI 100, in lags
    width = 4 * longest
    loud = envelope(audio, hop)
    loud = loud > 1e-3 * loud.amax(1, keepdim=True)             # [B, L]
    x = F.pad(audio, (width // 2 - hop // 2, width + hop))
    x = x.unfold(1, width, hop)[:, :loud.shape[1]]              # [B, L, width]
    window = torch.hann_window(width, device=audio.device)

    def correlate(x):
        # The power spectrum is the spectrum of the autocorrelation. Zeros behind it interpolate.
        power = torch.fft.rfft(x, n=2 * width).abs().square()
        r = torch.fft.irfft(power, n=2 * width * finer)[..., :finer * longest + 2]
        return r / r[..., :1].clamp_min(1e-12)                  # not 0/0

    r = correlate((x - x.mean(-1, keepdim=True)) * window) / correlate(window)  # [B, L, lags]
    left, middle, right = r[..., shortest - 1:].unfold(-1, 3, 1).unbind(-1)
    peaks = torch.where((middle >= left) & (middle > right), middle, 0.0)
    best = peaks.amax(-1, keepdim=True).clamp(0, 1)
    enough = torch.maximum(1 - 2 * (1 - best) - 0.03, 0.8 * best)
    first = (peaks >= enough).int().argmax(-1, keepdim=True)
    y0, y1, y2 = (y.gather(-1, first) for y in (left, middle, right))
    top = (y0 - y2) / (2 * (y0 - 2 * y1 + y2)).clamp(max=-1e-12)  # of the parabola
    lag = (first + shortest + top)[..., 0] / finer
    r = best[..., 0] * loud
    return torch.where(r > 0.5, 69 + 12 * torch.log2(sample_rate / lag / 440), 0.0), r

def pitch_track(audio, sample_rate, hop, low=34.0):
    """The pitch of `periodicity` alone: [B, T] -> [B, L]. Lifts out with: envelope, periodicity."""
    return periodicity(audio, sample_rate, hop, low)[0]

def note_pitch(track):
    """The voiced median of a note, NaN if unvoiced: [B, L] -> [B]."""
    return torch.where(track > 0, track, math.nan).nanmedian(dim=1).values

# ----------------------------------------------------------------------
# 6. The Snake VAE: how does a second of sound become 63 vectors?
# ----------------------------------------------------------------------
# 16,000 numbers a second are too many to diffuse. A codec squeezes 256 samples into one frame of 16
# channels, and one more for the level (C = 17), and back. A plain auto-encoder leaves holes between
# its latents that decode to rubbish. A *variational* one [12] gives each latent value a mean and a
# variance, decodes a draw, z = mean + e^(log_variance / 2) noise, and adds to the loss, with a
# small weight, the divergence
#
#     KL(N(mean, variance) || N(0, 1))  =  (mean^2 + variance - 1 - ln variance) / 2.
#
# So latents stay near unit size and neighbours overlap: what a diffusion model can hit, the decoder
# can play. The activation, Snake [10], has a periodic slope however far from 0, so the network can
# continue a tone; ReLUs continue everything as a straight line.
#
# Notes differ in level by a factor of a hundred, and each dies away. So the codec divides a sound
# by its own smooth level curve, which travels as one more channel. The network sees and plays
# everything, a loud attack and a soft end, at one level.
#
# Try: `python minidiff.py sample --run runs/plucks --init-audio runs/plucks/samples/real_1.wav
# --init-noise 0`. No noise is added, so you hear the codec's round trip.

class Snake(nn.Module):
    """x + sin(a x)^2 / a, with one learned a > 0 per channel ([10] eq. 3): [B, D, T] -> same."""

    def __init__(self, channels):
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(channels, 1))  # a itself would some day cross 0

    def forward(self, x):
        a = self.log_a.exp()
        return x + torch.sin(a * x).square() / a

class ResidualUnit(nn.Sequential):
    """x + two convolutions of it, the first dilated: [B, D, T] -> same. Lifts out with: Snake."""

    def __init__(self, width, dilation):
        super().__init__(
            Snake(width), nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation),
            Snake(width), nn.Conv1d(width, width, 1))

    def forward(self, x):
        return x + super().forward(x)

class Recurrent(nn.LSTM):
    """x + an LSTM over frames: [B, D, L] -> same, for Recurrent(D, D // 2, bidirectional=True)."""

    def forward(self, x):
        return x + super().forward(x.permute(2, 0, 1))[0].permute(1, 2, 0)

class SnakeVAE(nn.Module):
    """A codec: audio [B, T] <-> latents [B, C, L], hop = product of strides, L = ceil(T / hop).

    The last channel is the logarithm of the level. Kernels are twice the stride, so that all output
    samples have equally many inputs; otherwise the stride is heard as a buzz. After [11] section
    3.1. Lifts out with: Recurrent, ResidualUnit, Snake."""

    def __init__(self, sample_rate, channels=16, strides=(16, 4, 4), width=64, dilations=(1, 3)):
        super().__init__()
        self.sample_rate = sample_rate
        self.channels = channels + 1
        self.hop = math.prod(strides)
        widths = [1] + [width * 2 ** i for i in range(len(strides))]
        encoder = []
        decoder = []
        for s, a, b in zip(strides, widths, widths[1:]):
            shape = dict(kernel_size=2 * s, stride=s, padding=(s + 1) // 2)  # T -> T / s
            encoder += [nn.Conv1d(a, b, **shape), ResidualUnit(b, dilation=1), Snake(b)]
            decoder = [*(ResidualUnit(b, d) for d in dilations), Snake(b),
                       nn.ConvTranspose1d(b, a, **shape, output_padding=s % 2)] + decoder
        encoder.insert(-1, Recurrent(b, b // 2, bidirectional=True))
        decoder.insert(0, Recurrent(b, b // 2, bidirectional=True))
        self.encoder = nn.Sequential(*encoder, nn.Conv1d(b, 2 * channels, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv1d(channels, b, 3, padding=1), *decoder)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
                # Each keeps its input's variance; residual units start close to the identity.
                taps = 2 if isinstance(layer, nn.ConvTranspose1d) else layer.kernel_size[0]
                std = 1e-3 if taps == 1 else (taps * layer.in_channels) ** -0.5
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        # Little noise at first: a decoder that hears only noise learns to ignore the latents.
        nn.init.normal_(self.encoder[-1].weight[channels:], std=1e-3)
        nn.init.constant_(self.encoder[-1].bias[channels:], -8.0)

    def posterior(self, audio):
        """Levelled audio [B, T] -> mean, log_variance, [B, C - 1, L] each."""
        audio = F.pad(audio, (0, -audio.shape[1] % self.hop))
        mean, log_variance = self.encoder(audio[:, None]).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 20)        # e^20 is finite and noise enough

    def stretch(self, curve):
        """A curve [B, L] as [B, L * hop], on straight lines."""
        return F.interpolate(curve[:, None], scale_factor=self.hop, mode="linear")[:, 0]

    def levelled(self, audio):
        """Audio [B, T] with RMS 1 everywhere, and its level [B, L]: the RMS of 15 hops. A level 30
        dB below the sound's highest stays below 1, so silence does not become noise."""
        power = F.avg_pool1d(audio.square(), self.hop, ceil_mode=True)
        level = F.avg_pool1d(power, 15, 1, 7, count_include_pad=False).sqrt()
        level = level.maximum(0.03 * level.amax(1, keepdim=True)).clamp_min(1e-5)
        return audio / self.stretch(level)[:, :audio.shape[1]], level

    def encode(self, audio):
        audio, level = self.levelled(audio)
        return torch.cat([self.posterior(audio)[0], level.log()[:, None]], dim=1)

    def decode(self, latents):
        audio, _ = self.levelled(self.decoder(latents[:, :-1])[:, 0])  # [B, L * hop]
        level = F.avg_pool1d(latents[:, -1], 5, 1, 2, count_include_pad=False).exp()
        return audio * self.stretch(level)

def kl_divergence(mean, log_variance):
    """The KL of this chapter, in nats: its mean over all latent values ([12] appendix B)."""
    return 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()

# ----------------------------------------------------------------------
# 7. What the VAE is trained on: when are two sounds the same?
# ----------------------------------------------------------------------
# Shift a tone by half a period: it sounds the same, while the squared error is at its largest. The
# magnitudes of a spectrogram forget the phase. Long windows tell pitches apart, short ones tell
# when. What they cannot decide, the decoder plays as a dull average. A discriminator learns to hear
# that, and the decoder to deceive it.
#
# The gradients g_i = dloss_i/doutput differ by factors of a hundred, so weights on the losses say
# little. The balancer [11] divides each by its own running mean norm <|g_i|>:
#
#     g  =  total_norm  sum over i of  (w_i / sum of w) (g_i / <|g_i|>),     w_i the weights.
#
# Multiply a loss by 100 and nothing changes: equal weights give equal shares of the gradient.
#
# Try: `python minidiff.py train --run runs/judge --adversarial-from 1000`, and see its log.csv.

def stft(audio, size):
    """Spectra in Hann windows, [B, T] -> [B, frequencies, frames]; a sine of amplitude 1 has 1."""
    window = torch.hann_window(size, device=audio.device)
    return torch.stft(audio.float(), size, size // 4, window=window, pad_mode="constant",
                      return_complex=True) * 4 / size

def stft_loss(estimate, target, sizes=(2048, 512, 128), floor=1e-3):
    """||S_t - S_e|| / ||S_t|| + mean |ln S_t - ln S_e|, mean over window `sizes` ([19] eq. 4-6).

    S: magnitudes of audio [B, T]; below `floor` all are alike. Lifts out with: stft."""
    total = 0.0
    for size in sizes:
        S_e = stft(estimate, size).abs().flatten(1)
        S_t = stft(target, size).abs().flatten(1)
        silent = 10 * floor * math.sqrt(S_t.shape[1])           # silence is not 0/0
        total = total + (S_t - S_e).norm(dim=1) / S_t.norm(dim=1).clamp_min(silent)
        total = total + ((S_t + floor).log() - (S_e + floor).log()).abs().mean(1)
    return total.mean() / len(sizes)

class STFTDiscriminator(nn.Module):
    """Tells recordings from reconstructions: [B, T] -> logits [B, 1, ., .] and all hidden layers.

    Its channels are real and imaginary parts, so it hears wrong phases. Lifts out with: stft."""

    def __init__(self, widths=(2, 32, 64, 128, 128)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        self.exit = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, audio):
        x = torch.view_as_real(stft(audio, 512)).permute(0, 3, 1, 2)  # [B, 2, ., .]
        # A root tames the range: partials of a string differ by a factor of a thousand.
        x = x * (x.square().sum(1, keepdim=True) + 1e-7) ** -0.25
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), negative_slope=0.1)
            maps.append(x)
        return self.exit(x), maps

def hinge_discriminator_loss(real, fake):
    """mean relu(1 - real) + mean relu(1 + fake) ([11] section 3.4)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

def hinge_generator_loss(fake):
    """-mean fake. [11] cuts it off at 1; this goes on pulling."""
    return -fake.mean()

def feature_matching_loss(real, fake):
    """Mean L1 distance of hidden layers, each relative to its real size ([11] section 3.4)."""
    distances = [F.l1_loss(f, r.detach()) / r.detach().abs().mean().clamp_min(1e-8)  # not 0/0
                 for r, f in zip(real, fake)]
    return sum(distances) / len(distances)

class LossBalancer(nn.Module):
    """Turn weights of losses into shares of the gradient at the output ([11] section 3.4).

        balancer = LossBalancer({"l1": 1, "stft": 2})
        balancer.backward({"l1": l1, "stft": stft}, output, free={"kl": 0.01 * kl})

    |g_i| is the norm per item, mean over the batch. <.> is corrected for starting at 0. A loss
    that does not depend on the output goes into `free`. `shares`: of each in the sum of norms."""

    def __init__(self, weights, total_norm=1.0, ema_decay=0.999):
        super().__init__()
        self.weights = weights
        self.total_norm = total_norm
        self.ema_decay = ema_decay
        self.register_buffer("norms", torch.zeros(2, len(weights)))  # sums of |g_i|, of 1

    def backward(self, losses, output, free=None):
        if not losses.keys() <= self.weights.keys():
            raise ValueError(f"got losses {[*losses]}, have weights for {[*self.weights]}")
        total = sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(output)
        self.shares = {}
        for i, name in enumerate(self.weights):
            if name not in losses:
                continue
            g, = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm = g.flatten(1).norm(dim=1).mean()
            seen = torch.stack([norm, torch.ones_like(norm)])
            self.norms[:, i].lerp_(seen, 1 - self.ema_decay)
            mean = self.norms[0, i] / self.norms[1, i]
            factor = self.weights[name] / total * self.total_norm / mean.clamp_min(1e-12)
            balanced = balanced + factor * g
            self.shares[name] = factor * norm
        whole = sum(self.shares.values()).clamp_min(1e-12)  # all may be silent
        self.shares = {name: share / whole for name, share in self.shares.items()}
        # The gradient of this at `output` is `balanced`; from there it goes on into the network.
        ((balanced * output).sum() + sum((free or {}).values())).backward()

# ----------------------------------------------------------------------
# 8. Data: where do the notes come from?
# ----------------------------------------------------------------------
# From a formula, or from a folder of recordings. data[i] is a sound [T]; data.labels [N, 3] has the
# pitch, velocity and source of each, and data.valid [N] says which are held out from all training.
# Diffusion never touches audio. Before it starts, every sound goes through the codec, once:
#
#     data[i] [T]  -- encode -->  latents [C, L]  -- (latents - mean) / std -->  x_0 [C, L]
#
# Without the last step, noise of variance 1 would drown a channel of deviation 0.01. Recordings
# mostly have no labels, but the loudness and pitch of each frame can be measured. A network trained
# with these two curves plays melodies.
#
# Try: `python minidiff.py train --data melodies`, and then
# `python minidiff.py sample --run runs/melodies --melody 60 62 64 r 67 --beat 0.4`.

class Plucks(Dataset):
    """Plucked strings: note i has MIDI pitch 40 + i mod 37. Lifts out with: pluck."""
    sources = ["pluck"]

    def __init__(self, count=2220, seed=0, seconds=1.0, sample_rate=16_000):
        self.seed = seed
        self.seconds = seconds
        self.sample_rate = sample_rate
        self.valid = torch.arange(count) >= count - count // 6
        velocity = torch.randint(25, 128, (count,), generator=torch.Generator().manual_seed(seed))
        pitch = 40 + torch.arange(count) % 37
        self.labels = torch.stack([pitch, velocity, 0 * pitch], dim=1)
        self.audio = torch.stack([self.play(i) for i in range(count)])  # [N, T]

    def play(self, i):
        tone = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        return pluck(*self.labels[i, :2].tolist(), self.seconds, self.sample_rate, tone)

    def __len__(self):
        return len(self.audio)

    def __getitem__(self, i):
        return self.audio[i]

class Melodies(Plucks):
    """Phrases of plucked notes and rests, without labels. Lifts out with: Plucks, pluck."""
    sources = []

    def __init__(self, count=720, seed=0, seconds=2.0, sample_rate=16_000):
        super().__init__(count, seed, seconds, sample_rate)
        self.labels[:] = -1

    def play(self, i):
        random = np.random.default_rng([self.seed, i])
        tone = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        pitch = random.integers(46, 70)
        notes = []
        while sum(map(len, notes)) < (self.seconds + 1) * self.sample_rate:
            lasts = random.choice([0.25, 0.375, 0.5, 0.75, 1.0])  # seconds
            pitch = np.clip(pitch + random.integers(-5, 6), 40, 76)
            note = pluck(int(pitch), int(random.integers(40, 128)), lasts, self.sample_rate, tone)
            notes.append(note if random.random() > 0.12 else 0 * note)  # else a rest
        first = int(random.random() * self.sample_rate)  # the phrase may begin within a note
        return torch.cat(notes)[first:first + round(self.seconds * self.sample_rate)]

class AudioFolder(Dataset):
    """The recordings below a folder, cut into half-overlapping sounds of one length.

    Names as in NSynth [13], guitar_acoustic_004-071-025.wav, give labels. Held out are folders that
    end in -valid, or else a twentieth of the files. Lifts out with: load_audio, resample."""
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {
        ".aac", ".aif", ".aifc", ".amr", ".m4a", ".mp2", ".oga", ".opus", ".wma"}
    label = re.compile(r"(.+)_\d+-(0\d\d|1[01]\d|12[0-7])-(0\d\d|1[01]\d|12[0-7])")

    def __init__(self, root, sample_rate=None, seconds=None):
        files = {}
        for path in sorted(pathlib.Path(root).rglob("*")):
            inside = path.relative_to(root)
            hidden = any(part[0] == "." for part in inside.parts)
            of_a_run = any(pathlib.Path(root, p, "model.pt").exists() for p in inside.parents)
            if path.suffix.lower() in self.endings and not hidden and not of_a_run:
                try:
                    files[path] = soundfile.info(str(path))
                except RuntimeError as error:
                    print(f"left out: {error}", file=sys.stderr)
            elif path.is_symlink() and path.is_dir():
                print(f"left out: {path}: a linked folder", file=sys.stderr)
        if len(files) < 2:
            raise ValueError(f"{root}: no such folder with at least 2 usable sound files; --data "
                             "takes plucks, melodies, nsynth or a folder")
        rates = sorted(info.samplerate for info in files.values())
        self.sample_rate = sample_rate or min(rates[len(rates) // 2], 22_050)
        self.seconds = seconds or min(4.0, max(info.duration for info in files.values()))
        held = {path for path in files if path.parent.name.endswith("-valid")}
        if len(held) in (0, len(files)):  # by a hash of the name; of few files, the lowest
            hashes = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
                      for path in files}
            limit = max(bytes([13]), min(hashes.values()))
            held = {path for path in files if hashes[path] <= limit}
        self.pieces = []                                # (path, start in s)
        for path, info in files.items():
            last = max(0.0, info.duration - self.seconds)
            for k in range(1 + math.ceil(2 * last / self.seconds)):
                self.pieces.append((path, min(k * self.seconds / 2, last)))
        self.valid = torch.tensor([path in held for path, _ in self.pieces])
        names = [self.label.fullmatch(path.stem) for path, _ in self.pieces]
        self.sources = sorted({name[1] for name in names if name})
        self.labels = torch.full((len(names), 3), -1)   # -1: not given
        for label, name in zip(self.labels, names):
            if name:
                label[:] = torch.tensor([int(name[2]), int(name[3]), self.sources.index(name[1])])

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, i):
        path, start = self.pieces[i]
        audio = load_audio(path, self.sample_rate, start, self.seconds)
        return F.pad(audio, (0, round(self.seconds * self.sample_rate) - len(audio)))

def read_sounds(data, indices):
    """The sounds that can be read, [n, T], and their indices; the others are named on stderr."""
    sounds = {}
    for i in indices:
        try:
            sounds[i] = data[i]
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    return torch.stack([*sounds.values()]) if sounds else torch.zeros(0, 1), [*sounds]

NSYNTH_URL = ("https://media.githubusercontent.com/media/SonyCSLParis/test-lfs/refs/heads/master/"
              "NSYNTH_GUITAR_MP3.zip")
NSYNTH_SHA256 = "cbabb3ba2ce81c28982eb41c3ba5127a0d81a3cd72d55d427a95f0558e43dfb3"

def download_nsynth(folder="data", url=NSYNTH_URL, sha256=NSYNTH_SHA256):
    """Fetch, check and unpack NSynth's guitars (mp3, 335 MB); returns their folder."""
    target = pathlib.Path(folder, "NSYNTH_GUITAR_MP3")
    archive = f"{target}.zip"
    if not target.is_dir():
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, archive, hash_prefix=sha256)
            zipfile.ZipFile(archive).extractall(f"{target}.new")  # never outside of that folder
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{url} -> {archive}: {error}; run the same again") from None
        os.replace(f"{target}.new", target)             # all of it, or nothing
    return target

class Music2Latent:
    """The Music2Latent codec [14], used like SnakeVAE: L = (T - 1536) // 4096, at least 1.

    Its weights are 233 MB. Two CPU cores encode a note of 4 s in 2 s, and decode it in 10 s."""
    sample_rate = 44_100
    hop = 4096

    def __init__(self, seed=0, device=None):
        import music2latent                             # slow to import
        self.seed = seed
        # Apple's GPUs garble this codec: there it stays on the CPU.
        self.device = "cpu" if "mps" in str(device) else device or "cpu"
        try:
            self.model = music2latent.EncoderDecoder(device=self.device)
        except Exception as error:                      # whatever the download may raise
            folder = pathlib.Path(music2latent.__file__).parent / "models"
            raise ValueError(f"Music2Latent does not load ({type(error).__name__}): put music2latent"
                             f".pt of huggingface.co/SonyCSLParis/music2latent in {folder}") from None

    def encode(self, audio):
        audio = F.pad(audio, (0, max(0, self.hop + 1536 - audio.shape[1])))
        latents = self.model.encode(audio.to(self.device), max_batch_size=16)
        return latents.float().to(audio.device)         # half precision on a GPU

    def decode(self, latents):
        audio = []
        with torch.random.fork_rng():
            for item in latents.to(self.device).split(1):  # each from the same noise
                torch.manual_seed(self.seed)
                audio.append(self.model.decode(item).float().to(latents.device))
        return torch.cat(audio)

def measure_curves(audio, sample_rate, hop):
    """The envelope of audio [B, T], and its pitch in octaves from middle C, -5 where unvoiced, once
    per hop: [B, 2, L]. Lifts out with: envelope, periodicity, pitch_track."""
    tracks = torch.cat([pitch_track(x[None], sample_rate, hop) for x in audio])
    return torch.stack([envelope(audio, hop), (tracks - 60) / 12], dim=1)

def melody_curves(melody, frames_per_note, played):
    """Curves [2, L] for a list of pitches and None (a rest): as loud, and fading as fast, as the
    curves `played` [N, 2, L]."""
    loud, octaves = played.transpose(0, 1).flatten(1)
    voiced = octaves > -4.9
    both = voiced[1:] & voiced[:-1]
    fade = (loud[1:][both] / loud[:-1][both].clamp_min(1e-6)).median()  # per frame
    edges = [round(k * frames_per_note) for k in range(len(melody) + 1)]
    curves = torch.tensor([[0.0], [-5.0]]).repeat(1, edges[-1])  # silence
    for pitch, a, b in zip(melody, edges, edges[1:]):
        if pitch is not None:
            curves[0, a:b] = loud[voiced].quantile(0.8) * fade ** torch.arange(b - a)
            curves[1, a:b] = (pitch - 60) / 12
    return curves

def save_checkpoint(path, **state):
    """Write tensors, numbers, strings, lists and dicts; `path` is never half written."""
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)

def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Code in the file is refused, not run: ValueError."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                          # a broken file may raise anything
        raise ValueError(f"{path}: no checkpoint ({type(error).__name__}); train first") from None

@torch.no_grad()
def encode_all(codec, data, path, condition="none", device="cpu", batch=16):
    """Encode a data set into the file `path`; returns its content, a dict. Interrupted, it starts
    over: the Snake VAE takes seconds, Music2Latent on two CPU cores 2 s for each note of 4 s.

    x [N, C, L], standardised; labels; valid; cond, what the network is given; facts of the run; for
    `evaluate` a and b, two halves of the held-out sounds, at most 185 each; real [n, T] are b.
    Lifts out with: envelope, measure_curves, periodicity, pitch_track, read_sounds,
    save_checkpoint."""
    parts = []
    for some in torch.arange(len(data)).split(batch):
        audio, read = read_sounds(data, some.tolist())
        if not read:
            continue
        z = codec.encode(audio.to(device)).cpu()
        curves = z[:, :0]                               # none
        if condition == "control":
            curves = measure_curves(audio, codec.sample_rate, codec.hop)
        parts.append((z, curves[:, :, :z.shape[2]], torch.tensor(read)))
        if len(parts) % 32 == 0:
            print(f"encoded {batch * len(parts):,} of {len(data):,} sounds", file=sys.stderr)
    z, curves, kept = map(torch.cat, zip(*parts))
    labels = data.labels[kept]
    valid = data.valid[kept]
    mean = z[~valid].mean((0, 2))[:, None]
    std = z[~valid].std((0, 2))[:, None].clamp_min(0.01)  # unused channels stay small
    low, high = labels[~valid, 0].aminmax()
    held = valid.nonzero()[:, 0]
    pairs = max(1, min(185, len(held) // 2))
    a, b = held[torch.linspace(0, len(held) - 1, 2 * pairs).round().long()].view(-1, 2).T
    real, _ = read_sounds(data, kept[b].tolist())
    if condition == "control":
        curves[:, 0] /= curves[~valid, 0].max()         # the loudest frame is 1
    cond = {"note": {"labels": labels}, "control": {"controls": curves}, "none": {}}[condition]
    facts = dict(condition=condition, sample_rate=codec.sample_rate, sources=data.sources,
                 channels=z.shape[1], frames=z.shape[2], mean=mean, std=std,
                 pitches=[low.item(), high.item()])
    state = dict(x=(z - mean) / std, labels=labels, valid=valid, cond=cond, a=a, b=b, real=real,
                 facts=facts)
    save_checkpoint(path, **state)
    return state

# ----------------------------------------------------------------------
# 9. Training: how do we get good weights?
# ----------------------------------------------------------------------
# One loop, `fit`, serves both networks. A batch is a sample, so its gradient is off by chance, and
# the weights rattle about the best ones. They settle as the learning rate falls to 0. Their
# moving average (EMA) is settled at any step.
#
# A checkpoint holds all that the next step depends on: a resumed training ends with the same bits.
# On several GPUs torchrun starts this program once for each. Each draws its part of the batch, and
# DistributedDataParallel averages the gradients. Rank 0 alone trains the codec, saves and speaks.
#
# Try: `python minidiff.py train --resume --steps 3000`, which goes on where the run was.

# [2] trains images at t = sigmoid(N(0, 1)), which is sigma/alpha = e^N(0, 1). The frames of a note
# say nearly the same, so it shows through more noise than an image: rf, edm take e^N(0.5, 1.3^2).
OBJECTIVES = {"rf": RectifiedFlow(0.5, 1.3), "edm": EDM(p_mean=0.5, p_std=1.3), "vp": VPDiffusion()}
RANK = int(os.environ.get("RANK", 0))                   # which process am I, of how many?
WORLD = int(os.environ.get("WORLD_SIZE", 1))

def learning_rate(step, steps, peak, warmup=200):
    """Up to `peak` in `warmup` steps, hold it, and fall to 0 in the last 30 % of `steps`."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (0.3 * steps))

def warm_average(average, weight, count):
    """EMA, for AveragedModel. While `count` is small the decay is too, which forgets the start."""
    decay = ((1 + count) / (10 + count)).clamp(max=0.998)
    return decay * average + (1 - decay) * weight

def fit(what, net, learn, steps, path, lr, generator, betas, settings=None, **parts):
    """Train net up to step `steps`, on from the checkpoint at `path`, if any; returns its average.

    learn(step) -> {name: scalar}: a forward and backward pass. Means over 100 steps go to log.csv;
    ValueError if one is not finite. parts: what else has a state that goes into the checkpoint."""
    optimiser = torch.optim.AdamW(net.parameters(), lr, betas, weight_decay=0.0, fused=True)
    average = AveragedModel(net, avg_fn=warm_average)
    parts |= {"net": net, "optimiser": optimiser, "average": average}
    first = 0
    if path.exists():
        state = load_checkpoint(path)
        first = state["step"]
        generator.set_state(state["generator"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if first >= steps:
        print(f"{path} has {first:,} steps: nothing to train; give more to go on", file=sys.stderr)
    rows = []
    for done in range(first + 1, steps + 1):
        optimiser.param_groups[0]["lr"] = learning_rate(done - 1, steps, lr)
        optimiser.zero_grad()
        seen = learn(done - 1)
        seen["gradient norm"] = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rows.append({name: value.detach() for name, value in seen.items()})  # not their graphs
        optimiser.step()
        average.update_parameters(net)
        if done % 100 == 0 or done == steps:
            means = {name: sum(row[name] for row in rows).item() / len(rows) for name in rows[0]}
            rows.clear()
            if not all(map(math.isfinite, means.values())):
                raise ValueError(f"{what}: not finite at step {done}: --resume with a smaller --lr")
            if RANK == 0:
                said = ", ".join(f"{name} {means[name]:.3f}" for name in [*means][:4])
                print(f"{what}: step {done:,} of {steps:,}: {said}", file=sys.stderr)
                with open(path.parent / "log.csv", "a", newline="") as file:
                    csv.writer(file).writerows([what, done, *item] for item in means.items())
        if RANK == 0 and (done % 500 == 0 or done == steps):
            save_checkpoint(path, step=done, settings=settings, generator=generator.get_state(),
                            **{name: part.state_dict() for name, part in parts.items()})
    return average.module

def train_codec(codec, audio, steps, path, seed=0, batch_size=8, lr=1e-3, crop=4096,
                kl_weight=0.01, blur=0.2, adversarial_from=math.inf, settings=None):
    """Train a SnakeVAE on windows of `crop` samples of audio [N, T]; returns its average.

    blur: noise, in units of each channel's deviation, by which the decoder learns to bear latents
    that are a little wrong, as those of a diffusion model are."""
    generator = torch.Generator().manual_seed(seed)
    device = next(codec.parameters()).device
    crop = min(crop, audio.shape[1])
    audio = torch.cat([codec.levelled(some)[0] for some in audio.split(64)])
    judge = STFTDiscriminator().to(device)
    judge_optimiser = torch.optim.AdamW(judge.parameters(), lr / 2, betas=(0.8, 0.99))
    weights = {"l1": 1, "l2": 1, "stft": 2, "adversarial": 1, "features": 2}
    balancer = LossBalancer(weights, ema_decay=0.99).to(device)

    def learn(step):
        chosen = torch.randint(len(audio), (batch_size, 1), generator=generator)
        starts = torch.randint(audio.shape[1] - crop + 1, (batch_size, 1), generator=generator)
        real = audio[chosen, starts + torch.arange(crop)].to(device)  # [B, crop]
        mean, log_variance = codec.posterior(real)
        spread = (log_variance / 2).exp() * standard_normal(mean.shape, generator, device)
        error = blur * mean.detach().std((0, 2), keepdim=True)
        z = mean + spread + error * standard_normal(mean.shape, generator, device)
        estimate = codec.decoder(z)[:, 0, :crop]
        rms = ((estimate - real).square().mean(1) + 1e-8).sqrt()
        losses = {"l1": F.l1_loss(estimate, real), "l2": rms.mean(),
                  "stft": stft_loss(estimate, real)}
        seen = {"kl": kl_divergence(mean, log_variance)}
        if step >= adversarial_from:
            # The judge learns from a detached copy: its step must not teach the codec anything.
            seen["judge"] = hinge_discriminator_loss(judge(real)[0], judge(estimate.detach())[0])
            judge_optimiser.zero_grad()
            seen["judge"].backward()
            judge_optimiser.step()
            logits, maps = judge(estimate)
            losses["adversarial"] = hinge_generator_loss(logits)
            losses["features"] = feature_matching_loss(judge(real)[1], maps)
        balancer.backward(losses, estimate, free={"kl": kl_weight * seen["kl"]})
        return losses | seen | {f"{name} share": s for name, s in balancer.shares.items()}

    return fit("codec", codec, learn, steps, path, lr, generator, (0.8, 0.99), settings,
               judge=judge, judge_optimiser=judge_optimiser, balancer=balancer)

def drop_conditions(cond, generator, p=0.1):
    """Withhold labels [B, n] and controls [B, n, L], so that every subset is learnt ([4] Algorithm
    1): each of the n with probability p, and all of an item's with p once more."""
    kept = {}
    for name, value in cond.items():
        drop = torch.rand(len(value), value.shape[1] + 1, generator=generator) < p
        drop = (drop[:, 1:] | drop[:, :1]).to(value.device)  # [B, n]
        kept[name] = (value.masked_fill(drop, -1) if name == "labels" else
                      value.masked_fill(drop[:, :, None], math.nan))
    return kept

def train_diffusion(net, objective, x, cond, valid, steps, path, seed=0, batch_size=32, lr=2.5e-3,
                    settings=None):
    """Train net on latents x [N, C, L] and conditions {name: [N, ...]}; returns its average.

    Those of `valid` [N] are held out. The log has their loss, and that of a net that answers 0."""
    generator = torch.Generator().manual_seed(seed + RANK)
    train = (~valid).nonzero()[:, 0]
    held = valid.nonzero()[:, 0]
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    bf16 = x.is_cuda and torch.cuda.is_bf16_supported()

    def loss_of(net, among, n, p):
        chosen = among[torch.randint(len(among), (n,), generator=generator).to(x.device)]
        given = {name: value[chosen] for name, value in cond.items()}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return objective.loss(net, x[chosen], generator, **drop_conditions(given, generator, p))

    def learn(step):
        loss = loss_of(model, train, batch_size // WORLD, 0.1)
        loss.backward()
        with torch.no_grad():
            zero = loss_of(lambda x, t, **cond: 0 * x, held, 2, 0.0)
            return {"loss": loss, "of zero": zero, "held out": loss_of(net, held, 2, 0.0)}

    return fit("diffusion", net, learn, steps, path, lr, generator, (0.9, 0.99), settings)

# ----------------------------------------------------------------------
# 10. Listening and measuring: is it any good?
# ----------------------------------------------------------------------
# `evaluate` asks three questions, and puts the figures of real notes beside each answer.
#
#     As asked?       Share of notes within 50 cents of their pitch. Real notes through the codec
#                     are the ceiling: what the codec spoils, no latent can mend.
#     Like the data?  Frechet distance, by mean and deviation of each channel over a sound, to one
#                     half of the held-out ones (floor: the other half, in the row of the codec).
#                     Level, and harmonics to noise, in dB.
#     New?            Distance to the nearest training latents, over that of held-out ones: about 1
#                     is as new as those, far below 1 is a copy.
#
# Try: `python minidiff.py evaluate --run runs/plucks --steps 3`. Which figures get worse?

def frechet_distance(a, b):
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^1/2), of a [N, D] and b [N, D] ([15] eq. 6).

    What it costs to move the Gaussian fitted to a onto that of b. It falls with N, because means
    and covariances are estimates: compare at equal N. ValueError below two rows."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(a)} and {len(b)}")
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    c1, c2 = (torch.atleast_2d(torch.cov(rows.double().T)) for rows in (a, b))  # [D, D]
    cross = torch.linalg.eigvals(c1 @ c2).real.clamp_min(0).sqrt().sum()  # trace of the root
    return (means + c1.trace() + c2.trace() - 2 * cross).clamp_min(0).item()

def build_net(settings):
    """The network that a run's settings describe, with random weights."""
    channels = settings["channels"]
    if settings["net"] == "tutorial":
        return TutorialUNet(channels)
    if settings["condition"] == "control":              # curves say where in a sound we are
        return UNet1d(channels, 96, (1, 1, 2), controls=2)
    sizes = (128, 128, len(settings["sources"])) if settings["condition"] == "note" else ()
    return UNet1d(channels, 96, (1, 1, 2), label_sizes=sizes, window=settings["frames"])

class Run:
    """What training left in a folder: settings, objective, net and codec."""

    def __init__(self, folder, device="cpu"):
        self.folder = pathlib.Path(folder)
        self.device = device
        self.settings = load_checkpoint(self.folder / "model.pt")["settings"]
        self.objective = OBJECTIVES[self.settings["objective"]]
        self.net = self.average("model.pt", build_net(self.settings))
        if self.settings["codec"] == "music2latent":
            self.codec = Music2Latent(self.settings["seed"], device)
        else:
            self.codec = self.average("codec.pt", SnakeVAE(self.settings["sample_rate"]))

    def average(self, name, net):
        average = AveragedModel(net)
        average.load_state_dict(load_checkpoint(self.folder / name)["average"])
        return average.module.to(self.device).eval()

    @torch.no_grad()
    def decode(self, x):
        """Standardised latents [B, C, L] -> audio [B, T] on the CPU, a few at a time."""
        latents = x.cpu() * self.settings["std"] + self.settings["mean"]
        parts = [self.codec.decode(part.to(self.device)) for part in latents.split(16)]
        return torch.cat(parts).float().cpu()

def describe(audio, rate, pitches=None, controls=None, hop=None, real=None):
    """Figures of sounds [N, T], beside what was asked for, pitches [N] or controls [N, 2, L], and
    beside the `real` ones that they copy."""
    tracks = [periodicity(sound[None], rate, rate // 60, low=20.0) for sound in audio]
    pitch, r = (torch.cat(track) for track in zip(*tracks))  # [N, frames]
    figures = {"level_db": 10 * audio.square().mean(1).clamp_min(1e-12).log10().mean(),
               "harmonics_db": 10 * (r / (1 - r).clamp_min(1e-5)).log10()[pitch > 0].mean()}
    if pitches is not None:
        close = (note_pitch(pitch) - pitches).abs() < 0.5
        figures["pitch_accuracy"] = close.float().mean()
    if controls is not None:
        heard = measure_curves(audio, rate, hop)[:, :, :controls.shape[2]]
        both = torch.stack([heard[:, 0].flatten(), controls[:, 0].flatten()])
        close = (heard[:, 1] - controls[:, 1]).abs() < 0.5 / 12
        figures["envelope_correlation"] = torch.corrcoef(both)[0, 1]
        figures["voiced_within_50_cents"] = close[controls[:, 1] > -4.9].float().mean()
    if real is not None:
        T = min(audio.shape[1], real.shape[1])
        S_e, S_t = (stft(sounds[:, :T], 1024).abs() for sounds in (audio, real))
        floor = 1e-3 * S_t.amax((1, 2), keepdim=True) + 1e-9  # 60 dB below
        decibels = 20 * (S_e.maximum(floor) / S_t.maximum(floor)).log10()
        figures["spectral_distance_db"] = decibels.square().mean(1).sqrt().mean()
    return figures

@torch.no_grad()
def evaluate(run, scales=(1.0, 1.25, 2.0), sampler="heun", steps=9, seed=0):
    """Measure a Run: prints a row of figures for each kind of sound, writes evaluation.json.

    Kinds: real, codec (real through the codec), each guidance scale. Returns what it wrote, mostly
    {figure: {kind: value}}, and {name: audio [T]}: the first sounds, generated at scales[0]."""
    data = load_checkpoint(run.folder / "latents.pt")
    a, b = (data["x"][data[half]] for half in "ab")     # [N, C, L] each
    train = data["x"][~data["valid"]][:5000].flatten(1)
    pitches = data["labels"][data["b"], 0]
    cond = {name: value[data["b"]].to(run.device) for name, value in data["cond"].items()}
    wanted = cond["controls"].cpu() if "controls" in cond else None
    result = {"count": len(b), "seed": seed, "sampler": sampler, "steps": steps,
              "nfe": 2 * steps - 1 if sampler == "heun" else steps}

    def row(kind, audio, x):
        asked = pitches.min() >= 0 and (cond or x is b)     # a pitch was
        figures = describe(audio, run.codec.sample_rate, pitches if asked else None, wanted,
                           run.codec.hop, data["real"] if kind == "codec" else None)
        if kind != "real" and len(b) > 1:
            features = [torch.cat([z.mean(2), z.std(2)], dim=1) for z in (x, a)]
            figures["frechet"] = frechet_distance(*features)
        title = kind if x is b else f"w = {kind}"
        print(f"  {title:6}", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        for name, value in figures.items():
            if math.isfinite(value):                    # JSON has no NaN
                result.setdefault(name, {})[kind] = float(value)
        return audio

    sounds = {"real": row("real", data["real"], b), "codec": row("codec", run.decode(b), b)}
    for w in scales if cond else (1.0,):
        began = time.perf_counter()
        x = generate(GuidedNet(run.net, w), run.objective, b.shape, sampler, steps, seed,
                     device=run.device, **cond).cpu()
        audio = run.decode(x)
        result.setdefault("seconds_per_item", (time.perf_counter() - began) / len(b))
        near = [torch.cdist(z.flatten(1), train).amin(1).mean().item() for z in (x, b)]
        result.setdefault("nearest_ratio", near[0] / max(near[1], 1e-9))
        sounds.setdefault("generated", row(f"{w:g}", audio, x))
    print("{count} of each, {sampler} with {steps} steps: {seconds_per_item:.3f} s a sound, and "
          "{nearest_ratio:.2f} times as far from training as held-out sounds".format(**result))
    result["frechet_floor"] = result.get("frechet", {}).pop("codec", None)
    for kind in ("real", "codec"):
        result[f"pitch_accuracy_{kind}"] = result.get("pitch_accuracy", {}).pop(kind, None)
    (run.folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    return result, {f"{kind}_{i}": audio[i] for kind, audio in sounds.items()
                    for i in range(min(4, len(b)))}

PAGE = """<!doctype html><meta charset="utf-8"><title>minidiff</title><style>
body { font-family: sans-serif } figure { display: inline-block; width: 20rem; margin: 1ex }
audio, img { width: 100% } img { height: 10rem }</style>
<p>real: held out; codec: these through the codec; generated, sample: from noise. The pictures show
0 to 3000 Hz upwards; dark is loud.</p>
"""

def spectrogram_image(audio, rate, columns=320, top=3000):
    """Audio [T] as a bitmap in a data URI: 0 to `top` Hz upwards, white 80 dB below the loudest."""
    size = 2 ** round(math.log2(rate / 16))             # 1/16 s
    S = F.interpolate(stft(audio[None], size).abs()[:, :top * size // rate], columns)[0]
    grey = 255 / -80 * 20 * (S / S.max().clamp_min(1e-9)).clamp_min(1e-4).log10()
    pixels = grey.byte().repeat_interleave(3, dim=1).numpy().tobytes()  # the lowest row first
    head = struct.pack("<2s6I2H24x", b"BM", 54 + len(pixels), 0, 54, 40, columns, len(S), 1, 24)
    return "data:image/bmp;base64," + base64.b64encode(head + pixels).decode()

def write_sounds(folder, sounds, rate):
    """Write {name: audio [T]} as wav files, under new names, and add them to the folder's page."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "index.html", "a") as page:
        if page.tell() == 0:
            page.write(f"{PAGE}<h1>{html.escape(str(folder))}</h1>\n")
        for name, audio in sounds.items():
            path = folder / f"{name}.wav"
            take = 1
            while path.exists():
                take += 1
                path = folder / f"{name}_{take}.wav"
            peak = save_audio(path, audio, rate)
            heard = note_pitch(pitch_track(audio[None], rate, rate // 60, low=20.0)).item()
            print(f"{path}: heard MIDI pitch {heard:.2f}, peak {peak:.2f}")
            name = html.escape(path.name)
            page.write(f'<figure>{name}<audio controls src="{name}"></audio><img alt="{name}" '
                       f'src="{spectrogram_image(audio, rate)}"></figure>\n')
    print(f"listen to them at {folder / 'index.html'}")

# ----------------------------------------------------------------------
# 11. The command line
# ----------------------------------------------------------------------
# Settings travel in a run's checkpoints: `sample` and `evaluate` need no option to match them.
#
# Try: `python minidiff.py sample --run runs/plucks --pitch 60 --count 4 --cfg 0 --out w0`, then
# `--cfg 1 --out w1` and `--cfg 8 --out w8`. Sound i starts from the same noise in all three: what
# of it comes from the noise, what from the pitch, and what does too much guidance do?

class Parser(argparse.ArgumentParser):
    def error(self, message):                           # one line, without the usage
        self.exit(2, f"minidiff: {message} (see {self.prog} --help)\n")

def between(low, high, kind=float):
    """A type for argparse: a number from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return kind(text)
    return number

def build_parser():
    count = between(1, 10 ** 9, int)
    midi = between(0, 127, int)
    seconds = between(0.1, 600)

    def note(word):
        return None if word == "r" else midi(word)

    top = Parser(prog="minidiff.py", description=__doc__.splitlines()[0],
                 epilog="minidiff.py COMMAND --help lists the options of a command.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("toy", help="the whole idea in ten seconds")
    train = commands.add_parser("train", help="train a codec and a model")
    sample = commands.add_parser("sample", help="make sounds: sample --run runs/plucks --pitch 60")
    measure = commands.add_parser("evaluate", help="measure a run: evaluate --run runs/plucks")
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    for command in (train, sample, measure):
        add = command.add_argument
        add("--run", required=command != train, help="folder of the run")
        add("--device", default=str(gpu), help="(default: a GPU, if any)")
        add("--seed", type=int, default=None if command == train else 0, help="(default 0)")
    for command in (sample, measure):
        add = command.add_argument
        add("--sampler", choices=["euler", "heun", "dpmpp_3m_sde"], default="heun")
        add("--steps", type=count, default=9, help="of the sampler (default 9)")
    add = train.add_argument
    add("--data", help="plucks (default), melodies, nsynth (335 MB) or a folder")
    add("--seconds", type=seconds, help="of a sound (default: the data's, up to 4)")
    add("--codec", choices=["vae", "music2latent"], help="(default: vae for built-in data)")
    add("--net", choices=["unet", "tutorial"], help="(default unet)")
    add("--objective", choices=[*OBJECTIVES], help="(default rf)")
    add("--condition", choices=["note", "control", "none"], help="(default: what the data have)")
    add("--codec-steps", type=count, help="(default 3400; recordings want more)")
    add("--steps", type=count, help="of the model (default 1800; recordings want more)")
    add("--lr", type=between(0, 1), help="its highest rate (default 0.0025)")
    add("--adversarial-from", type=count, help="codec step at which the discriminator joins")
    add("--resume", action="store_true", help="go on with a run; its data may have moved")
    add = sample.add_argument
    add("--pitch", type=midi, nargs="+", action="extend", help="MIDI pitches")
    add("--melody", nargs="+", type=note, help="MIDI pitches, r for a rest; wants curves")
    add("--beat", type=seconds, default=0.5, help="seconds of each (default 0.5)")
    add("--count", type=count, default=1, help="sounds for each pitch (default 1)")
    add("--seconds", type=seconds, help="(default: as in training)")
    add("--cfg", type=float, default=1.25, help="guidance scale w (default 1.25)")
    add("--init-audio", help="a sound file to start from")
    add("--init-noise", type=float, help="its noise level t (default: sigma = alpha)")
    add("--keep", type=float, nargs=2, help="start and end of what stays of it, in seconds")
    add("--out", type=pathlib.Path, help="folder (default: samples in the run)")
    measure.add_argument("--cfg", type=float, nargs="+", default=[1.0, 1.25, 2.0],
                         help="(default 1 1.25 2)")
    return top

def prepare(s, folder):
    """The first half of `train`: codec.pt and latents.pt, by the settings s."""
    given = {"seconds": s.seconds} if s.seconds else {}
    if s.codec == "music2latent":
        given["sample_rate"] = Music2Latent.sample_rate
    if s.data in ("plucks", "melodies"):
        data = (Plucks if s.data == "plucks" else Melodies)(seed=s.seed, **given)
    else:
        data = AudioFolder(download_nsynth() if s.data == "nsynth" else s.data, **given)
    labelled = data.labels.max() >= 0
    best = "note" if labelled else "control" if s.data == "melodies" else "none"
    s.condition = "none" if s.net == "tutorial" else s.condition or best
    if s.condition == "note" and not labelled:
        raise ValueError("--condition note needs names such as guitar_acoustic_004-071-025.wav")
    s.sample_rate = data.sample_rate                    # codec.pt needs it
    if s.codec == "music2latent":
        codec = Music2Latent(s.seed, s.device)
    else:
        audio, read = read_sounds(data, (~data.valid).nonzero()[:, 0].tolist())
        if not read:
            raise ValueError(f"{s.data}: no sound to train on can be read")
        codec = train_codec(SnakeVAE(data.sample_rate).to(s.device), audio, s.codec_steps,
                            folder / "codec.pt", s.seed, settings=vars(s),
                            adversarial_from=s.adversarial_from or math.inf)
    encode_all(codec, data, folder / "latents.pt", s.condition, s.device)

def train_run(args):
    """train: a codec, latents, a diffusion model, figures and sounds; each where it is missing."""
    data = args.data or "plucks"
    folder = pathlib.Path(args.run or f"runs/{pathlib.Path(data).resolve().name}")
    made = [*folder.glob("model.pt"), *folder.glob("codec.pt")]
    if made and not args.resume:
        raise ValueError(f"{folder} holds a run: go on with --resume, or choose another --run")
    saved = load_checkpoint(made[0])["settings"] if made else {}
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("codec", "seconds", "seed", "net", "objective", "condition"):
        if made and given.get(name, saved[name]) != saved[name]:
            raise ValueError(f"{folder} has --{name} {saved[name]} for good; choose another --run")
    default = {"data": data, "codec": "vae" if data in ("plucks", "melodies") else "music2latent",
               "net": "unet", "objective": "rf", "codec_steps": 3400, "steps": 1800, "lr": 2.5e-3,
               "seed": 0}
    s = argparse.Namespace(**vars(args) | default | saved | given)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s.seed)
    if RANK == 0 and not (folder / "latents.pt").exists():
        prepare(s, folder)
    if WORLD > 1:                                       # the others wait for rank 0
        torch.distributed.init_process_group(timeout=datetime.timedelta(days=1))
    data = load_checkpoint(folder / "latents.pt")
    settings = vars(s) | data["facts"]
    torch.manual_seed(s.seed)
    net = build_net(settings).to(s.device)
    cond = {name: value.to(s.device) for name, value in data["cond"].items()}
    train_diffusion(net, OBJECTIVES[s.objective], data["x"].to(s.device), cond,
                    data["valid"].to(s.device), s.steps, folder / "model.pt", s.seed,
                    # A batch has about 2000 frames.
                    max(WORLD, 2000 // settings["frames"]), s.lr, settings)
    if RANK == 0:
        run = Run(folder, s.device)
        result, sounds = evaluate(run, seed=s.seed)
        write_sounds(folder / "samples", sounds, run.codec.sample_rate)
        in_tune = result["pitch_accuracy_codec"]        # None if there are no labels
        louder = result["level_db"]["codec"] - result["level_db"]["real"]
        weak = abs(louder) > 6 or in_tune is not None and in_tune < 0.9
        print("verdict: the codec is", "the weak part: start another --run with more --codec-steps"
              if weak else "good enough: if notes are bad, --resume with more --steps")

@torch.no_grad()
def sample_run(args):
    """sample: sounds from a trained run."""
    run = Run(args.run, args.device)
    settings = run.settings
    rate = run.codec.sample_rate / run.codec.hop        # frames per second
    for option, condition in (("pitch", "note"), ("melody", "control")):
        if getattr(args, option) and settings["condition"] != condition:
            raise ValueError(f"--{option} needs a run trained with --condition {condition}")
    if not args.init_audio and (args.keep or args.init_noise is not None):
        raise ValueError("--init-noise and --keep need --init-audio")
    pitches = [pitch for pitch in args.pitch or [-1] for _ in range(args.count)]
    frames = math.ceil(args.seconds * rate) if args.seconds else settings["frames"]
    init = keep = None
    cond = {}
    if settings["condition"] == "note":
        cond["labels"] = torch.tensor([[pitch, -1, -1] for pitch in pitches], device=args.device)
    if args.melody:
        played = load_checkpoint(run.folder / "latents.pt")["cond"]["controls"]
        curves = melody_curves(args.melody, args.beat * rate, played).to(args.device)
        cond["controls"] = curves.expand(len(pitches), -1, -1)
        frames = curves.shape[1]
    if args.init_audio:
        audio = load_audio(args.init_audio, run.codec.sample_rate)[None].to(args.device)
        latents = run.codec.encode(audio).cpu().expand(len(pitches), -1, -1)
        init = ((latents - settings["mean"]) / settings["std"]).to(args.device)
        frames = init.shape[2]
    if args.keep:
        when = torch.arange(frames, device=args.device) / rate
        keep = (when >= args.keep[0]) & (when < args.keep[1])
        if not keep.any():
            raise ValueError("--keep {:g} {:g} holds nothing of the sound".format(*args.keep))
    low, high = settings["pitches"]
    seconds = settings["frames"] / rate
    if args.pitch and not low <= min(pitches) <= max(pitches) <= high:
        print(f"note: the training had pitches from {low} to {high} only", file=sys.stderr)
    if frames > settings["frames"] and settings["condition"] != "control":
        print(f"note: the model has learnt sounds of {seconds:.1f} s only", file=sys.stderr)
    if args.init_noise == run.objective.t_max:
        print("note: at that --init-noise nothing of the sound is left", file=sys.stderr)
    x = generate(GuidedNet(run.net, args.cfg), run.objective,
                 (len(pitches), settings["channels"], frames), args.sampler, args.steps, args.seed,
                 init=init, init_noise=args.init_noise, keep=keep, device=args.device, **cond)
    sounds = {}
    for i, (pitch, audio) in enumerate(zip(pitches, run.decode(x))):
        sounds[f"sample_{args.seed + i}_pitch_{pitch}".removesuffix("_pitch_-1")] = audio
    write_sounds(args.out or run.folder / "samples", sounds, run.codec.sample_rate)

def main(argv=None):
    """Run a command; returns the exit status: 0, 2 for a mistake, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "toy":
            toy()
            return 0
        if args.device == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun numbers them
        try:
            torch.zeros(1, device=args.device).tolist()
        except Exception:                               # some libraries dump a page of text
            raise ValueError(f"--device {args.device} cannot be used on this machine") from None
        if args.command == "train":
            train_run(args)
        elif args.command == "sample":
            sample_run(args)
        else:
            evaluate(Run(args.run, args.device), args.cfg, args.sampler, args.steps, args.seed)
    except KeyboardInterrupt:
        print("\nminidiff: interrupted; train goes on with --resume", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"minidiff: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
