"""minidiff: audio latent diffusion in one file that you can read, run, and take apart.

A codec turns a second of sound into 63 short vectors, its latents (chapters 5 to 7). A network
learns to turn noise into such latents (chapters 1 to 4). Together they are an instrument: you ask
for a pitch, and noise becomes a note that was never played. No definition uses a name that stands
below it, so read from the top. To copy a piece, see the end of its docstring: "Lifts out with"
names what must come along. Where that is missing, the piece is the program's own.

    python minidiff.py train                                   eight minutes on two CPU cores
    python minidiff.py sample --run runs/plucks --pitch 60     play a note
    python minidiff.py evaluate --run runs/plucks              is it any good?

The alphabet, the same on every page
    B batch    T audio samples    C latent channels    L latent frames    D features    K labels
    Brackets hold axes. Audio is [B, T], mono, float32 in [-1, 1]; latents are [B, C, L]; times and
    noise levels are [B].
    x_0 is data, noise is N(0, I), and between them lies x_t = alpha(t) x_0 + sigma(t) noise.
    t = 0 is data, the largest t is noise; samplers walk from there down to 0.
    velocity is dx/dt, and t grows towards the noise: velocity points away from the data.
    w is the guidance scale in u + w (c - u): w = 1 is no guidance, w = 0 ignores the condition.
    What is not given is -1 where it is an integer (labels), NaN where it is a curve (controls).
    A pitch is a MIDI number: 60 is middle C, 69 is A at 440 Hz, 1 is a semitone, 0.01 a cent.

The chapters
    1. Noising and objectives: what does the network learn?
    2. Guidance: how do we ask for a note?
    3. Samplers: how few questions does it take to get from noise to a note?
    4. The U-Net: what kind of network can answer them?
    5. Sound: what is a note, and how do we hear that it is in tune?
    6. The Snake VAE: how does a second of sound become 63 vectors?
    7. What the VAE is trained on: when are two sounds the same?
    8. Data: where do the notes come from?
    9. Training: how do we get good weights, and never lose them?
    10. Listening and measuring: is it any good?
    11. The command line: python minidiff.py --help

References, cited by number (arXiv)
     [1] Rectified flow            2209.03003    [2] Logit-normal times        2403.03206
     [3] EDM                       2206.00364    [4] Classifier-free guidance  2207.12598
     [5] Guidance rescaling        2305.08891    [6] Guidance interval         2404.07724
     [7] DPM-Solver++              2211.01095    [8] DITTO                     2401.12179
     [9] Diff-A-Riff               2406.08384   [10] Stable Audio Open         2407.14358
    [11] Snake                     2006.08195   [12] EnCodec                   2210.13438
    [13] VAE                       1312.6114    [14] NSynth                    1704.01279
    [15] Music2Latent              2408.06500   [16] Frechet distance          1706.08500
    [17] v-prediction              2202.00512   [18] Score SDEs                2011.13456
    [19] Attention                 1706.03762   [20] Classifier guidance       2105.05233
    [21] EDM2                      2312.02696   [22] Parallel WaveGAN          1910.11480
seeds/000 to 002: the tutorial that this grew from; 003: the lecture on Stable Audio, with its
hands-on; 004: the violin synthesiser.
"""
import argparse
import base64
import contextlib
import copy
import ctypes
import difflib
import hashlib
import html
import http.client
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import struct
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# 1. Noising and objectives: what does the network learn?
# --------------------------------------------------------------------------------------------------
# Take a clean latent x_0, draw noise, draw a time t, and mix: x_t = alpha(t) x_0 + sigma(t) noise.
# Show x_t and t to a network and ask for some y that depends on x_0 and noise. It cannot know y,
# because many pairs of x_0 and noise give the same x_t. Over those pairs, the squared error of an
# answer n is
#
#     E[(n - y)^2 | x_t]  =  (n - E[y | x_t])^2  +  E[(y - E[y | x_t])^2 | x_t],
#
# and n changes the first part only. So the best answer is the conditional expectation E[y | x_t].
# It is linear in y: whether we ask for x_0, for the noise or for a mixture a x_0 + b noise, one
# answer and x_t give all the others. These four say the same (' is d/dt, p_t the density of x_t):
#
#     denoiser  D = E[x_0 | x_t]               what x_0 was, on average
#     noise     (x_t - alpha D) / sigma        what was added, on average
#     velocity  alpha' D + sigma' noise        the mean arrow dx/dt through x_t
#     score     (alpha D - x_t) / sigma^2      the gradient of ln p_t: towards likelier x_t
#
# (The score, because x_t given x_0 is N(alpha x_0, sigma^2), whose logarithm has the gradient
# (alpha x_0 - x_t) / sigma^2; the gradient of ln p_t is its mean over the x_0 that fit.)
#
# Generating takes the velocity. One pair moves along dx_t/dt = alpha' x_0 + sigma' noise. Paths of
# many pairs cross in a point; v(x, t) = E[dx_t/dt | x_t = x] is their mean arrow there. For any f,
#
#     d/dt E[f(x_t)]  =  E[f'(x_t) dx_t/dt]  =  E[f'(x_t) v(x_t, t)]
#
# (the last step takes the mean at each x_t first). Points that move by v obey the same equation,
# so they have the density p_t at every t. Begun as noise and led back to t = 0, they are data
# ([1] theorem 3.3). Each training pair shows one arrow; regression finds their mean, which is v.
#
# Rectified flow is short enough to stand here whole, a step of training and then one of sampling:
#
#     x_t = (1 - t) x_0 + t noise,  t = sigmoid(N(0, 1));   loss = |net(x_t, t) - (x_0 - noise)|^2
#     x <- x + net(x, t)/steps,  for t = 1, 1 - 1/steps, ..., 1/steps;   x is noise at first
#
#                     alpha(t)        sigma(t)        y, the target               t goes from
#     RectifiedFlow   1 - t           t               x_0 - noise = -dx_t/dt      0 to 1
#     VPDiffusion     cos(angle(t))   sin(angle(t))   alpha noise - sigma x_0     0 to 1
#     EDM             1               t               a x_0 + b noise, see there  0.002 to 80
#
# The three are one. x_t / alpha = x_0 + (sigma/alpha) noise is EDM's x_t at t = sigma/alpha. So
# one ideal denoiser serves all, after a change of scale and of clock (`time_at`). The README says
# which of these others call v, and with which sign.
#
# Try: `python minidiff.py train --objective edm --run runs/edm`. In the README 182 of
# EDM's 185 notes are in tune at w = 1, and all of rectified flow's.


def expand(t, x):
    """t, [B] or a float, in x's dtype as [B, 1, ...] for x [B, ...]. Lifts out with: nothing."""
    return torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def standard_normal(shape, generator=None, device=None):
    """N(0, 1) numbers of `shape` [B, ...], float32, on `device`, or else where they are drawn.

    generator: None (torch's global one), a torch.Generator, or a list of B (else ValueError): item
    i is then the same in any batch, and on any device if drawn on the CPU. Lifts out with: nothing.
    """
    if not isinstance(generator, (list, tuple)):
        where = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=where).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"got {len(generator)} generators, expected one per item: {shape[0]}")
    return torch.stack([standard_normal(shape[1:], g) for g in generator]).to(device)


def linear_times(steps, start=1.0):
    """Even times from `start` to 0: [steps + 1], float64 on the CPU. Lifts out with: nothing."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)


def noise_ramp(steps, sigma_min, sigma_max, rho):
    """Even numbers from 1 to 0, [steps]; ValueError for no range. Lifts out with: nothing."""
    if steps < 1 or not 0 < sigma_min <= sigma_max or rho <= 0:
        raise ValueError("need at least one step, 0 < sigma_min <= sigma_max and rho > 0, "
                         f"got {steps=}, {sigma_min=:g}, {sigma_max=:g}, {rho=:g}")
    return torch.linspace(1.0, 0.0, steps, dtype=torch.float64)


def karras_times(steps, sigma_min, sigma_max, rho=7.0):
    """Levels even in sigma^(1/rho), then 0: [steps + 1] ([3] eq. 5). Lifts out with: noise_ramp."""
    ramp = noise_ramp(steps, sigma_min, sigma_max, rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return F.pad((low + ramp * (high - low)) ** rho, (0, 1))


def polyexponential_times(steps, sigma_min, sigma_max, rho=1.0):
    """Even in ln sigma if rho = 1, then 0: [steps + 1], as in [10]. Lifts out with: noise_ramp."""
    ramp = noise_ramp(steps, sigma_min, sigma_max, rho)
    return F.pad(sigma_min * (sigma_max / sigma_min) ** ramp ** rho, (0, 1))


class NoisingProcess:
    """What the three processes share: how to noise, what to train on, how to read an answer.

    x, noise, x_t: [B, ...]; t: [B] or a float; net: (x, t, **cond) -> [B, ...], cond passed on. A
    process adds alpha(t); slopes(t), the derivatives alpha' and sigma'; answer(t), the a and b of
    its target a x_0 + b noise; time_at(ratio), the t at which sigma/alpha is ratio; and squash,
    which makes training times of normal numbers.
    Lifts out with: expand, linear_times, standard_normal.
    """
    t_max = 1.0
    sigma = lambda self, t: t
    start = lambda self, noise: self.t_max * noise                 # x_t where the data are lost
    times = lambda self, steps, start=1.0: linear_times(steps, start)
    ask = lambda self, x_t, t: (x_t, t)                            # what the network is shown
    denoise = lambda self, net, x_t, t, **cond: self.solve(net, x_t, t, **cond)[0]       # x_0

    def __init__(self, p_mean=0.0, p_std=1.0):
        self.p_mean, self.p_std = p_mean, p_std

    def sample_times(self, n, generator=None):
        return self.squash(self.p_mean + self.p_std * standard_normal((n,), generator))       # [n]

    def add_noise(self, x, noise, t):
        t = expand(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def target(self, x, noise, t):
        a, b = self.answer(expand(t, x))
        return a * x + b * noise

    def loss(self, net, x, generator=None, reduce=True, **cond):
        """Squared error of the answer at one time and one noise per item: scalar, or [B]."""
        t = self.sample_times(len(x), generator).to(x)
        noise = standard_normal(x.shape, generator, x.device).to(x)
        return self.loss_at(net, x, noise, t, reduce, **cond)

    def loss_at(self, net, x, noise, t, reduce=True, **cond):
        """The same at given noise and times [B]: for validation."""
        answer = net(*self.ask(self.add_noise(x, noise, t), t), **cond)                  # [B, ...]
        error = (answer - self.target(x, noise, t)).square().flatten(1).mean(1)
        return error.mean() if reduce else error

    def solve(self, net, x_t, t, **cond):
        """x_0 and noise from x_t = alpha x_0 + sigma noise and answer = a x_0 + b noise."""
        answer, t = net(*self.ask(x_t, t), **cond), expand(t, x_t)
        alpha, sigma, (a, b) = self.alpha(t), self.sigma(t), self.answer(t)
        determinant = alpha * b - sigma * a      # -1 (flow), 1 (VP), -1/(c_in sd) (EDM): never 0
        return (b * x_t - sigma * answer) / determinant, (alpha * answer - a * x_t) / determinant

    def velocity(self, net, x_t, t, **cond):
        (x_0, noise), slopes = self.solve(net, x_t, t, **cond), self.slopes(expand(t, x_t))
        return slopes[0] * x_0 + slopes[1] * noise

    def velocity_to(self, x_0, x_t, t):
        """The velocity if the denoiser's answer is x_0, at t > 0; the noise is what is left."""
        t = expand(t, x_t)
        noise, slopes = (x_t - self.alpha(t) * x_0) / self.sigma(t), self.slopes(t)
        return slopes[0] * x_0 + slopes[1] * noise


class RectifiedFlow(NoisingProcess):
    """Straight lines, alpha = 1 - t, sigma = t; the network answers x_0 - noise = -dx/dt ([1]).

    Training times are logit-normal, sigmoid(N(p_mean, p_std^2)): mostly the middle, where x_0 is
    neither lost nor plain to see ([2] section 3.1). A network that answers 0 has loss 1 + 1 = 2 on
    data of variance 1. Lifts out with: NoisingProcess, expand, linear_times, standard_normal.
    """
    squash = torch.sigmoid             # a function of C, which does not get self when it is called
    alpha = lambda self, t: 1 - t
    slopes = lambda self, t: (-1.0, 1.0)
    answer = lambda self, t: (1.0, -1.0)
    time_at = lambda self, ratio: ratio / (1 + ratio)


class VPDiffusion(NoisingProcess):
    """Variance preserving: alpha^2 + sigma^2 = 1, a walk on a circle ([17] appendix D, seeds/003).

    alpha = cos(angle), sigma = sin(angle), angle = pi/2 (t + s)/(1 + s), t uniform in [0, 1]. By
    the angle, x_t = alpha x_0 + sigma noise has the derivative v = alpha noise - sigma x_0, which
    the network answers; dx/dt is v times the angle's speed. A network that answers 0 has loss 1 on
    data of variance 1. s keeps sigma(0) above 0: samples end there, with noise of 0.012.
    Lifts out with: NoisingProcess, expand, linear_times, standard_normal.
    """
    squash = torch.special.ndtr        # a normal number put through its own distribution: uniform
    alpha = lambda self, t: torch.sin(self.speed * (1 - t))        # cos(angle), exactly 0 at t = 1
    sigma = lambda self, t: torch.sin(self.speed * (t + self.s))
    slopes = lambda self, t: (-self.speed * self.sigma(t), self.speed * self.alpha(t))
    answer = lambda self, t: (-self.sigma(t), self.alpha(t))
    time_at = lambda self, ratio: (ratio.atan() / self.speed - self.s).clamp_min(0.0)    # t >= 0

    def __init__(self, s=0.008):
        super().__init__()
        self.s, self.speed = s, math.pi / 2 / (1 + s)              # speed = d angle / dt


class EDM(NoisingProcess):
    """Variance exploding: alpha = 1, sigma = t, so that t *is* the noise level ([3] Table 1).

    D = c_skip x_t + c_out net(c_in x_t, c_noise) ([3] eq. 7). Three wishes fix the coefficients
    ([3] appendix B.6), if x_0 has variance sd^2, sd = sigma_data, and so x_t has sd^2 + t^2:
    1. The network sees variance 1: c_in = 1/sqrt(sd^2 + t^2).
    2. It should answer (x_0 - c_skip x_t)/c_out = ((1 - c_skip) x_0 - c_skip t noise)/c_out. This
       has variance 1 too if c_out^2 = (1 - c_skip)^2 sd^2 + c_skip^2 t^2.
    3. Its errors reach D c_out-fold, so c_out shall be least. The derivative by c_skip is 0 at
       c_skip = sd^2/(sd^2 + t^2); then c_out = sd t/sqrt(sd^2 + t^2).
    Put in, 2 is c_in (t/sd) x_0 - c_in sd noise: the a and b of `answer`. [3] weighs D's squared
    error by 1/c_out^2, which makes it the answer's own: our loss, 1 if the network answers 0.
    Levels are log-normal, exp(N(p_mean, p_std^2)). For sd = 1 it is VPDiffusion, its answer -v.
    Lifts out with: NoisingProcess, expand, karras_times, linear_times, noise_ramp, standard_normal.
    """
    squash = torch.exp
    alpha = lambda self, t: torch.ones_like(t)
    slopes = lambda self, t: (0.0, 1.0)
    time_at = lambda self, ratio: ratio

    def __init__(self, sigma_data=1.0, p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0,
                 rho=7.0):
        super().__init__(p_mean, p_std)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.t_max, self.rho = sigma_max, rho

    def times(self, steps, start=None):
        start = self.sigma_max if start is None else start
        return karras_times(steps, min(self.sigma_min, start), start, self.rho)

    def preconditioning(self, sigma):
        """c_skip, c_out, c_in, c_noise at noise levels sigma > 0, each of its shape."""
        total = sigma ** 2 + self.sigma_data ** 2
        return (self.sigma_data ** 2 / total, sigma * self.sigma_data / total.sqrt(),
                1 / total.sqrt(), sigma.log() / 4)                 # 4: by experiment, [3] Table 1

    def ask(self, x_t, t):
        return self.preconditioning(expand(t, x_t))[2] * x_t, self.preconditioning(t)[-1]

    def answer(self, t):
        c_in = self.preconditioning(t)[2]
        return c_in * t / self.sigma_data, -c_in * self.sigma_data


# --------------------------------------------------------------------------------------------------
# 2. Guidance: how do we ask for a note?
# --------------------------------------------------------------------------------------------------
# A condition c (pitch 60, say) is one more argument of the network. In training it is withheld now
# and then, so that one network knows both p(x | c) and p(x). By Bayes their ratio is a classifier,
# p(c | x) ~ p(x | c) / p(x), that nobody had to train. To hear more of c, take its power w:
#
#     p_w(x | c)  ~  p(x) p(c | x)^w  ~  p(x)^(1 - w) p(x | c)^w.
#
# A product of densities is a sum of logarithms, so the scores, their gradients, add up:
#
#     score_w  =  (1 - w) score_u + w score_c  =  score_u + w (score_c - score_u),
#
# u for unconditional. A network's answer is a multiple of the score plus a multiple of x_t. The
# second is common to c and u, and (1 - w) + w = 1 of it is left. So answers mix as scores do.
# w = 1 is the network as it is; w > 1 asks for notes that are *more clearly* pitch 60 than the
# data are. In the lecture's (1 - gamma) u + gamma c, gamma is w; [4] counts from w = 1 on.
#
# The power is right at t = 0 only: a power of noised densities is not a noised power. With large w
# the notes get loud and alike. `rescale` gives the loudness back [5]; `interval` guides only in the
# middle of the way, where it helps most [6].
#
# Try: `python minidiff.py sample --run runs/plucks --pitch 43 60`, with `--cfg 1` and `--cfg 3`.
# More is not simply better: in the README all notes are in tune with either, but the distance to
# real notes (chapter 10) goes from 0.204 to 1.208. At the default, w = 2, it is 0.640. A network
# that has learnt less may come nearer with w = 2 than with w = 1, as one in the README did.


def guide(conditional, unconditional, scale, rescale=0.0):
    """u + w (c - u) of conditional c and unconditional u [B, ...]; scale w: a float or [B, 1, ...].

    rescale phi in [0, 1] mixes in the result at c's deviation, taken per item over all other axes:
    the gain in loudness goes ([5] section 3.4). Lifts out with: nothing.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    wanted, got = (z.std(axes, correction=0, keepdim=True) for z in (conditional, guided))
    # A constant item has no loudness to give back, and 0/0 would be NaN: it stays as it is.
    ratio = wanted.masked_fill(got == 0, 1) / got.masked_fill(got == 0, 1)
    return guided * (1 - rescale + rescale * ratio)


class GuidedNet:
    """A network with guidance inside, called as the plain one, so that objectives do not notice.

    net: (x [B, ...], t [B], **cond) -> [B, ...]; conditions are tensors [B, ...] or None. u gets -1
    for integers and NaN for curves, or what the dict `negative` says: "not like this". interval:
    None or (low, high) in the t that the network sees; outside it w is 1. c and u are one batch of
    2B; w = 1 and w = 0 need one of B. Lifts out with: expand, guide.
    """

    def __init__(self, net, scale, rescale=0.0, interval=None, negative=None):
        self.net, self.scale, self.rescale = net, scale, rescale
        self.interval, self.negative = interval, negative or {}

    def __call__(self, x, t, **cond):
        cond = {k: v for k, v in cond.items() if v is not None}
        blank = {k: torch.full_like(v, math.nan if v.is_floating_point() else -1)
                 for k, v in (self.negative | cond).items()}
        given, withheld = blank | cond, blank | self.negative      # the right side wins
        low, high = self.interval or (-math.inf, math.inf)
        inside = (t >= low) & (t <= high)                                                # [B]
        if not blank or self.scale == 1 or self.interval and not inside.any():
            return self.net(x, t, **cond)
        if self.scale == 0 and not self.interval:
            return self.net(x, t, **withheld)
        both = {k: torch.cat([given[k], withheld[k]]) for k in blank}                    # [2B, ...]
        c, u = self.net(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return guide(c, u, expand(torch.where(inside, self.scale, 1.0), x), self.rescale)


def classifier_guidance(objective, denoise, log_likelihood):
    """Steer by a classifier: D + (sigma^2 / alpha) d log p(y | x_0 = D) / dx_t ([20] section 4.2).

    Bayes adds that gradient to the score, and D = (x_t + sigma^2 score)/alpha. denoise: (x_t, t) ->
    x_0 [B, ...]; log_likelihood: (x_0, t) -> [B], less sure while t is large. Returns a denoise;
    `velocity_to` makes a velocity of it. Lifts out with: expand.
    """
    def guided(x_t, t):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            x_0 = denoise(x, t)
            gradient, = torch.autograd.grad(log_likelihood(x_0, t).sum(), x)
        alpha, sigma = objective.alpha(expand(t, x_t)), objective.sigma(expand(t, x_t))
        push = torch.where(alpha > 0, sigma ** 2 / alpha * gradient, 0.0)     # alpha = 0: all noise
        return x_0.detach() + push
    return guided


# --------------------------------------------------------------------------------------------------
# 3. Samplers: how few questions does it take to get from noise to a note?
# --------------------------------------------------------------------------------------------------
# Chapter 1 gave us velocity(x, t) = dx/dt. A sampler starts at noise and follows it down to t = 0:
#
#     x(0) = x(t_max) + integral of velocity(x(t), t) dt   from t_max to 0.
#
# So it solves an ordinary differential equation (ODE), and need not know what diffusion is. It goes
# down a list of times; h = t_next - t is negative. Each look at the arrow is one pass through the
# network, one evaluation, and nothing else takes time. Euler looks once per step. Heun looks again
# where Euler landed and takes the mean: half the step, a quarter of the error.
#
# dpmpp_3m_sde can add fresh noise on the way. Noise of variance g^2 |h| in each step spreads a
# density: probability flows from dense to thin places as -(g^2/2) grad p (Fick's law). That is p
# times a velocity of -(g^2/2) score. Adding (g^2/2) score |h| to x undoes it, and the two together
# leave every p_t as it was, while an error made early is forgotten. The lecture writes both as an
# SDE: dX = f dt + g dB from data to noise, back dx = (f - g^2 score) dt + g dB~, where B is a walk
# of random steps N(0, dt). Its ODE is velocity = f - (g^2/2) score ([18] eq. 6 and 13). eta = 0 is
# the ODE, eta = 1 the SDE.
#
# Try: `python minidiff.py sample --run runs/plucks --pitch 60 --sampler heun --steps 4`, which is 7
# evaluations. In the README all such notes are in tune, as they are after 16 steps of Euler.


def euler(velocity, x, times, callback=None):
    """Follow dx/dt = velocity(x, t) along falling `times` by Euler's rule, x <- x + h velocity.

    velocity: (x [B, ...], t [B]) -> [B, ...]; times: [n + 1]; callback(i, t, x) comes before each
    step. n evaluations, error of order h. Lifts out with: nothing.
    """
    for i, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        if callback:
            callback(i, t, x)
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))                     # [B, ...]
    return x


def heun(velocity, x, times, callback=None):
    """Follow dx/dt = velocity(x, t) along falling `times` with Heun's second-order rule.

    x' = x + h d,   x <- x + h (d + d') / 2,   d = velocity(x, t),   d' = velocity(x', t + h)
    ([3] Algorithm 1). x [B, ...] and the rest as for euler, the last time 0. 2n - 1 evaluations,
    error of order h^2. Lifts out with: nothing.
    """
    for i, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        if callback:
            callback(i, t, x)
        h, d = t_next - t, velocity(x, x.new_full((len(x),), t))                         # [B, ...]
        x_euler = x + h * d
        if t_next == 0:
            # Where alpha = 1 or 1 - t and sigma = t, the velocity is (x - D)/t. With h = -t Euler
            # lands on D, the estimate of x_0 itself. A second look would ask for 0/0 at t = 0.
            return x_euler
        x = x + h * (d + velocity(x_euler, x.new_full((len(x),), t_next))) / 2
    return x


def dpmpp_3m_sde(denoise, x, times, eta=1.0, alpha=torch.ones_like, sigma=lambda t: t,
                 generator=None, callback=None):
    """DPM-Solver++(3M) SDE: third order from one evaluation per step, with fresh noise if eta > 0.

    In lambda = ln(alpha / sigma) the equation is linear but for D, and its solution over a step of
    h = lambda_next - lambda is exact up to how D moves ([7] eq. 8; c = 1 + eta, k = c h):
        x <- sigma_next/sigma e^(-eta h) x + sigma_next sqrt(1 - e^(-2 eta h)) noise
             + alpha_next drift,     drift = c integral_0^h e^(-c (h - u)) D(u) du.
    Put D(u) = D + D' u + D'' u^2/2 in and integrate by parts, once and twice:
        drift = (1 - e^-k) D + h phi_2 D' - h^2 phi_3 D'',
        phi_2 = 1 - (1 - e^-k)/k,   phi_3 = phi_2/k - 1/2.
    D' and D'' come from the parabola through the last three D. With d2 = h^2 D''/2 the last term is
    -2 phi_3 d2; published codes carry -phi_3 d2, which leaves them at second order. A parabola
    carried far goes wild: steps want like sizes in lambda, as the polyexponential grid has them.

    denoise: (x [B, ...], t [B]) -> x_0; times: [n + 1]; alpha, sigma: callables of t; generator as
    for standard_normal. n evaluations. Where alpha = 0 (lambda is minus infinity) the step takes
    its limit; where sigma_next = 0 it lands on alpha_next D. Lifts out with: standard_normal.
    """
    alphas, sigmas, times = alpha(times).tolist(), sigma(times).tolist(), times.tolist()
    lam = [math.log(a / s) if a > 0 < s else math.copysign(math.inf, a - s)
           for a, s in zip(alphas, sigmas)]
    past = []                                                     # (lambda, D), newest first
    for i, t in enumerate(times[:-1]):
        if callback:
            callback(i, t, x)
        if lam[i] == lam[i + 1]:
            continue                                              # no way to go, and h = 0 below
        D, h = denoise(x, x.new_full((len(x),), t)), lam[i + 1] - lam[i]                 # [B, ...]
        k = (1 + eta) * h
        drift = -math.expm1(-k) * D
        past = [(lam[i], D), *past[:2]] if math.isfinite(lam[i]) else []
        if math.isfinite(h) and len(past) > 1:
            (l0, _), (l1, D1), *older = past
            slope, bend = (D - D1) / (l0 - l1), 0.0                # D' and D'' from two D
            for l2, D2 in older:                                   # the same from three
                bend = 2 * (slope - (D1 - D2) / (l1 - l2)) / (l0 - l2)
                slope = slope + bend * (l0 - l1) / 2
            phi_2 = 1 + math.expm1(-k) / k
            drift = drift + h * phi_2 * slope - h ** 2 * (phi_2 / k - 1 / 2) * bend
        stay = math.exp(-eta * h) if eta else 1.0                 # e^(-0 infinity) is 1 here
        x = sigmas[i + 1] / sigmas[i] * stay * x + alphas[i + 1] * drift
        if eta and sigmas[i + 1] > 0:
            noise = standard_normal(x.shape, generator, x.device).to(x)
            x = x + sigmas[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * noise
    return x


def optimise_noise(sample, noise, loss, steps, lr):
    """DITTO: the noise [B, ...] whose sample has the smallest loss, by Adam through the sampler.

    A sampler is differentiable, so one may ask which noise would have given the wanted sound.
    sample: noise [B, ...] -> x [B, ...]; loss: x -> scalar ([8] section 3). Returns the best noise
    seen. With torch.utils.checkpoint around the network, as in `generate`, memory holds the
    activations of one step at a time. Lifts out with: nothing.
    """
    noise = noise.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([noise], lr)
    best, least = noise.detach().clone(), math.inf
    for _ in range(steps):
        value = loss(sample(noise))
        if value.item() < least:
            best, least = noise.detach().clone(), value.item()
        # Not value.backward(), which would leave gradients in the model too.
        noise.grad, = torch.autograd.grad(value, noise)
        optimiser.step()
    return best


# --------------------------------------------------------------------------------------------------
# 4. The U-Net: what kind of network can answer them?
# --------------------------------------------------------------------------------------------------
# The question is x_t [B, C, L] and t, the answer has the same shape as x_t. Fine noise is judged by
# looking close, a pitch by looking at the whole note; so the network looks at several resolutions:
# down (halve L, see further), then up again, where each level gets the detail of the way down
# through a skip connection. That is a U-Net. `TutorialUNet` is the idea at its barest, as the first
# of the seeds has it. `UNet1d` is Diff-A-Riff's [9] in its essence, and adds five things:
#
#     time in every block  the same x_t asks different things at t = 0.1 and at 0.9: each block's
#                          normalised features are scaled and shifted by a function of t and labels
#     residuals            a block answers x + f(x): with f small it does no harm, and gradients
#                          pass it unchanged, so that many blocks still train in minutes
#     norm                 features of size 1, whatever the level of the noise; frame by frame, so
#                          that a long sound is treated as a short one is
#     attention            at the coarse levels each frame may look at frames far away
#     position             each frame is told how many frames are before it. Convolutions and
#                          attention do not know: near t = 1, where x_t says little, they would
#                          answer the attack of a note and its end alike, with their mean
#
# Try: `python minidiff.py train --without time`, and then norm, residuals and so on, each with a
# --run of its own. The README shows what each was worth within the same seconds.


class TutorialUNet(nn.Module):
    """The simplest U-Net that works: stride-2 convolutions, ReLU, skips by addition (seeds/000).

    The raw number t enters once, at the bottom. With the 64 channels of Music2Latent it has the
    tutorial's 35,207,296 parameters. L may be any length: padded with zeros inside and cropped
    again. It takes no conditions, and says so. Lifts out with: nothing.
    """

    def __init__(self, channels, width=128, depth=5):
        super().__init__()
        widths = [channels] + [width * 2 ** i for i in range(depth)]
        pairs, halve = list(zip(widths, widths[1:])), dict(kernel_size=4, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv1d(a, b, **halve) for a, b in pairs)
        self.middle = nn.Conv1d(widths[-1], widths[-1], kernel_size=3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, widths[-1]))
        self.up = nn.ModuleList(nn.ConvTranspose1d(b, a, **halve) for a, b in reversed(pairs))
        self.exit = nn.Conv1d(channels, channels, 1)

    def forward(self, x, t, **cond):
        """x [B, C, L], t [B] -> [B, C, L]. Raises ValueError naming any condition that is given."""
        if given := [name for name, value in cond.items() if value is not None]:
            raise ValueError(f"TutorialUNet takes no conditions, got {', '.join(given)}")
        h, skips = F.pad(x, (0, -x.shape[-1] % 2 ** len(self.down))), []
        for conv in self.down:
            skips.append(h)
            h = conv(h).relu()                                             # [B, 2D, L/2]
        h = self.middle(h).relu() + self.time_mlp(t[:, None])[..., None]
        for conv in self.up:
            h = conv(h) + skips.pop()                                      # [B, D/2, 2L]
            h = h.relu() if skips else h
        return self.exit(h)[..., :x.shape[-1]]


def time_embedding(t, dim, longest=10_000):
    """Sines and cosines of 1000 t, periods 2 pi to 2 pi `longest` ([19] 3.5): t [B] -> [B, dim].

    The published periods were made for t = 0, 1, 2, ..., 1000. With t in [0, 1] nearly all of them
    would stand still, and the network would hardly see the time. Lifts out with: nothing.
    """
    k, n = torch.arange(dim // 2, device=t.device), dim // 2
    angles = 1000 * t.float()[:, None] * torch.exp(-math.log(longest) * k / n)  # 1000: see above
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FrameConv(nn.Conv2d):
    """A convolution over frames whose features lie side by side: [B, L, D_in] -> [B, L', D_out].

    It is nn.Conv1d in another order of memory, the one in which a product or a norm over a frame's
    features reads what lies together. Lifts out with: nothing.
    """

    def __init__(self, inputs, outputs, kernel_size=3, stride=1, padding=1):
        super().__init__(inputs, outputs, (1, kernel_size), (1, stride), (0, padding))

    def forward(self, x):
        return super().forward(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)


class ResidualBlock(nn.Module):
    """x [B, L, D_in] + f(x, e [B, E]) -> [B, L, D_out], scaled by e.

    Its norm sees one frame at a time. One over all frames, as networks for images have it, makes a
    frame depend on how many others there are: trained on windows of 32 frames and asked for a scale
    of 256 (the test with the MIDI scale, on the README's machine C), such a network was up to 2.2
    semitones off, this one 0.2. Lifts out with: FrameConv.
    """

    def __init__(self, inputs, outputs, embedding):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(outputs)
        self.conv1, self.conv2 = FrameConv(inputs, outputs), FrameConv(outputs, outputs)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))                              # [B, L, D_out]
        scale, shift = self.modulate(F.silu(e))[:, None].chunk(2, dim=2)   # [B, 1, D_out] each
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class SelfAttention(nn.Module):
    """x + attention over frames ([19] 3.2): [B, L, D] -> [B, L, D].

    In more than three spans of frames, each sees its own span and the two beside it, and work grows
    as L, not as L^2. A window of 8 s, as in training, is one span. Lifts out with: nothing.
    """

    def __init__(self, width, heads=4, span=256):
        super().__init__()
        self.heads, self.span, self.norm = heads, span, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)    # 3: q, k and v

    def forward(self, x):
        L, span, mask = x.shape[1], self.span, None
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))  # [B, L, 3, heads, D/heads]
        q, k, v = qkv.transpose(1, 3).unbind(2)                            # [B, heads, L, D/heads]
        if L > 3 * span:                                                   # 3: see above
            behind, three = -L % span, lambda z, axis: z.unfold(axis, 3 * span, span)    # 3: same
            q = F.pad(q, (0, 0, 0, behind)).unflatten(2, (-1, span))       # [B, heads, n, span, .]
            k, v = (three(F.pad(z, (0, 0, span, behind + span)), 2).mT for z in (k, v))
            where = three(torch.arange(-span, L + behind + span, device=x.device), 0)
            mask = ((where >= 0) & (where < L))[:, None]                   # [n, 1, 3 span]
        h = F.scaled_dot_product_attention(q, k, v, mask)
        h = h.flatten(2, -2)[:, :, :L]                                     # [B, heads, L, D/heads]
        return x + self.out(h.transpose(1, 2).flatten(2))


class UNet1d(nn.Module):
    """A time-conditioned 1-D U-Net on latents, with labels and controls ([9] section 3).

    labels [B, K] long: one embedding table per slot, of label_sizes[k] rows and one more for -1,
    "not given"; None is all -1. controls [B, n, L]: curves laid beside the latents; NaN is "not
    given", and a mask says so; None is all NaN. L may be any length >= 1: padded inside, cropped
    again. No batch statistics: items do not see each other. window: how many positions are told
    apart, at most as many as training shows (1: none are); later frames count as the last.
    Lifts out with: FrameConv, ResidualBlock, SelfAttention, time_embedding.
    """

    def __init__(self, channels, width=128, multipliers=(1, 2, 2), label_sizes=(), controls=0,
                 heads=4, window=1):
        super().__init__()
        self.controls, self.window = controls, window
        widths = [width] + [width * m for m in multipliers]
        levels, last = list(enumerate(zip(widths, widths[1:]))), widths[-1]
        e = 2 * width                        # 4 is usual: more weights, and no better here
        self.time_mlp = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        self.tables = nn.ModuleList(nn.Embedding(size + 1, e) for size in label_sizes)
        # Ten inputs per curve: its value, whether it is given, four sines, four cosines.
        self.enter = FrameConv(channels + 10 * controls, width)
        self.position = nn.Linear(width, width)
        # Attention only below the finest level: there it costs most and tells least.
        attend = lambda i, d: SelfAttention(d, heads) if i > 0 else nn.Identity()
        self.down = nn.ModuleList(nn.ModuleList([
            FrameConv(a, a, kernel_size=4, stride=2) if i > 0 else nn.Identity(),
            ResidualBlock(a, b, e), attend(i, b)]) for i, (a, b) in levels)
        self.middle = ResidualBlock(last, last, e)
        self.up = nn.ModuleList(nn.ModuleList([ResidualBlock(2 * b, a, e), attend(i, a)])
                                for i, (a, b) in reversed(levels))
        self.exit = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), FrameConv(width, channels))

    def forward(self, x, t, labels=None, controls=None):
        """x [B, C, L], t [B], labels [B, K] or None, controls [B, n, L] or None -> [B, C, L]."""
        B, _, L = x.shape
        e = self.time_mlp(time_embedding(t, self.enter.out_channels))      # [B, E]
        if labels is None:
            labels = torch.full((B, len(self.tables)), -1, device=x.device)
        for table, label in zip(self.tables, labels.unbind(1)):
            e = e + table(label + 1)                                       # row 0: not given
        if self.controls:
            c = x.new_full((B, self.controls, L), math.nan) if controls is None else controls
            # A cent is 1/1200 octave: too little to see in c, but 2.4 degrees of the wave k = 3.
            waves = [f(2 * math.pi * c * 2 ** k) for k in range(4) for f in (torch.sin, torch.cos)]
            x = torch.cat([x, torch.cat([c, ~c.isnan(), *waves], dim=1).nan_to_num()], dim=1)
        x = F.pad(x, (0, -L % 2 ** (len(self.down) - 1))).transpose(1, 2)  # [B, L, C]: FrameConv
        frame = torch.arange(x.shape[1], device=x.device).clamp(max=self.window - 1)
        waves = time_embedding(frame / 1000, self.position.in_features)    # 1000: its own factor
        h, skips = self.enter(x) + self.position(waves), []                # [B, L, D]
        for halve, block, attend in self.down:
            h = attend(block(halve(h), e))                                 # [B, L/2^i, D]
            skips.append(h)
        h = self.middle(h, e)
        for block, attend in self.up:
            h = attend(block(torch.cat([h, skips.pop()], dim=2), e))
            h = h.repeat_interleave(2, dim=1) if skips else h              # [B, 2L, D]
        return self.exit(h).transpose(1, 2)[..., :L]


# --------------------------------------------------------------------------------------------------
# 5. Sound: what is a note, and how do we hear that it is in tune?
# --------------------------------------------------------------------------------------------------
# A plucked string is a sum of harmonics. The k-th swings at k f0 (a little above, for the string is
# stiff), starts as loud as the place of the plucking, p, lets it (not at all where it has a node),
# and dies away the faster, d_k, the higher it is. Drawn aside and let go, the string starts at
# rest, so all of them start together, as cosines; b is how dull the pick is:
#
#     x(time) = sum_k  sin(pi k p)/k e^(-(k-1) b) e^(-time d_k) cos(2 pi f_k time).
#
# That is a data set that we can make on the spot, and know to be in tune. To hear whether a sound
# is in tune we ask at which delay it looks most like itself: the autocorrelation. It works where
# the largest peak of the spectrum fails, since on a guitar that is often the second harmonic. In
# the README, on 1,695 recorded notes, the one is right for 99.9 % and the other for 40 %.
#
# Try: `python minidiff.py sample --run runs/plucks --pitch 43`. It prints the pitch that it hears;
# in the README's demo such a note was heard at 43.01.


def resample(audio, from_rate, to_rate, padding=0.1):
    """Change the sample rate in Hz: [..., T] -> [..., ceil(T to_rate / from_rate)].

    A sine is a line in the spectrum and stays where it is: cut the spectrum off, or fill it up with
    zeros. Padding makes both lengths whole numbers of samples, and keeps the end of the sound from
    ringing into its beginning. Lifts out with: nothing.
    """
    if from_rate == to_rate:
        return audio
    T, common = audio.shape[-1], math.gcd(from_rate, to_rate)
    down, up = from_rate // common, to_rate // common
    periods = math.ceil((1 + padding) * T / down) + 1
    spectrum = torch.fft.rfft(audio.double(), n=periods * down)
    out = torch.fft.irfft(spectrum, n=periods * up) * (up / down)      # irfft cuts off or fills up
    return out[..., :math.ceil(T * up / down)].to(audio.dtype)


def read_blocks(path, start=0.0, seconds=math.inf, most=65_536):
    """Yield (mono block [n <= most], sample rate) of a sound file, from `start` for `seconds`.

    What a header claims costs nothing. Raises ValueError naming the file when it is missing, no
    audio, or of a rate that no sound has. Lifts out with: nothing.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("no such file")
        with soundfile.SoundFile(path) as file:
            # As sound at 1 Hz, a short file would be days; to resample from 2 GHz fills the memory.
            if not 1e3 <= file.samplerate <= 1e6:                          # 1 kHz, 1 MHz
                raise ValueError(f"a sample rate of {file.samplerate} Hz")
            most = max(1, most // file.channels)
            file.seek(round(min(start * file.samplerate, file.frames)))
            left = round(min(seconds * file.samplerate, file.frames))
            while left > 0 and len(block := file.read(min(most, left), "float32", always_2d=True)):
                left -= len(block)
                yield block.mean(axis=1), file.samplerate
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split(": ")[-1].strip()                        # without the path
        raise ValueError(f"{path}: cannot be read as audio: {reason}") from None


def load_audio(path, sample_rate, start=0.0, seconds=math.inf):
    """Read a wav, flac, mp3 or ogg file, from `start` for `seconds`: mono [T] at `sample_rate` Hz.

    Raises ValueError naming the file when it is missing, no audio, empty, or holds NaN or infinite
    samples. Lifts out with: read_blocks, resample.
    """
    blocks = list(read_blocks(path, start, seconds))
    if not blocks:
        raise ValueError(f"{path}: holds no samples after {start:.2f} s")
    audio = torch.from_numpy(np.concatenate([block for block, _ in blocks]))
    if not audio.isfinite().all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    return resample(audio, blocks[0][1], sample_rate)


def save_audio(path, audio, sample_rate):
    """Write audio [T] as 16-bit wav, flac, mp3 or ogg (by the ending); returns its peak, max |x|.

    A peak above 1 is scaled down to 1, not clipped. Raises ValueError for NaN or infinite samples,
    OSError when the file cannot be written. Lifts out with: nothing.
    """
    audio = audio.detach().float().cpu()
    if audio.ndim != 1 or not audio.isfinite().all():
        raise ValueError(f"{path}: expected finite samples [T], got shape {list(audio.shape)}")
    peak = audio.abs().max().item() if len(audio) else 0.0
    try:
        soundfile.write(path, (audio / max(peak, 1.0)).numpy(), sample_rate)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
    return peak


def pluck(pitch, velocity, seconds, sample_rate, generator=None, harmonics=40, block=128):
    """Synthesise plucked strings, exactly in tune: [B] MIDI pitch, [B] velocity 0..127 -> [B, T].

    The equation of this chapter with a random plucking point, brightness and decay; harder is
    louder and brighter, |x| <= 0.9. generator as for standard_normal. Axis K is the harmonics k.
    Lifts out with: standard_normal.
    """
    T, k = round(seconds * sample_rate), torch.arange(1, harmonics + 1)
    # The normal distribution function makes uniform numbers of normal ones.
    random = torch.special.ndtr(standard_normal((len(pitch), 3), generator)).double()    # 3 numbers
    point, bright, decay = random.split(1, dim=1)                                        # [B, 1]
    force = velocity.double()[:, None] / 127                                    # 127: the hardest
    f0 = 440 * 2 ** ((pitch.double()[:, None] - 69) / 12)              # A4, 440 Hz, is MIDI 69
    # 1e-4 is a guitar string's stiffness; divided so that f_1 stays exactly where it belongs.
    f = f0 * k * ((1 + 1e-4 * k ** 2) / (1 + 1e-4)).sqrt()                      # Hz, [B, K]
    # Plucked at 10 to 50 % of the string; each harmonic loses 0.05 to 0.45 nepers on the last.
    p, b = 0.1 + 0.4 * point, 0.45 - 0.2 * bright - 0.2 * force
    loud = torch.sin(math.pi * k * p) / k * torch.exp(-(k - 1) * b)
    loud = torch.where(f < 0.45 * sample_rate, loud, 0.0)                       # none near Nyquist
    d = (1 + 3 * decay) * (1 + 0.15 * (k - 1)) * (f0 / 220).sqrt()     # 1/s; high ones die first
    # A cosine that dies away is the real part of e^(z time). At time = m + n that is e^(z m)
    # e^(z n), m the start of a block: all harmonics and blocks are one matrix product.
    z = torch.complex(-d, 2 * math.pi * f) / sample_rate
    m, n = torch.arange(0, T, block), torch.arange(block)
    left = loud[:, None] * torch.exp(z[:, None] * m[:, None])                   # [B, T / block, K]
    audio = (left @ torch.exp(z[:, :, None] * n)).real.flatten(1)[:, :T]        # [B, T]
    peak = audio.abs().amax(1, keepdim=True).clamp_min(1e-12)         # no harmonic left: 0, not NaN
    when = torch.arange(T) / sample_rate
    fade = (when / 0.003).clamp(max=1) * ((seconds - when) / 0.02).clamp(0, 1)  # 3 ms in, 20 ms out
    return ((0.1 + 0.8 * force) * fade * audio / peak).float()         # soft 0.1 to hard 0.9


def envelope(audio, hop):
    """The largest |x| in every hop (seeds/004): [B, T] -> [B, L]. Lifts out with: nothing."""
    return F.max_pool1d(audio.abs(), hop, ceil_mode=True)


def pitch_track(audio, sample_rate, hop, low=34.0, high=100.0, finer=4):
    """The MIDI pitch around the middle of each hop: [B, T] -> [B, ceil(T / hop)], 0 where unvoiced.

    The autocorrelation r of a Hann window over four periods of `low` is divided by the window's own
    (Boersma, IFA Proceedings 17, 1993): a periodic sound has r = 1 at its period, and again at each
    multiple. So the first high peak is wanted, and the question is how high. Noise takes the same
    part 1 - r from all multiples, while half a period, a peak where even harmonics are strong,
    lacks far more: a peak will do that lacks at most 3 % more than twice what the highest lacks.
    low, high: MIDI. finer: lags per sample. Lifts out with: nothing.
    """
    frames = -(-audio.shape[1] // hop)
    # Periods, in samples. A4 is 440 Hz and MIDI 69; an octave has 12 semitones.
    longest, shortest = (sample_rate / (440 * 2 ** ((m - 69) / 12)) for m in (low, high))
    width, least = 4 * math.ceil(longest), math.ceil(finer * shortest)         # 4 periods; in lags
    window = torch.hann_window(width, device=audio.device)
    padded = F.pad(audio, (width, frames * hop + width - audio.shape[1]))
    windows = padded[:, width - (width - hop) // 2:].unfold(1, width, hop)[:, :frames]

    def correlate(x):
        # The power spectrum is the autocorrelation's spectrum; zeros behind it give finer lags.
        power = torch.fft.rfft(x, n=2 * width).abs().square()
        r = torch.fft.irfft(power, n=2 * width * finer)[..., :finer * math.ceil(longest) + 2]
        return r / r[..., :1].clamp_min(1e-12)                                 # silence: 0, not NaN

    def track(x):
        r = correlate(x * window) / correlate(window)                          # [B, frames, lags]
        left, middle, right = r[..., least - 1:].unfold(-1, 3, 1).unbind(-1)   # 3 lags in a row
        height = torch.where((middle >= left) & (middle > right), middle, 0.0)
        best = height.amax(-1, keepdim=True)
        enough = 1 - 2 * (1 - best).clamp_min(0) - 0.03                        # 3 %: see above
        first = (height >= enough).int().argmax(-1, keepdim=True)
        y0, y1, y2 = (y.gather(-1, first) for y in (left, middle, right))
        # The top of the parabola through the three; where they are equal, -1e-12 keeps it finite.
        lag = (first + least + (y0 - y2) / (2 * (y0 - 2 * y1 + y2)).clamp(max=-1e-12)) / finer
        midi = 69 + 12 * torch.log2(sample_rate / lag / 440)                   # A4, 440 Hz, is 69
        # Voiced: like itself to more than one half, and above -70 dB of full scale.
        voiced = (best > 0.5) & (x.square().mean(-1, keepdim=True).sqrt() > 10 ** (-70 / 20))
        return torch.where(voiced, midi, 0.0)[..., 0]

    parts = windows.split(256, dim=1)                # 256 frames at once, to spare the memory
    return torch.cat([track(part - part.mean(-1, keepdim=True)) for part in parts], dim=1)


def note_pitch(track):
    """The voiced median of a note, NaN if unvoiced: [B, L] -> [B]. Lifts out with: nothing."""
    return torch.where(track > 0, track, math.nan).nanmedian(dim=1).values


FOLLOWING = "envelope_correlation", "voiced_within_50_cents"


def measure(audio, rate, hop, pitch=None, curves=None):
    """Level, brightness, and how well audio [B, T] does what was asked: a dict of means over B.

    level_db; centroid_hz, the middle of the spectrum. pitch [B], MIDI: pitch_accuracy, the share
    within 50 cents; unvoiced is wrong. curves [B, 2, L], envelope and octaves from C4 every `hop`
    samples: envelope_correlation and, of the frames that should be voiced, voiced_within_50_cents.
    Lifts out with: envelope, note_pitch, pitch_track.
    """
    def track(hop, low=34.0, batch=16):                            # a few at a time, for memory
        return torch.cat([pitch_track(part, rate, hop, low) for part in audio.split(batch)])

    level = 10 * audio.square().mean(1).clamp_min(1e-12).log10()   # decibels of a power, [B]
    size, hertz = 1024, torch.fft.rfftfreq(1024, 1 / rate)         # 1024: 1/16 s at 16 kHz
    spectrum = torch.stft(audio, size, window=torch.hann_window(size), pad_mode="constant",
                          return_complex=True).abs().mean(2)                             # [B, f]
    centroid = (spectrum * hertz).sum(1) / spectrum.sum(1).clamp_min(1e-12)    # silence: not 0/0
    figures = {"level_db": level.mean().item(), "centroid_hz": centroid.mean().item()}
    if pitch is not None:
        low = max(20.0, pitch.min().item() - 14)                   # an octave too low is heard too
        found = note_pitch(track(round(rate / 60), low))           # 60 frames a second
        figures["pitch_accuracy"] = ((found - pitch).abs() < 0.5).float().mean().item()
    if curves is not None:
        (wanted, octave), L = curves.cpu().unbind(1), curves.shape[2]                    # [B, L]
        both = torch.stack([envelope(audio, hop)[:, :L].flatten(), wanted.flatten()])
        asked = octave * 12 + 60                                   # back to MIDI; unvoiced was 0
        close = ((track(hop)[:, :L] - asked).abs() < 0.5)[asked > 1]
        follows = torch.corrcoef(both)[0, 1].item(), close.float().mean().item()
        figures |= dict(zip(FOLLOWING, follows))
    return figures


def midi_events(track):
    """Yield (tick, status, data) of each event in a MIDI track's bytes. Lifts out with: nothing."""
    left, tick, running = list(reversed(track)), 0, 0                  # left.pop() is the next byte

    def number(value=0, more=1):
        while more:
            # Seven bits a byte, the highest first; the eighth says that more follow. 28 at most.
            more, bits = divmod(left.pop(), 128)
            value = (value * 128 + bits) % 2 ** 28                     # 128, 28: see above
        return value

    while left:
        tick += number()
        # A byte below 128 is data already: the status byte of the event before still holds.
        status = left.pop() if left[-1] >= 128 else running
        kind = [left.pop()] if status == 0xFF else []          # 0xFF: a meta event, first its kind
        # From 0xF0 on a length is told; else 0xC. and 0xD. have one data byte, the others two.
        size = number() if status >= 0xF0 else 1 if status >> 4 in (0xC, 0xD) else 2
        data = kind + [left.pop() for _ in range(size)]
        if status < 128 or status < 0xF0 and max(data) > 127:          # never in data
            raise ValueError(f"status byte {status} with data {data}")
        running = status if status < 0xF0 else running         # 0xF0 and above: of no channel
        yield tick, status, data


def read_midi(path, most=4_000_000):
    """The notes of a MIDI file of format 0 or 1: a list of (start s, end s, pitch, velocity).

    Notes still on at the end stop there. Raises ValueError naming a file that is missing, cut
    short, larger than `most` bytes, or no MIDI. Lifts out with: midi_events.
    """
    events, notes, sounding, seconds, last, tempo = [], [], {}, 0.0, 0, 500_000    # us a beat
    try:
        data = pathlib.Path(path).read_bytes() if os.path.getsize(path) <= most else b""
        magic, size, form, tracks, ticks = struct.unpack_from(">4sIHHH", data)
        if magic != b"MThd" or form > 1 or not 0 < ticks < 0x8000:     # from 0x8000 on: film frames
            raise ValueError(f"{magic}, format {form}, division {ticks}")
        at = 8 + size                                                  # 8: a chunk's name and size
        while tracks:
            name, size = struct.unpack_from(">4sI", data, at)
            track, = struct.unpack_from(f"{size}s", data, at + 8)      # 8: as above
            at, tracks = at + 8 + size, tracks - (name == b"MTrk")     # others: skipped
            events += midi_events(track) if name == b"MTrk" else []
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path}: expected a whole MIDI file of format 0 or 1, timed in ticks per "
                         f"quarter note, of at most {most:,} bytes ({error})") from None
    # All tracks in order of time; at the same tick a tempo (0xFF 0x51) comes before notes.
    for tick, status, data in sorted(events, key=lambda event: (event[0], event[1] != 0xFF)):
        seconds, last = seconds + (tick - last) * tempo / 1e6 / ticks, tick    # 1e6 us are 1 s
        if status == 0xFF and data[0] == 0x51:                     # 0x51: tempo, three bytes
            tempo = int.from_bytes(data[1:4], "big")                   # 1:4, after 0x51
        elif status >> 4 in (0x8, 0x9):                                # note off, note on
            key = status & 15, data[0]                                 # 15: the channel; the pitch
            start, velocity = sounding.pop(key, (seconds, 0))
            notes.append((start, seconds, data[0], velocity))
            sounding[key] = seconds, data[1] * (status >> 4 == 0x9)    # off: of velocity 0
    notes += [(start, seconds, pitch, v) for (_, pitch), (start, v) in sounding.items()]
    return sorted(note for note in notes if note[-1])                  # without those


def midi_curves(notes, frames, frame_seconds, level, fade):
    """What a control-conditioned model plays notes from: [2, frames], envelope and octaves from C4.

    notes as of read_midi; the highest that sounds is heard. Each starts at level velocity/127 and
    is `fade` times as loud from frame to frame. A rest is silent, and 5 octaves down, as the pitch
    of unvoiced frames in training. Lifts out with: nothing.
    """
    curves = torch.tensor([[0.0], [-5.0]]).repeat(1, frames)                   # -5: see above
    for start, end, pitch, velocity in sorted(notes, key=lambda note: note[2]):          # by pitch
        a, b = (min(round(when / frame_seconds), frames) for when in (start, end))
        curves[0, a:b] = level * velocity / 127 * fade ** torch.arange(b - a)  # 127: the hardest
        curves[1, a:b] = (pitch - 60) / 12                                     # MIDI 60 is C4
    return curves


# --------------------------------------------------------------------------------------------------
# 6. The Snake VAE: how does a second of sound become 63 vectors?
# --------------------------------------------------------------------------------------------------
# 16,000 numbers a second are too many for a diffusion model that must learn in minutes. A codec
# squeezes 256 samples into one frame of 16 channels, and back. An auto-encoder alone may put its
# latents anywhere, with holes between them that decode to rubbish. A *variational* one [13] gives
# each latent value a mean and a variance, and decodes a draw from N(mean, variance),
#
#     z = mean + e^(log_variance / 2) noise,     noise from N(0, 1).
#
# Written so, the randomness is an input (`noise`), and z a smooth function of mean and
# log_variance: dz/dmean = 1, dz/dlog_variance = (z - mean)/2. The gradient reaches both, where it
# could not pass through a draw (the reparameterisation). The loss adds KL(N(mean, variance) ||
# N(0, 1)), see `kl_divergence`. It keeps latents near unit size and lets neighbours overlap, so
# that no holes are left: what a diffusion model can hit, the decoder can play.
#
# Its activation, Snake [11], is x + sin^2(a x)/a with a learned a. The slope, 1 + sin(2 a x), is
# never negative and has a period of pi/a however far from 0, so that this network can continue a
# tone that goes on. Networks of ReLUs, whose slope is constant, end in straight lines ([11]).
#
# Try: `python minidiff.py sample --run runs/plucks --init-audio runs/plucks/samples/real_1.wav
# --init-noise 0`. No noise is added, so what you hear is the codec's round trip. In the README, all
# notes stay in tune through it.


class SnakeFunction(torch.autograd.Function):
    """y = x + sin(a x)^2 / a of x [B, D, T], ln a [D, 1], with both derivatives by hand.

    sin^2 u = (1 - cos 2u)/2 makes it x + c - c cos(x / c), c = 1/(2a): one cosine and one fused
    multiply-add. dy/dx = 1 + sin(x / c); and as a y depends on a x alone, a dy/da = x dy/dx - y.
    By hand, for autograd would keep and read more: 0.070 s instead of 0.065 s for a codec's step of
    4 x 4,096 samples on two cores of an AMD EPYC. Lifts out with: nothing.
    """

    @staticmethod
    def forward(ctx, x, log_a):
        c = torch.exp(-log_a) / 2
        y = torch.addcmul(x + c, c, torch.cos(x / c), value=-1)
        ctx.save_for_backward(x, y, c)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y, c = ctx.saved_tensors
        g_x = torch.addcmul(g, g, torch.sin(x / c))                        # [B, D, T]
        return g_x, (x * g_x - y * g).sum((0, 2))[:, None]


class Snake(nn.Module):
    """x + sin(a x)^2 / a, one learned a > 0 per channel ([11] section 3): [B, D, T] -> [B, D, T].

    The weight is ln(a): a itself would sooner or later cross 0. Lifts out with: SnakeFunction.
    """

    def __init__(self, channels):
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x):
        return SnakeFunction.apply(x, self.log_a)


class ResidualUnit(nn.Module):
    """x + two convolutions of it, the first dilated: [B, D, T] -> same. Lifts out with: Snake,
    SnakeFunction.
    """

    def __init__(self, width, dilation, kernel=3):
        super().__init__()
        self.net = nn.Sequential(
            Snake(width), nn.Conv1d(width, width, kernel, dilation=dilation, padding="same"),
            Snake(width), nn.Conv1d(width, width, 1))
        # Each unit starts close to the identity, and so does a stack of them.
        nn.init.normal_(self.net[-1].weight, std=1e-3)

    def forward(self, x):
        return x + self.net(x)


class Recurrent(nn.Module):
    """x + a bidirectional LSTM over it (seeds/004): [B, D, L] -> same. Lifts out with: nothing."""

    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return x + self.lstm(x.transpose(1, 2))[0].transpose(1, 2)


class SnakeVAE(nn.Module):
    """A codec: audio [B, T] <-> latents [B, C, L], hop = product of strides, L = ceil(T / hop).

    As in [12] section 3.1 each stage divides time by its stride (at least 2) and doubles the width,
    here up to 6 times `width`; the decoder goes the same way back. To play is harder than to hear:
    the decoder's stages have a unit for each of `dilations`, the encoder's have one. Kernels are
    twice the stride, so that every output sample is made of equally many inputs; else the stride is
    heard as a buzz. The LSTM hears the whole sound. encode gives the mean, decode's gradients pass.
    Lifts out with: Recurrent, ResidualUnit, Snake, SnakeFunction.
    """
    tail = 0                                      # samples that a frame needs beyond its own hop

    def __init__(self, sample_rate, channels=16, strides=(4, 4, 4, 4), width=32, dilations=(1, 3)):
        super().__init__()
        self.sample_rate, self.channels, self.hop = sample_rate, channels, math.prod(strides)
        widths = [min(2 ** i, 6) * width for i in range(len(strides))]         # 6: 32, 64, 128, 192
        stages, last = list(zip(strides, [width // 2] + widths, widths)), widths[-1]
        conv = lambda a, b, kernel: nn.Conv1d(a, b, kernel, padding="same")
        step = lambda s: dict(kernel_size=2 * s, stride=s, padding=(s + 1) // 2)         # T -> T/s
        body = [layer for s, a, b in stages for layer in (
            Snake(a), nn.Conv1d(a, b, **step(s)), ResidualUnit(b, dilation=1))]
        self.encoder = nn.Sequential(conv(1, width // 2, kernel=7), *body,
                                     Recurrent(last), Snake(last))
        self.to_mean, self.to_log_variance = (conv(last, channels, kernel=3) for _ in range(2))
        # Little noise at first, e^-2: a decoder that hears only noise learns to ignore the latents.
        nn.init.constant_(self.to_log_variance.bias, -4.0)
        body = [layer for s, a, b in reversed(stages) for layer in (
            *(ResidualUnit(b, dilation) for dilation in dilations),
            Snake(b), nn.ConvTranspose1d(b, a, **step(s), output_padding=s % 2))]
        self.decoder = nn.Sequential(conv(channels, last, kernel=3), Recurrent(last), *body,
                                     Snake(width // 2), conv(width // 2, 1, kernel=7))

    def posterior(self, audio):
        """[B, T] -> mean, log_variance, each [B, C, L]. The end is padded with silence."""
        h = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop))[:, None])        # [B, D, L]
        # Clamped: e^20 is noise that no decoder could use, and e^-20 is below float32's rounding.
        return self.to_mean(h), self.to_log_variance(h).clamp(-20, 20)

    def frames(self, samples):
        return -(-samples // self.hop)

    def encode(self, audio):
        return self.posterior(audio)[0]                   # [B, C, L]: the mean, without the noise

    def decode(self, latents):
        return self.decoder(latents)[:, 0]                # [B, L * hop]; gradients pass


def kl_divergence(mean, log_variance):
    """KL(N(mean, variance) || N(0, 1)), the mean over all latent values, in nats ([13] appendix B).

    KL(p || q) is the mean over z from p of ln p(z) - ln q(z). For p = N(mean, variance) and q =
    N(0, 1) that is (z^2 - (z - mean)^2/variance - ln variance)/2. With E z^2 = mean^2 + variance
    and E (z - mean)^2 = variance the mean is (mean^2 + variance - 1 - ln variance)/2.
    The mean and not the sum over values: its weight is then the same at every length.
    Lifts out with: nothing.
    """
    return 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()


# --------------------------------------------------------------------------------------------------
# 7. What the VAE is trained on: when are two sounds the same?
# --------------------------------------------------------------------------------------------------
# Not when their samples agree: shift a tone by half a period and it sounds the same, while the
# squared error is at its largest. Magnitudes of a spectrogram forget the phase; three window
# lengths, because long ones tell pitches apart and short ones tell when. Where they cannot tell,
# the decoder plays the average, which is dull. A discriminator learns to hear that, and the decoder
# to fool it.
#
# Losses have gradients at the output of very different size, which change as training goes on. A
# weight on the loss then means nothing: doubling the loss doubles its pull. Divided by its own
# running norm, gradient g_i says only where to go,
#
#     g  =  total_norm  sum_i w_i / sum(w)  g_i / <|g_i|>,     g_i = dloss_i / doutput,
#
# and c loss_i has the same g_i / <|g_i|> for any c > 0. Weights become shares of the pull, and
# 1 : 1 means equal say. The KL does not depend on the output; it has no g_i and joins behind.
#
# Try: `python minidiff.py codec --run runs/judge --adversarial-from 1300`. runs/judge/log.csv tells
# each loss's share of the gradient; from step 1,300 on two losses more take theirs.


def magnitudes(audio, size):
    """|STFT| with Hann windows of `size` samples, a quarter apart: [B, T] -> [B, f, l].
    Lifts out with: nothing.
    """
    window = torch.hann_window(size, device=audio.device)
    return torch.stft(audio.float(), size, hop_length=size // 4, window=window,
                      pad_mode="constant", return_complex=True).abs()


def spectral_distances(estimate, target, size, floor=1e-3):
    """Spectral convergence and the log magnitudes' differences: [B, T] twice -> scalar, [B, f, l].

    ||S_t - S_e|| / ||S_t|| and ln S_t - ln S_e ([22] eq. 5 and 6), S of `magnitudes`. floor: what
    is smaller counts as equal; 1e-3 is about the noise of 16-bit samples. Silence is not 0/0.
    Lifts out with: magnitudes.
    """
    e, t = magnitudes(estimate, size), magnitudes(target, size)
    convergence = (t - e).norm() / t.norm().clamp_min(floor)
    return convergence, t.clamp_min(floor).log() - e.clamp_min(floor).log()


def stft_loss(estimate, target, sizes=(2048, 512, 128)):
    """How far two spectrograms are apart: spectral convergence + mean |log magnitudes' difference|,
    mean over window `sizes` ([22] eq. 4). estimate, target: [B, T] -> scalar.
    Lifts out with: magnitudes, spectral_distances.
    """
    both = [spectral_distances(estimate, target, size) for size in sizes]
    return sum(convergence + logs.abs().mean() for convergence, logs in both) / len(sizes)


class STFTDiscriminator(nn.Module):
    """Tells recordings from reconstructions by their spectrogram, VGG style (seeds/004).

    audio [B, T] -> (logits [B, 1, f, l], maps: the list of its hidden layers). Real and imaginary
    part are two input channels, so that wrong phases can be heard. Lifts out with: nothing.
    """

    def __init__(self, size=512, width=32, depth=4):
        super().__init__()
        self.size, widths = size, [2] + [min(2 ** i, 4) * width for i in range(depth)]   # at most 4
        self.layers = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1)
                                    for a, b in zip(widths, widths[1:]))
        self.exit = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(self, audio):
        window = torch.hann_window(self.size, device=audio.device)
        spectrum = torch.stft(audio.float(), self.size, hop_length=self.size // 4, window=window,
                              pad_mode="constant", return_complex=True)                  # [B, f, l]
        h, maps = torch.view_as_real(spectrum).permute(0, 3, 1, 2), []  # 3: re, im -> [B, 2, f, l]
        # A root tames the range: partials of a string differ by a factor of a thousand.
        h = h * (h.square().sum(1, keepdim=True) + 1e-7) ** -0.25
        for layer in self.layers:
            h = F.leaky_relu(layer(h), negative_slope=0.1)
            maps.append(h)
        return self.exit(h), maps


def hinge_discriminator_loss(real, fake):
    """mean relu(1 - real) + mean relu(1 + fake) ([12] section 3.4). Lifts out with: nothing."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake):
    """-mean fake: scalar. [12] cuts it off at 1; this goes on pulling. Lifts out with: nothing."""
    return -fake.mean()


def feature_matching_loss(real, fake):
    """Mean L1 of maps, each over its real map's size ([12] sec. 3.4). Lifts out with: nothing."""
    # The real maps are targets, so they are detached; the clamp keeps a silent one from being 0/0.
    return sum(F.l1_loss(f, r.detach()) / r.detach().abs().mean().clamp_min(1e-8)
               for r, f in zip(real, fake)) / len(real)


class LossBalancer:
    """Turn weights into shares of the gradient at the output ([12] section 3.4).

    The equation of this chapter, g_i [B, ...]: |g_i| is the norm per item, mean over the batch;
    <.> its running mean, divided by 1 - ema_decay^n since it starts at 0 and has seen n steps.

        balancer = LossBalancer({"l1": 1, "stft": 2})
        balancer.backward({"l1": l1, "stft": stft}, output, free={"kl": 0.01 * kl})

    Lifts out with: nothing.
    """

    def __init__(self, weights, total_norm=1.0, ema_decay=0.999):
        self.weights, self.total_norm, self.ema_decay = dict(weights), total_norm, ema_decay
        self.norms, self.counts, self.shares = {}, {}, {}

    def backward(self, losses, output, free=None):
        """Backpropagate losses {name: scalar} of `output` [B, ...], balanced, and the free as is.

        free: those that do not depend on the output (KL). `shares` then holds each loss's part of
        the balanced gradient, sum 1. ValueError for a loss without a weight.
        """
        if stray := [name for name in losses if name not in self.weights]:
            raise ValueError(f"no weight for the loss {stray[0]!r}, only for {list(self.weights)}")
        total, parts = sum(self.weights[name] for name in losses), {}
        for name, loss in losses.items():
            g, = torch.autograd.grad(loss, output, retain_graph=True)
            norm = torch.atleast_2d(g).flatten(1).norm(dim=1).mean()
            before = self.norms.get(name, 0 * norm).to(norm)          # a resumed one is on the CPU
            self.norms[name] = torch.lerp(norm, before, self.ema_decay)
            self.counts[name] = self.counts.get(name, 0) + 1
            mean = self.norms[name] / (1 - self.ema_decay ** self.counts[name])
            # A loss may rest, with a gradient of 0, from its first step on: not 0/0.
            parts[name] = self.weights[name] / total * self.total_norm * g / mean.clamp_min(1e-12)
        whole = sum(part.norm() for part in parts.values()).clamp_min(1e-12)    # all may be 0
        self.shares = {name: part.norm() / whole for name, part in parts.items()}
        free = list((free or {}).values())
        torch.autograd.backward([output, *free], [sum(parts.values()), *[None] * len(free)])

    def state_dict(self):
        return {"norms": dict(self.norms), "counts": dict(self.counts)}

    def load_state_dict(self, state):
        self.norms, self.counts = dict(state["norms"]), dict(state["counts"])


# --------------------------------------------------------------------------------------------------
# 8. Data: where do the notes come from?
# --------------------------------------------------------------------------------------------------
# From a formula (Plucks, Melodies), a folder of recordings (AudioFolder), or NSynth [14], which is
# fetched into such a folder. Of each the rest of the file asks the same: audio(i), the samples of
# recording i; its labels (pitch, velocity, source); and whether it is held out. Neither network
# trains on what is held out, so that it can be compared with what was never seen. In NSynth's
# folders it is other instruments, elsewhere a part of the recordings.
#
# Diffusion never touches audio. Each recording goes through the codec once, before the training:
#
#     audio(i) [T]  -- encode -->  frames [L, C] of one long file  -- at random -->  window [C, L]
#
# The file has the frames of all recordings one after the other; a batch is windows cut out of it at
# random. It stays in the run's folder, beside a note of what it was made from, so the next training
# finds it there, or makes it anew if codec or recordings have changed.
#
# x_0 is such a window, standardised: (latents - mean) / deviation, for each channel. Chapter 1 adds
# noise of variance 1: channels of deviation 100 it would hardly touch, those of 0.01 it would drown
# at once. Mean and deviation come from the training part alone, or the held-out notes would have
# had a say; they travel in the checkpoint, since what is generated must be scaled back.
#
# Try: `python minidiff.py train --data melodies`, phrases instead of notes, with curves of loudness
# and pitch instead of labels; then `python minidiff.py sample --run runs/melodies --midi tune.mid`
# with a MIDI file of yours. README.md says how closely it follows.
AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".ogg")
MIDI = r"(0\d\d|1[01]\d|12[0-7])"                                  # 000 to 127
NSYNTH_NAME = re.compile(rf"(.+)_\d{{3}}-{MIDI}-{MIDI}")          # source_instrument-pitch-velocity
NSYNTH_URL = ("https://media.githubusercontent.com/media/SonyCSLParis/test-lfs/refs/heads/master/"
              "NSYNTH_GUITAR_MP3.zip")
NSYNTH_SIZE = 334_999_208                                          # bytes
NSYNTH_SHA256 = "cbabb3ba2ce81c28982eb41c3ba5127a0d81a3cd72d55d427a95f0558e43dfb3"


class Progress:
    """A line on stderr: how far a long work is, how fast, how long it will take. Cheap enough to be
    called at every step: progress(done, text) for `done` of `total`, the text behind the line.

    A terminal's line renews itself, a file gets one every 15 seconds. Work that was shorter than
    that leaves none behind, unless it ends with a text. Lifts out with: nothing.
    """

    def __init__(self, what, total, unit="items", done=0):
        self.what, self.total, self.unit, self.first = what, total, unit, done
        self.began = self.shown = time.monotonic()

    def __call__(self, done, text=""):
        now, live, last = time.monotonic(), sys.stderr.isatty(), done >= self.total
        spent, pause = now - self.began, 0.2 if live else 15.0             # seconds
        stays = text or not last or spent >= 15                            # seconds
        due = last or done > self.first and now - self.shown >= pause
        if not due or not (stays or live):
            return
        self.shown, rate = now, (done - self.first) / max(spent, 1e-9)     # it may be done at once
        left = f"{spent:.0f} s in all" if last else f"{(self.total - done) / rate:.0f} s left"
        line = f"{self.what} {done:,}/{self.total:,}  {rate:,.1f} {self.unit}/s  {left}"
        # On a terminal: back to the first column, and away with what stood there.
        print("\r\033[K" * live + (line + f"  {text}" * bool(text)) * bool(stays),
              end="" if live and not (last and stays) else "\n", file=sys.stderr, flush=True)


class Recordings:
    """What a source of sound has: audio(i, start, length) -> [T], samples at `sample_rate` Hz.

    `seconds` is what training cuts out. names, lengths [N]; labels [N, 3] (MIDI pitch, velocity,
    index into `sources`; -1 unknown); valid [N] bool, held out; made_from, a string that changes
    with the content. Lifts out with: nothing.
    """

    def __len__(self):
        return len(self.names)

    def crops(self, n, length, generator):
        """n random windows of the training part: [n, length]; what is shorter ends in silence."""
        train = (~self.valid).nonzero()[:, 0]
        chosen = train[torch.randint(len(train), (n,), generator=generator)].tolist()
        out, where = torch.zeros(n, length), torch.rand(n, generator=generator).tolist()
        for row, i, w in zip(out, chosen, where):
            audio = self.audio(i, int(w * max(0, self.lengths[i] - length + 1)), length)
            row[:len(audio)] = audio
        return out


class Plucks(Recordings):
    """The built-in strings: note i has MIDI pitch 40 + i mod 37, a velocity and a tone of its own.
    The same from the same seed; the last sixth is held out.
    Lifts out with: Recordings, pluck, standard_normal.
    """

    def __init__(self, count=2220, seed=0, seconds=1.0, sample_rate=16_000):
        self.sample_rate, self.seconds, self.seed, self.cache = sample_rate, seconds, seed, {}
        self.lengths = [round(seconds * sample_rate)] * count
        self.made_from = f"{type(self).__name__} {count} {seed} {seconds} {sample_rate}"
        self.valid = torch.arange(count) >= count - max(1, count // 6)                    # a sixth
        pitch = 40 + torch.arange(count) % 37                                # 37 pitches, 40 to 76
        random = torch.Generator().manual_seed(seed)
        velocity = torch.randint(25, 128, (count,), generator=random)        # from soft to hardest
        self.labels = torch.stack([pitch, velocity, torch.zeros_like(pitch)], dim=1)
        self.names, self.sources = [f"pluck {i}" for i in range(count)], ["pluck"]

    def notes(self, i):
        """What recording i plays, as read_midi says it: (start s, end s, pitch, velocity) each."""
        return [(0.0, self.seconds, *self.labels[i, :2].tolist())]

    def audio(self, i, start=0, length=None):
        """Samples start to start + length of recording i: [T]."""
        if i not in self.cache:
            audio = torch.zeros(self.lengths[i])
            for k, (begin, end, pitch, velocity) in enumerate(self.notes(i)):
                # Each note has a seed of its own, far from any other recording's.
                random = torch.Generator().manual_seed(self.seed + 1_000_003 * (i + 1) + k)
                note = pluck(torch.tensor([pitch]), torch.tensor([velocity]), end - begin,
                             self.sample_rate, random)[0]
                at = round(begin * self.sample_rate)
                audio[at:at + len(note)] = note[:len(audio) - at]
            self.cache[i] = audio
        return self.cache[i][start:None if length is None else start + length]


class Melodies(Plucks):
    """The built-in phrases: plucked notes one after the other, with rests; no labels, but curves.
    A phrase lasts `lasts` seconds, and training cuts `seconds` out of it.
    Lifts out with: Plucks, Recordings, pluck, standard_normal.
    """

    def __init__(self, count=240, seed=0, seconds=2.0, sample_rate=16_000, lasts=8.0):
        self.lasts = max(seconds, lasts)
        super().__init__(count, seed, self.lasts, sample_rate)
        self.seconds = seconds
        self.labels, self.sources = torch.full_like(self.labels, -1), []
        self.names = [f"melody {i}" for i in range(count)]

    def notes(self, i):
        random = np.random.default_rng([self.seed, i])
        notes, at, pitch = [], 0.0, int(random.integers(50, 68))              # starts in the middle
        while at < self.lasts:
            lasts = random.choice([0.25, 0.375, 0.5, 0.75, 1.0])                         # seconds
            end = min(at + float(lasts), self.lasts)
            pitch = int(np.clip(pitch + random.integers(-5, 6), 40, 76))      # leaps up to a fourth
            if random.random() > 0.12:                                             # else a rest
                notes.append((at, end, pitch, int(random.integers(40, 128))))      # not too soft
            at = end
        return notes


@contextlib.contextmanager
def postponed_interrupt():
    """`with postponed_interrupt() as asked`: Ctrl-C or SIGTERM fills the list `asked`, so that what
    is under way can be finished and saved; a second one interrupts at once.
    Lifts out with: nothing.
    """
    asked, before = [], {}

    def note(number, _):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with contextlib.suppress(ValueError):               # only the main thread is given any signals
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_file(path, content):
    """Write bytes so that a crash, at any moment, leaves the old file or the new one.

    The bytes go into a file beside it and from memory to the disk (fsync); only then does that file
    take the name, which happens at once or not at all. Raises OSError naming the file, the old one
    untouched. Lifts out with: nothing.
    """
    fresh = pathlib.Path(f"{path}.new")
    try:
        with open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None


def write_json(path, content):
    """The same for a dict, and for the folders above it. Lifts out with: write_file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content).encode())


def read_json(path):
    """What write_json wrote; an empty dict if it is missing or spoilt. Lifts out with: nothing."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def inspect_audio(path):
    """Read a sound file to its end: [samples, rate in Hz, CRC-32 of them, None or what is wrong].
    Lifts out with: read_blocks.
    """
    frames, rate, crc, peak = 0, 0, 0, 0.0
    try:
        for block, rate in read_blocks(path):
            frames, crc = frames + len(block), zlib.crc32(block, crc)
            peak = np.maximum(peak, abs(block).max())              # unlike max(), it passes NaN on
    except ValueError as error:
        return [0, 0, 0, str(error).removeprefix(f"{path}: ")]
    short, soft = frames < max(1, 0.05 * rate), peak < 1e-4                  # 0.05 s; -80 dB
    problem = ("holds NaN or samples above 1000" if not peak <= 1000         # 60 dB too loud
               else f"holds {frames} samples, less than 0.05 s" if short
               else "holds only silence" if soft else None)
    return [frames, rate, crc, problem]


class AudioFolder(Recordings):
    """Every wav, flac, mp3 and ogg below a folder, of any rate, mono or not.

    NSynth names (guitar_acoustic_004-071-025.wav) give the labels, other names give -1. What lies
    in folders that end in -valid is held out; if that is nothing or all, a seeded 5 % is.
    sample_rate None: the most common, at most 22,050 Hz; seconds None: the longest, at most 8
    (seeds/004). `unusable` is {name: reason}; known: a JSON file that remembers, by size and time,
    what was found, since to know that a file is whole it must be read. Raises ValueError for no
    folder, below 2 usable files, or if less than half are usable.
    """

    def __init__(self, root, sample_rate=None, seconds=None, seed=0, known=None):
        if not os.path.isdir(root):
            raise ValueError(f"{root}: no such folder; --data takes plucks, melodies, nsynth "
                             "or a folder of recordings")
        every = [pathlib.Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        files = sorted(path for path in every if path.suffix.lower() in AUDIO_ENDINGS)
        seen, progress = read_json(known) if known else {}, Progress("checking files", len(files))
        rows, self.unusable = [], {}
        for done, path in enumerate(files, 1):
            stamp = [path.stat().st_size, path.stat().st_mtime_ns] if os.path.exists(path) else 0
            if seen.get(str(path), [None])[0] != stamp:
                seen[str(path)] = [stamp, *inspect_audio(path)]
            name, (*found, problem) = str(path.relative_to(root)), seen[str(path)][1:]
            if problem:
                self.unusable[name] = problem
            else:
                rows.append((path, name, *found))
            progress(done)
        if len(rows) < max(2, len(files) / 2):
            first = next((f" ({name!r} {why})" for name, why in self.unusable.items()), "")
            raise ValueError(f"{root}: {len(files)} audio files ({' '.join(AUDIO_ENDINGS)}) among "
                             f"{len(every)} files, {len(self.unusable)} of them unusable{first}; "
                             "expected at least 2 usable ones, and half of all")
        if known:
            write_json(known, seen)
        self.files, self.names, frames, rates, crcs = zip(*rows)
        usual = max(sorted(set(rates)), key=rates.count)
        self.sample_rate = sample_rate or min(usual, 22_050)                             # Hz
        self.seconds = seconds or min(max(n / r for n, r in zip(frames, rates)), 8.0)    # 8 seconds
        self.lengths = [math.ceil(n * self.sample_rate / r) for n, r in zip(frames, rates)]
        content = repr([*zip(self.names, crcs), self.sample_rate, seed])
        self.made_from = hashlib.sha256(content.encode()).hexdigest()
        found = [NSYNTH_NAME.fullmatch(path.stem) for path in self.files]
        self.sources = sorted({m[1] for m in found if m})
        # A name's groups are 1 the source, 2 the pitch, 3 the velocity.
        label = lambda m: [int(m[2]), int(m[3]), self.sources.index(m[1])]     # 2, 3: as above
        self.labels = torch.tensor([label(m) if m else [-1, -1, -1] for m in found])
        split = [any(part.endswith("-valid") for part in path.parts) for path in self.files]
        if len(set(split)) == 1:
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
            split = (order < max(1, len(order) // 20)).tolist()                          # 5 %
        self.valid = torch.tensor(split)

    def audio(self, i, start=0, length=None):
        """Samples start to start + length of recording i: [T], shorter where it ends before."""
        rate, seconds = self.sample_rate, math.inf if length is None else length / self.sample_rate
        if start >= self.lengths[i]:
            return torch.zeros(0)
        return load_audio(self.files[i], rate, start / rate, seconds)[:length]


def download(url, path, size, sha256, attempts=5, timeout=30.0):
    """Fetch url to path, going on where an interrupted download stopped; if all is there, not at
    all. Whichever it was, the bytes are checked: who reads them afterwards knows what they hold.

    Raises ValueError after `attempts` tries in a row without a new byte (timeout in seconds each),
    or if the SHA-256 is another. Lifts out with: Progress.
    """
    path, failures = pathlib.Path(path), 0
    path.touch()
    progress = Progress("downloading", size, "bytes", path.stat().st_size)
    while (have := path.stat().st_size) < size and failures < attempts:
        try:
            why = "the connection ended"
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            # Status 206: the server goes on at `have`. Otherwise it starts over, and so do we.
            with urllib.request.urlopen(request, timeout=timeout) as answer, \
                    open(path, "ab" if answer.status == 206 else "wb") as file:    # 206: see above
                # A mebibyte at a time; progress returns None.
                file.writelines(iter(lambda: progress(file.tell()) or answer.read(1 << 20), b""))
        except (OSError, ValueError, http.client.HTTPException) as error:   # time-outs, resets too
            why = str(error)
        failures = 0 if path.stat().st_size > have else failures + 1
    if have < size:
        raise ValueError(f"{url}: {why}; {have:,} of {size:,} bytes are kept, run the same again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path}: {have:,} bytes with SHA-256 {digest}, expected {size:,} with "
                         f"{sha256}; delete it and run the same again")


def download_nsynth(folder="data", url=NSYNTH_URL, size=NSYNTH_SIZE, sha256=NSYNTH_SHA256):
    """NSynth's guitars as mp3, 335 MB: downloads, checks, unpacks; returns the folder of notes.

    Unpacks beside the target and renames at the end: half a set never looks like a whole one.
    Raises ValueError as `download` does, and for more than 4 GB, before anything is unpacked.
    Lifts out with: Progress, download.
    """
    target, archive, fresh = (pathlib.Path(folder, name) for name in
                              ("NSYNTH_GUITAR_MP3", "NSYNTH.zip", "unpacking"))
    if target.is_dir():
        return target
    archive.parent.mkdir(parents=True, exist_ok=True)
    download(url, archive, size, sha256)
    shutil.rmtree(fresh, ignore_errors=True)
    with zipfile.ZipFile(archive) as bundle:
        entries = bundle.infolist()
        if sum(entry.file_size for entry in entries) > 4e9:                              # 4 GB
            raise ValueError(f"{archive}: more than 4 GB inside; nothing unpacked")
        progress = Progress("unpacking", len(entries))
        for done, entry in enumerate(entries, 1):
            bundle.extract(entry, fresh)                     # what would leave the folder, stays in
            progress(done)
    os.replace(fresh, target)
    return target


class Music2Latent:
    """The Music2Latent codec [15] behind the interface of SnakeVAE: 44,100 Hz, 64 channels.

    L = (T - 1536) // 4096, at least 1: a note of 4 s is 42 frames. Its decoder starts from noise;
    here that has a seed. The package fetches its weights (233 MB) when first used: ValueError says
    where they belong when it cannot. Lifts out with: nothing.
    """
    sample_rate, hop, channels, tail = 44_100, 4096, 64, 1536

    def __init__(self, seed=0, device=None):
        import music2latent                                     # slow to load: only when it is used
        warnings.filterwarnings("ignore", ".*autocast", module="music2latent")   # said on every CPU
        self.seed = seed
        # Apple's GPUs garble this codec: there it stays on the CPU.
        self.device = torch.device("cpu" if "mps" in str(device) else device or "cpu")
        weights = pathlib.Path(music2latent.__file__).parent / "models" / "music2latent.pt"
        if not weights.exists():
            print(f"fetching Music2Latent's weights, 233 MB, to {weights}", file=sys.stderr)
        try:
            self.model = music2latent.EncoderDecoder(device=self.device)
        except Exception as error:                                 # whatever the hub may throw
            said = f"{type(error).__name__}: {error}".split(".")[0]
            raise ValueError(f"Music2Latent does not load ({said}); put music2latent.pt of "
                             f"huggingface.co/SonyCSLParis/music2latent at {weights}") from None
        self.made_from = f"music2latent {weights.stat().st_size}"

    def frames(self, samples):
        """How many frames a sound of that many samples has."""
        return max(1, (samples - self.tail) // self.hop)

    def encode(self, audio):
        """[B, T] -> [B, 64, L]; what is shorter than a frame is padded with silence."""
        padded = F.pad(audio, (0, max(0, self.hop + self.tail - audio.shape[-1])))
        # On a GPU the package answers in half precision.
        return self.model.encode(padded.to(self.device), max_batch_size=16).to(audio)

    def decode(self, latents):
        """[B, 64, L] -> [B, 4096 L + 1536]: each item from the same noise, alone or in a batch."""
        audio = []
        with torch.random.fork_rng():
            for item in latents.to(self.device).split(1):
                torch.manual_seed(self.seed)
                audio.append(self.model.decode(item).to(latents))
        return torch.cat(audio)


@torch.no_grad()
def encode_pieces(codec, recordings, first, seconds, curves, device, batch):
    """Encode recordings `first` and on, piece by piece, so that an hour takes no more memory than a
    note: yields (recording i, its frames if this is its last piece, else 0, audio [T], rows).

    Pieces of `seconds` hear one second more on each side, so that no edge is near what is kept:
    rows [frames, C], float32, with `curves` [frames, C + 2], envelope and MIDI pitch behind.
    Equally long pieces share a batch, and float32 rounds a little differently in a batch of another
    size: what shares one with `first` is encoded again, so that an encoding that was cut off ends
    with the same bits as one that was not. Lifts out with: envelope, pitch_track.
    """
    rate, hop = codec.sample_rate, codec.hop
    length, overlap = (max(1, round(s * rate / hop)) for s in (seconds, 1))              # frames

    def pieces():
        for i in range(len(recordings)):
            L = codec.frames(max(recordings.lengths[i], round(recordings.seconds * rate)))
            for a in range(0, L, length):
                begin, b = max(0, a - overlap), min(a + length, L)
                samples = (min(b + overlap, L) - begin) * hop + codec.tail
                yield samples, i, begin * hop, L * (b == L), slice(a - begin, b - begin)

    for samples, alike in itertools.groupby(pieces(), key=lambda piece: piece[0]):
        while together := list(itertools.islice(alike, batch)):
            if together[-1][1] < first:
                continue
            audio = [recordings.audio(i, begin, samples) for _, i, begin, _, _ in together]
            audio = torch.stack([F.pad(x, (0, samples - len(x))) for x in audio])        # [n, T]
            rows = codec.encode(audio.to(device)).cpu()                                  # [n, C, L]
            if curves:
                both = torch.stack([envelope(audio, hop), pitch_track(audio, rate, hop)], dim=1)
                rows = torch.cat([rows, both[..., :rows.shape[-1]]], dim=1)
            yield from ((i, L, heard, row[:, kept].T.contiguous().numpy()) for
                        (_, i, _, L, kept), heard, row in zip(together, audio, rows) if i >= first)


def encode_recordings(codec, recordings, folder, curves=False, device="cpu", seconds=8.0, batch=16):
    """Encode all recordings into folder/frames.bin and index.json; goes on where it was cut off.

    A row of frames.bin is one frame. index.json says of what it was made, and [name, frames, held
    out, figures as recorded, labels] of each recording whose rows are on the disk. Latents of
    another codec or of other data are replaced. Raises KeyboardInterrupt, after saving, on Ctrl-C.
    For the other arguments see encode_pieces.
    """
    store, flat = pathlib.Path(folder, "index.json"), pathlib.Path(folder, "frames.bin")
    made_from = [recordings.made_from, codec.made_from, recordings.seconds, curves]
    index, width, rate = read_json(store), codec.channels + 2 * curves, codec.sample_rate
    size = lambda: sum(item[1] for item in index["items"]) * width * np.float32().nbytes   # bytes
    if index.get("made_from") != made_from or not flat.exists() or flat.stat().st_size < size():
        index = {"made_from": made_from, "width": width, "items": []}
        # The index goes first: the old one would vouch for new frames.
        write_json(store, index)
    items, N, saved = index["items"], len(recordings), time.monotonic()
    if len(items) == N:
        return
    progress = Progress("encoding", N, "recordings", len(items))
    work = encode_pieces(codec, recordings, len(items), seconds, curves, device, batch)
    with open(flat, "ab") as file, postponed_interrupt() as interrupt:
        file.truncate(size())                   # away with rows of a recording left unfinished
        for i, L, sound, rows in work:
            file.write(rows)
            if not L:
                continue
            # How a held-out note is as recorded (a long one's end): `evaluate` compares with it.
            held, label, figures = bool(recordings.valid[i]), recordings.labels[i].tolist(), None
            if held:
                pitch = torch.tensor(label[:1]) if label[0] >= 0 else None
                figures = measure(sound[None], rate, codec.hop, pitch)
            items.append([recordings.names[i], L, held, figures, label])
            progress(len(items))
            if len(items) == N or interrupt or time.monotonic() - saved > 20:            # seconds
                file.flush()
                os.fsync(file.fileno())
                write_json(store, index)        # after the rows: it vouches for them
                saved = time.monotonic()
            if interrupt:
                raise KeyboardInterrupt(f"{len(items):,} recordings are saved; go on with --resume")


class LatentDataset:
    """Windows of `frames` frames out of encoded recordings, standardised, drawn by index.

    folder: what encode_recordings wrote. train [n] are the recordings to draw from; valid and start
    [N] say in which recording, and at which frame, each held-out window begins. mean, std [C] are
    of the training part. So is touch, how the notes of these recordings are played, for midi_curves
    to play others like them: [0.9 quantile of the envelope in voiced frames, its median ratio from
    one frame to the next], or None without curves. The frames live on `device`; with `disk` in the
    file, of which the system keeps as much in memory as there is room for.
    Lifts out with: nothing.
    """

    def __init__(self, folder, frames, channels, device="cpu", disk=False):
        index = json.loads(pathlib.Path(folder, "index.json").read_text())
        # A map: the file is read where it is looked at. "c" would let us change it in memory, which
        # torch insists on and nobody does.
        flat = np.memmap(pathlib.Path(folder, "frames.bin"), np.float32, "c")
        flat = flat.reshape(-1, index["width"])                               # [frames, C or C + 2]
        _, lengths, held, self.recorded, labels = map(list, zip(*index["items"]))
        held, lengths = torch.tensor(held), torch.tensor(lengths)
        self.frames, self.channels, self.device = frames, channels, device
        trained, total, squares = np.repeat(~held.numpy(), lengths.numpy()), 0.0, 0.0
        # A hundred thousand frames at a time, for a file that memory cannot hold.
        pieces = [slice(at, at + 100_000) for at in range(0, len(flat), 100_000)]
        for piece in pieces:
            rows = np.asarray(flat[piece][trained[piece], :channels], np.float64)
            total, squares = total + rows.sum(0), squares + (rows ** 2).sum(0)
        mean = torch.tensor(total / trained.sum())
        std = (torch.tensor(squares / trained.sum()) - mean ** 2).clamp_min(0).sqrt()
        # A channel that the codec hardly uses stays small instead of being blown up to size 1.
        self.mean, self.std = mean.float().to(device), std.float().clamp_min(1e-2).to(device)
        # Held-out recordings are cut from their beginning into as many windows as they have.
        windows = [(i, at) for i in held.nonzero()[:, 0].tolist()
                   for at in range(0, int(lengths[i]) - frames + 1, frames)]
        valid, start = torch.tensor(windows, dtype=torch.long).reshape(-1, 2).T
        self.labels, self.first, self.room, self.train, self.valid, self.start = (
            x.to(device) for x in (torch.tensor(labels), lengths.cumsum(0) - lengths,
                                   lengths - frames, (~held).nonzero()[:, 0], valid, start))
        self.flat = torch.from_numpy(flat) if disk else torch.tensor(flat, device=device)
        train = flat[pieces[0]][trained[pieces[0]]]                # curves: the first will do
        self.touch, voiced = None, train[:, -1] > 0
        if train.shape[1] > channels and (both := voiced[1:] & voiced[:-1]).any():
            loud, soft = train[1:, -2][both], train[:-1, -2][both].clip(1e-6)            # not 0/0
            # 0.9: louder than most, as a velocity of 127 is.
            self.touch = [float(np.quantile(loud, 0.9)), float(np.median(loud / soft))]

    def window(self, items, starts):
        """items [n], starts [n] in frames -> latents [n, C, L], labels [n, K], curves [n, 2, L] or
        None: the envelope, and the pitch in octaves from C4, where an unvoiced frame's 0 is -5.
        """
        rows = (self.first[items] + starts)[:, None] + torch.arange(self.frames, device=self.device)
        cut = self.flat[rows.to(self.flat.device)].to(self.device).transpose(1, 2)       # [n, ., L]
        x = (cut[:, :self.channels] - self.mean[:, None]) / self.std[:, None]
        if cut.shape[1] == self.channels:
            return x, self.labels[items], None
        envelopes, pitches = cut[:, self.channels:].unbind(1)
        octaves = (pitches - 60) / 12                                              # MIDI 60 is C4
        return x, self.labels[items], torch.stack([envelopes, octaves], dim=1)

    def batch(self, n, generator):
        """n random windows of the training part; generator on the data's device."""
        chosen = torch.randint(len(self.train), (n,), generator=generator, device=self.device)
        where, items = torch.rand(n, generator=generator, device=self.device), self.train[chosen]
        return self.window(items, (where * (self.room[items] + 1)).long())

    def held_out(self, which=slice(None)):
        """Windows of held-out recordings."""
        return self.window(self.valid[which], self.start[which])


# --------------------------------------------------------------------------------------------------
# 9. Training: how do we get good weights, and never lose them?
# --------------------------------------------------------------------------------------------------
# One loop serves both networks: draw a batch, pass forward and backward, let Adam change the
# weights a little against the gradient, average, and now and then say how it goes and save.
#
# Learning rate. It warms up, stays, and falls as 1/sqrt(step). It does not know when the training
# will end, so a run that is continued goes exactly the way of one that was longer from the start.
# Other schedules fall to zero at the end, so that the weights come to rest: a batch is a sample,
# its gradient is off by chance, and late weights rattle about the best ones. The moving average of
# the weights (EMA) is near what they rattle about, and to be had at any step ([21] section 3.1).
#
# Speed. Clipping, Adam and the average hardly calculate, but each goes over all weights, in memory.
# The less of that, the better: the diffusion model's weights lie in one piece (side_by_side), and
# the average is taken at every fourth step only. The log says what share of a step is left for
# forward and backward passes, the part that learns.
#
# Checkpoints. Saved is everything that the next step depends on: weights, average, Adam's memory,
# the state of the random generator. So training that was stopped and resumed ends with the bits of
# one that was not. write_file sees to it that at any moment the old or the new state is whole.
#
# More than one GPU. `torchrun --nproc-per-node 2 -- minidiff.py train` starts this program once for
# each GPU. One of these processes, "rank" 0, trains the codec and encodes, while the others wait;
# the diffusion model all train together. Each has the same weights. DistributedDataParallel (DDP)
# waits in every backward pass until the gradients of all ranks are there, and gives each rank their
# mean: all take the same step, and the weights stay the same. For this to be the training of one
# process, the ranks' items must make up its batch. So each rank draws the *whole* batch, with its
# times, noise and dropped conditions, from a generator of the same seed, and gives its network
# every N-th item: rank 0 the items 0, N, 2N, ..., rank 1 the items 1, N + 1, ... To draw costs
# little, the network nearly all. The mean of the gradients is then that of the whole batch,
# whatever N is, and rank 0, which alone writes, saves a generator's state that resumes the run on
# any number of GPUs.
#
# Try: `python minidiff.py train --run runs/bare --without ema`, which takes the last weights; copy
# codec.pt from runs/plucks into runs/bare first, and the codec is not trained again. Compare the
# held-out loss, and the notes, with those of runs/plucks.
FORMAT = 1
# Which noise to train on? Images are trained at sigma/alpha = e^N(0, 1) ([2]) or, with deviation
# 0.5, e^N(-1.2, 1.2^2) ([3]). All 63 frames of a note say nearly the same, so that it shows through
# more noise than a pixel does: most strings keep their pitch at t = 0.67, and few at 0.89 (README,
# from a sound to a sound). What is between makes the note, and is where a network must be good. A
# quarter of the times sigmoid(N(0, 1)) is above 0.67, and three in five of sigmoid(N(1, 1)).
OBJECTIVES = {"rf": lambda: RectifiedFlow(p_mean=1.0), "edm": lambda: EDM(p_mean=1.0, p_std=1.0),
              "vp": VPDiffusion}


class EMA:
    """A moving average of a module's weights; `module` is the averaged copy ([21] section 3.1).

    average <- d average + (1 - d) weights, d = min(decay, (1 + k)/(10 + k)) at update k: it spans
    the last tenth of the steps until `decay` takes over, so the random start is soon forgotten.
    Lifts out with: nothing.
    """

    def __init__(self, module, decay=0.999):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module):
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))                # 10: see above
        averages, weights = ([*n.parameters(), *n.buffers()] for n in (self.module, module))
        torch._foreach_lerp_(averages, weights, 1 - d)             # all at once

    def state_dict(self):
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]


def side_by_side(net):
    """Lay all weights of net into one long Parameter, all gradients into its .grad; returns it.

    The parameters of net become views of it, and train as before; but clipping and Adam go over
    memory once, not over a hundred small tensors. Clear the gradients with .grad.zero_(): None
    would part them. Move net to its device before. Lifts out with: nothing.
    """
    weights = nn.Parameter(nn.utils.parameters_to_vector(net.parameters()).detach())
    weights.grad, sizes = torch.zeros_like(weights), [p.numel() for p in net.parameters()]
    parts = zip(net.parameters(), weights.data.split(sizes), weights.grad.split(sizes))
    for p, weight, gradient in parts:
        p.data, p.grad = weight.view_as(p), gradient.view_as(p)
    return weights


def save_checkpoint(path, **state):
    """Write tensors, numbers, strings, lists and dicts as write_file does, OSError included.
    Lifts out with: write_file.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    write_file(path, content.getbuffer())


def load_checkpoint(path, mmap=False):
    """What save_checkpoint wrote, on the CPU. Code in the file is refused, not run (weights_only).

    mmap: tensors stay on the disk until they are looked at, for who wants the settings only.
    ValueError if it is missing, no checkpoint, or of another format. Lifts out with: nothing.
    """
    why, state = "has none", {}
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:                                  # a broken pickle may raise anything
        why = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
    if (found := state.pop("format", why)) != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}; "
                         "train first, name another run, or restore a copy")
    return state


@contextlib.contextmanager
def fitting(path):
    """Within it, what a checkpoint lacks or has in another shape is a ValueError that names `path`
    and the field. Lifts out with: nothing.
    """
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[:2][-1].strip()[:99]      # the first that does not fit
        raise ValueError(f"{path} does not fit: {type(error).__name__} {reason}: choose another "
                         "--run, or make it anew") from None


def rank_and_world():
    """(which process am I, of how many): (0, 1) without torchrun. Lifts out with: nothing."""
    group = torch.distributed
    several = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if several else (0, 1)


def wished(*wishes):
    """What any rank wishes (bools), all do: a list of bools. No GPU is asked. Lifts out with:
    rank_and_world.
    """
    votes = torch.tensor(wishes).float()
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(votes)
    return (votes > 0).tolist()


def learning_rate(step, peak, warmup=100, settle=500):
    """peak min((step + 1)/warmup, 1, sqrt(settle/step)) ([21] eq. 67). Lifts out with: nothing."""
    return peak * min((step + 1) / warmup, 1.0, math.sqrt(settle / max(step, 1)))


class Stopwatch:
    """`with watch` around some of the work: watch.share() is its part of the time since the start.

    A GPU works behind the program's back, so it is asked for its own time, with marks in the queue
    of its work; nobody waits for them before share(), which does. Lifts out with: nothing.
    """

    def __init__(self, device):
        self.gpu, self.marks = torch.device(device).type == "cuda", []
        self.mark()

    def mark(self, *_):
        self.marks.append(torch.cuda.current_stream().record_event(
            torch.cuda.Event(enable_timing=True)) if self.gpu else time.perf_counter())

    __enter__ = __exit__ = mark

    def share(self):
        self.mark()
        began, *inside, ended = self.marks
        if self.gpu:
            torch.cuda.synchronize()
        took = lambda a, b: a.elapsed_time(b) if self.gpu else b - a
        return sum(map(took, inside[::2], inside[1::2])) / took(began, ended)


def read_means(what, unread, done, rate):
    """{name: mean} of the last steps' dicts; ValueError, with the learning rate, for what is not
    finite. Lifts out with: nothing.
    """
    read = [{name: float(value) for name, value in seen.items()} for seen in unread]
    for step, seen in enumerate(read, done - len(read)):
        if not all(map(math.isfinite, seen.values())):
            raise ValueError(
                f"{what}: the loss is not finite at step {step + 1}, learning rate {rate:.3g}; "
                "what was saved last is good: --resume with a smaller --lr or --precision fp32 "
                "(a codec: with another --seed and --run)")
    return {k: np.mean([seen[k] for seen in read if k in seen]) for k in read[-1]}


def saved_state(path, what, parts, generator, resume):
    """Where training_loop begins: (step, rows of log.csv); to resume, parts and generator get what
    it saved at `path`. ValueError if that does not fit. Lifts out with: fitting, load_checkpoint.
    """
    step, log = 0, path.parent / "log.csv"
    if resume and path.exists():
        state = load_checkpoint(path)
        with fitting(path):
            for name, part in parts.items():
                part.load_state_dict(state[name])
            generator.set_state(state["generator"])
            step = state["step"]
    rows = log.read_text().splitlines(True) if log.exists() else ["phase,step,quantity,value\n"]
    # The log is written before the checkpoint. If the run was killed in between, the rows of `what`
    # that are ahead of the checkpoint will come again.
    return step, [r for r in rows if r.split(",")[0] != what or int(r.split(",")[1]) <= step]


def training_loop(what, net, weights, draw, learn, report, path, steps, lr, betas, max_norm,
                  generator, resume=False, settings=None, every=50, batch_size=1, minutes=math.inf,
                  without=(), **parts):
    """Train net for `steps` or `minutes`: batch = draw(), learn(step, batch) -> {name: scalar}, the
    forward and backward pass, then a step of Adam on `weights`; returns the averaged net.

    `path` gets the states of all parts, step and settings, each minute and at the end. Each `every`
    steps the scalars are read (this waits for a GPU) and logged with report(means, averaged net) ->
    (more numbers, text). ValueError when one is not finite, `path` kept; KeyboardInterrupt, after
    saving.
    """
    path, (rank, _), clock = pathlib.Path(path), rank_and_world(), time.monotonic
    optimiser = torch.optim.AdamW(weights, lr, betas=betas, fused=True)
    ema = EMA(net, decay=0.0 if "ema" in without else 0.996)
    parts |= {"net": net, "optimiser": optimiser, "ema": ema}
    start, rows = saved_state(path, what, parts, generator, resume)
    device, progress = next(net.parameters()).device, Progress(what, steps, "steps", start)
    # Is it finite? To ask a GPU is to wait for it: it copies the norm to here, some steps late.
    gradient = torch.zeros((), pin_memory=device.type == "cuda")
    began = saved = looked = clock()
    unread, watch = [], Stopwatch(device)

    def descend(step):                                  # this is training; the rest is bookkeeping
        optimiser.param_groups[0]["lr"] = lr if "schedule" in without else learning_rate(step, lr)
        batch = draw()
        with watch:
            seen = learn(step, batch)
        seen["gradient"] = nn.utils.clip_grad_norm_(weights, max_norm)
        optimiser.step()
        if step % 4 == 0 or "ema" in without:          # 0.996 = 0.999^4: the same average
            ema.update(net)
        return {name: value.detach() for name, value in seen.items()}

    with postponed_interrupt() as interrupt:
        for done in range(start + 1, steps + 1):
            unread.append(descend(done - 1))
            gradient.copy_(unread[-1]["gradient"], non_blocking=True)
            asked, over = wished(bool(interrupt), clock() - began > 60 * minutes)             # 60 s
            last = over or done == steps
            if done % every and not (asked or last) and gradient.isfinite():
                continue
            means = read_means(what, unread, done, optimiser.param_groups[0]["lr"])
            speed, share = batch_size * len(unread) / (clock() - looked), watch.share()
            more, text = report(means, ema.module)
            rows += [f"{what},{done},{k},{v:.6g}\n" for k, v in (means | more).items()]
            if rank == 0:
                progress.total = done if last else steps
                progress(done, f"{speed:,.0f} sounds/s, {share:.0%} forward and backward; {text}")
            if rank == 0 and (last or asked or clock() - saved > 60):                # 60 seconds
                write_file(path.parent / "log.csv", "".join(rows).encode())    # first: saved_state
                save_checkpoint(path, step=done, complete=last, settings=settings,
                                generator=generator.get_state(),
                                **{name: part.state_dict() for name, part in parts.items()})
                saved = clock()
            if asked:
                raise KeyboardInterrupt(f"{what}: {done:,} steps are saved; go on with --resume")
            if last:
                break
            unread, looked, watch = [], clock(), Stopwatch(device)
    return ema.module


def train_codec(codec, recordings, steps, path, seed=0, device="cpu", batch_size=4, lr=5e-4,
                crop=4096, kl_weight=1e-3, adversarial_from=None, **how):
    """Train a SnakeVAE on random windows of `crop` samples; its averaged weights end in `codec`.

    L1, L2, STFT and, from step `adversarial_from` on (None: never), the two losses that come from
    the discriminator, the `judge`, go through the balancer, the KL beside it (seeds/004). The log
    shows each loss and its share of the gradient.
    how: resume, settings, minutes of training_loop.
    """
    generator, betas = torch.Generator().manual_seed(seed), (0.8, 0.99)                       # [10]
    codec, judge = codec.to(device).train(), STFTDiscriminator().to(device)
    judge_optimiser = torch.optim.AdamW(judge.parameters(), lr, betas=betas, fused=True)
    # L1 pulls on the quiet end of a note, where a young codec is least in tune, as hard as on its
    # beginning: its gradient is a sign.
    balancer = LossBalancer({"l1": 2, "l2": 1, "stft": 4, "adversarial": 1, "features": 2})

    def draw():
        return recordings.crops(batch_size, crop, generator).to(device)                  # [B, T]

    def learn(step, audio):
        codec.zero_grad()
        mean, log_variance = codec.posterior(audio)                                 # [B, C, L] each
        noise = standard_normal(mean.shape, generator, device)
        output = codec.decode(mean + torch.exp(log_variance / 2) * noise)[:, :crop]      # [B, T]
        losses = {"l1": (output - audio).abs().mean(), "l2": (output - audio).square().mean(),
                  "stft": stft_loss(output, audio)}
        # A channel whose mean varies by less than 0.1 says nothing.
        seen = {"kl": kl_divergence(mean, log_variance), "active": (mean.std((0, 2)) > 0.1).sum()}
        if adversarial_from is not None and step >= adversarial_from:
            # The judge learns from a detached copy: its step must not teach the codec anything.
            seen["judge"] = hinge_discriminator_loss(judge(audio)[0], judge(output.detach())[0])
            judge_optimiser.param_groups[0]["lr"] = learning_rate(step, lr)
            judge_optimiser.zero_grad()
            seen["judge"].backward()
            judge_optimiser.step()
            (logits, fake), (_, real) = judge(output), judge(audio)
            losses |= {"adversarial": hinge_generator_loss(logits),
                       "features": feature_matching_loss(real, fake)}
        balancer.backward(losses, output, free={"kl": kl_weight * seen["kl"]})
        return losses | seen | {f"{name} share": s for name, s in balancer.shares.items()}

    def report(means, _):
        return {}, (f"l1 {means['l1']:.3f}, stft {means['stft']:.3f}, kl {means['kl']:.2f}, "
                    f"{means['active']:.0f} of {codec.channels} channels active")

    # Gradients have norms of 15 to 32 (means of 50 steps of the demo): nearly all are cut to 10.
    average = training_loop(
        "codec", codec, list(codec.parameters()), draw, learn, report, path, steps, lr, betas,
        max_norm=10.0, generator=generator, batch_size=batch_size, judge=judge, balancer=balancer,
        judge_optimiser=judge_optimiser, **how)
    codec.load_state_dict(average.state_dict())


@torch.no_grad()
def codec_distances(codec, recordings, device="cpu", most=64):
    """(spectral convergence, log-spectral distance in dB) of held-out recordings through the codec.

    The second is the root mean square over frequencies of 20 log10 S_t / S_e, mean over frames.
    Means over the first recordings, at most `most`. Lifts out with: magnitudes, spectral_distances.
    """
    found, length = [], round(recordings.seconds * recordings.sample_rate)
    for i in recordings.valid.nonzero()[:most, 0].tolist():
        audio = recordings.audio(i, 0, length)[None].to(device)                          # [1, T]
        output = codec.decode(codec.encode(audio))[:, :audio.shape[1]]
        convergence, logs = spectral_distances(output, audio, 1024)        # 1024: 1/16 s at 16 kHz
        decibels = 20 / math.log(10) * logs.square().mean(1).sqrt()        # 20 log10: of magnitudes
        found.append([convergence.item(), decibels.mean().item()])
    return np.mean(found, axis=0).tolist()


def conditions(condition, labels, curves):
    """What a network is given for "note", "control" or "none". Lifts out with: nothing."""
    return {"note": {"labels": labels}, "control": {"controls": curves}, "none": {}}[condition]


def drop_conditions(labels, curves, generator, p=0.1):
    """Withhold conditions at random, so that every subset of them is learnt ([4] Algorithm 1).

    labels [B, K], curves [B, n, L] or None: each slot and each curve of each item goes with
    probability p on its own, and all of an item's with p once more. Lifts out with: nothing.
    """
    def kept(x):
        drop = torch.rand(len(x), x.shape[1] + 1, generator=generator, device=x.device) < p
        return ~(drop[:, 1:] | drop[:, :1])                                              # [B, K]

    labels = torch.where(kept(labels), labels, -1)
    if curves is not None:
        curves = torch.where(kept(curves)[..., None], curves, math.nan)
    return labels, curves


def reference_losses(objective, x, noise, t):
    """(zero, Gaussian): losses on x [B, C, L], noise, t [B] of two networks that learnt nothing.

    The first answers 0. The second is the best there is for data N(0, I), where E[x_0 | x_t] and
    E[noise | x_t] are alpha and sigma times x_t / (alpha^2 + sigma^2). A loss below it has found
    structure. Lifts out with: expand.
    """
    t = expand(t, x)
    alpha, sigma, target = objective.alpha(t), objective.sigma(t), objective.target(x, noise, t)
    guess = objective.add_noise(x, noise, t) / (alpha ** 2 + sigma ** 2)
    gaussian = objective.target(alpha * guess, sigma * guess, t)
    return target.square().mean().item(), (target - gaussian).square().mean().item()


def train_diffusion(net, objective, data, steps, path, seed=0, batch_size=32, lr=1.5e-3,
                    condition="none", precision="fp32", compiled=False, **how):
    """Train net on windows of `data` (a LatentDataset); returns the network of averaged weights.

    condition: "note" (labels), "control" (curves) or "none". The held-out loss is of the averaged
    weights, at the same noise and times each time, so that two of them can be compared.
    compiled: by torch.compile. how: resume, settings, every, minutes, without of training_loop.
    """
    device, (rank, world) = data.device, rank_and_world()
    generator, fixed = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(0)
    weights = side_by_side(net)
    model = torch.compile(net) if compiled else net
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    held, labels, curves = data.held_out(slice(256))               # enough for two digits
    held_noise = standard_normal(held.shape, fixed, device)
    held_t = objective.sample_times(len(held), fixed).to(held)
    held_cond = conditions(condition, labels, curves)
    zero, gaussian = reference_losses(objective, held, held_noise, held_t)
    trained = copy.copy(objective)            # without "levels": e^N(0, 1), as [2] and the tutorial
    trained.p_mean = 0.0 if "levels" in how.get("without", ()) else objective.p_mean
    cast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")

    def draw():
        x, labels, curves = data.batch(batch_size, generator)                            # [B, C, L]
        cond = conditions(condition, *drop_conditions(labels, curves, generator))
        t = trained.sample_times(batch_size, generator).to(x)                            # [B]
        noise, mine = standard_normal(x.shape, generator, device), slice(rank, None, world)
        return x[mine], noise[mine], t[mine], {k: v[mine] for k, v in cond.items()}

    def learn(_, batch):
        weights.grad.zero_()
        x, noise, t, cond = batch
        with cast:
            loss = objective.loss_at(model, x, noise, t, **cond)
        loss.backward()
        loss = loss.detach() / world
        if world > 1:
            torch.distributed.all_reduce(loss)                     # the sum over the ranks
        return {"loss": loss}

    def report(means, average):
        with torch.no_grad(), cast:
            valid = objective.loss_at(average, held, held_noise, held_t, **held_cond).item()
        return {"held out": valid, "zero network": zero, "ideal Gaussian": gaussian}, (
            f"loss {means['loss']:.3f}, held out {valid:.3f} "
            f"(zero network {zero:.3f}, ideal Gaussian {gaussian:.3f})")

    # Gradients have norms of 0.7 to 1.1 (means of 50 steps of the demo): at 1, a rare bad batch
    # pulls no harder than others.
    return training_loop("diffusion", net, [weights], draw, learn, report, path, steps, lr,
                         betas=(0.9, 0.99), max_norm=1.0, generator=generator,
                         batch_size=batch_size, **how)


def take_out(net, without):
    """Leave ideas out of a UNet1d, to see what they are worth; returns it.

    without: any of "attention", "norm", "position", "residuals" (no sums around blocks), "time" (t
    and labels reach the middle block alone).
    Lifts out with: FrameConv, ResidualBlock, SelfAttention, UNet1d, time_embedding.
    """
    for part in net.modules():
        if isinstance(part, SelfAttention) and "attention" in without:
            part.forward = lambda x: x
        if isinstance(part, nn.LayerNorm) and "norm" in without:
            part.forward = lambda x: x
        if isinstance(part, UNet1d) and "position" in without:
            part.position.forward = lambda waves: 0.0
        if isinstance(part, ResidualBlock) and "residuals" in without:
            part.skip.forward = lambda x: 0.0
        if isinstance(part, ResidualBlock) and "time" in without and part is not net.middle:
            width = part.modulate.out_features
            part.modulate.forward = lambda e, width=width: e.new_zeros(len(e), width)
    return net


def build_net(s):
    """The network that a run's settings describe, with random weights."""
    if s["net"] == "tutorial":
        return TutorialUNet(s["channels"])
    labels = (128, 128, len(s["sources"])) if s["condition"] == "note" else ()       # MIDI's ranges
    # Curves say where we are in a sound, in one that is longer than those of the training too.
    curves = s["condition"] == "control"
    # 96 wide is half the work of 128: in the same time more steps, which are worth more at first.
    net = UNet1d(s["channels"], 96, label_sizes=labels, controls=2 * curves,
                 window=1 if curves else s["frames"])
    return take_out(net, s["without"])


def open_codec(path, settings, device):
    """The finished codec of a run; ValueError when it is missing, unfinished, or another run's.
    """
    if settings["codec"] == "music2latent":
        return Music2Latent(settings["seed"], device)
    state, rate = load_checkpoint(path), settings["sample_rate"]
    with fitting(path):
        if not state["complete"] or state["settings"]["sample_rate"] != rate:
            raise ValueError(f"{path}: step {state['step']}, {state['settings']['sample_rate']} Hz;"
                             f" expected a finished codec at {rate} Hz, go on with train --resume")
        average = EMA(SnakeVAE(rate))
        average.load_state_dict(state["ema"])
    codec = average.module
    weights = b"".join(value.numpy().tobytes() for value in codec.state_dict().values())
    codec.made_from = hashlib.sha256(weights).hexdigest()  # latents remember by what they were made
    if settings.get("made_from", codec.made_from) != codec.made_from:
        raise ValueError(f"{path} is another codec than the one that model.pt has learnt with: "
                         "restore that, or train a model in another --run")
    return codec.to(device)


# --------------------------------------------------------------------------------------------------
# 10. Listening and measuring: is it any good?
# --------------------------------------------------------------------------------------------------
# `generate` puts chapters 1 to 3 together, a Run is what training left behind, and a page lets you
# hear and see each sound beside what was asked for. Then come three questions, and beside each a
# ceiling or a floor: what real notes get, for a model cannot be asked to do better than they do.
#
#     Is it what was asked?   Share of notes within 50 cents of their pitch. Ceilings: real notes
#                             (does the tracker hear right?), and real notes through the codec,
#                             since what the codec spoils no latent can mend.
#     Is it like the data?    Frechet distance between latents of generated notes and of half of the
#                             held-out ones. Floor: that of the other half. It is above 0 though
#                             both are real, for means and covariances of N notes are estimates;
#                             and so a distance a little below it is no better than the floor.
#     Is it new?              Distance to the nearest training note, over that of held-out notes:
#                             about 1 is as new as those are, far below 1 is memory and not music.
#
# And what does it cost? network_share is the part of the time of sampling that is spent inside the
# network: near 1, only a smaller network or fewer evaluations could make it faster, not a quicker
# sampler. real_time_factor is seconds of sound over seconds of work, codec included, when `count`
# sounds are made at once: above 1, they come faster than they play.
#
# Try `evaluate --run runs/plucks --steps 4`, a quarter of the work: which figures get worse, which
# better, and do your ears agree? At w = 2 README.md has both in its first table.


def schedule(objective, grid, steps, start=None, sigma_min=0.002, sigma_max=80.0, rho=None):
    """Times of any objective, `start` to 0, float64 on the CPU: [steps + 1]. rho None is the usual.

    "linear" is even in t; "karras" and "polyexponential" lay out sigma/alpha, from sigma_max (or
    what it is at `start`, if less) to sigma_min. ValueError for another grid.
    Lifts out with: karras_times, linear_times, noise_ramp, polyexponential_times.
    """
    start = torch.tensor(objective.t_max if start is None else start, dtype=torch.float64)
    if grid == "linear":
        return linear_times(steps, start.item())
    if grid not in ("karras", "polyexponential"):
        raise ValueError(f"unknown grid {grid!r}; expected linear, karras or polyexponential")
    top = min(sigma_max, (objective.sigma(start) / objective.alpha(start)).item())
    make = karras_times if grid == "karras" else polyexponential_times
    levels = make(steps, min(sigma_min, top), top, *([] if rho is None else [rho]))
    return F.pad(objective.time_at(levels[:-1]), (0, 1))


def generate(net, objective, shape, sampler="heun", steps=9, seed=0, times=None, eta=1.0,
             init=None, init_noise=None, keep=None, noise=None, callback=None, device="cpu",
             **cond):
    """Sample standardised latents of `shape` [B, C, L]: noise, then a sampler of chapter 3.

    Item i's noise comes from seed + i, on the CPU: the same in any batch and on any device. times
    [steps + 1] are the objective's own unless given (see `schedule`). init [B, C, L] starts from
    latents at noise level init_noise: 0 gives them back, the largest ignores them, all steps run
    from there. keep [L] bool holds those frames of init fixed while the rest grows around them.
    Gradients flow to a `noise` that wants them, one step's activations at a time. ValueError:
    unknown sampler, noise level out of range.
    Lifts out with: dpmpp_3m_sde, euler, heun, standard_normal.
    """
    if sampler not in ("euler", "heun", "dpmpp_3m_sde"):
        raise ValueError(f"unknown sampler {sampler!r}; expected euler, heun or dpmpp_3m_sde")
    top = objective.t_max if init is None or init_noise is None else init_noise
    if not 0 <= top <= objective.t_max:
        raise ValueError(f"the noise level must lie between 0 and {objective.t_max}, got {top}")
    if top == 0:
        return init
    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    noise = standard_normal(shape, generators, device) if noise is None else noise
    times = objective.times(steps, top) if times is None else times
    # At the top the data are lost: nothing of init is left to start from.
    signal = torch.zeros_like(noise) if init is None or top == objective.t_max else init
    x = objective.add_noise(signal, noise, times[0].item())
    frugal = lambda *args, **kwargs: checkpoint(net, *args, use_reentrant=False, **kwargs)
    ask = frugal if noise.requires_grad else net

    def denoise(x_t, t):
        x_0 = objective.denoise(ask, x_t, t, **cond)
        # For frames that are known, so is the answer: their x_t runs straight back to init.
        return x_0 if keep is None else torch.where(keep, init, x_0)

    def velocity(x_t, t):
        if keep is None:
            return objective.velocity(ask, x_t, t, **cond)
        return objective.velocity_to(denoise(x_t, t), x_t, t)

    with torch.set_grad_enabled(noise.requires_grad):
        if sampler == "dpmpp_3m_sde":
            return dpmpp_3m_sde(denoise, x, times, eta, objective.alpha, objective.sigma,
                                generators, callback)
        return (heun if sampler == "heun" else euler)(velocity, x, times, callback)


class Run:
    """A trained run, opened: settings, codec, objective, net (averaged weights), mean, std [C, 1].

    Raises ValueError naming what is missing or does not fit.
    """

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = pathlib.Path(folder), device
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: no such run; train first, or name another with --run")
        state = load_checkpoint(self.folder / "model.pt")
        with fitting(self.folder / "model.pt"):
            self.settings = s = state["settings"]
            self.codec = open_codec(self.folder / "codec.pt", s, device)
            self.objective, average = OBJECTIVES[s["objective"]](), EMA(build_net(s))
            average.load_state_dict(state["ema"])
            self.net = average.module.to(device)
            self.mean, self.std = torch.tensor([s["mean"], s["std"]], device=device)[..., None]

    def decode(self, latents, batch=16):
        """Standardised latents [B, C, L] -> audio [B, T] on the CPU, a few at a time."""
        progress, audio = Progress("decoding", len(latents), "sounds"), []
        for part in latents.split(batch):
            audio.append(self.codec.decode(part * self.std + self.mean).float().cpu())
            progress(sum(map(len, audio)))
        return torch.cat(audio)

    def generate(self, net, shape, sampler, steps, seed, **how):
        """`generate`'s latents [B, C, L], and the way of the first: a list of (t, x [C, L])."""
        progress, path = Progress("sampling", steps, "steps"), []
        look = lambda i, t, x: path.append((t, x[0].clone())) or progress(i)   # not all of x stays
        x = generate(net, self.objective, shape, sampler, steps, seed, callback=look,
                     device=self.device, **how)
        look(steps, 0.0, x)
        return x, path

    def conditions(self, labels, curves):
        given = conditions(self.settings["condition"], labels, curves)
        return {name: value.to(self.device) for name, value in given.items()}

    def sampler(self, name=None, steps=None):
        name = name or "heun"
        return name, steps or (9 if name == "heun" else 16)        # 2 * 9 - 1 evaluations, or 16


def png(grey):
    """Shades [rows, columns], 0 black, 1 white: data URI of a PNG. Lifts out with: nothing."""
    head = struct.pack(">IIBBBBB", *grey.T.shape, 8, 0, 0, 0, 0)               # 8 bits, grey
    rows = F.pad((grey.clamp(0, 1) * 255).byte(), (1, 0)).cpu().numpy()        # a 0 opens each row
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")
    data = b"".join(struct.pack(">I", len(body)) + kind + body
                    + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def portrait(audio, rate, top=3000, columns=320, rows=65):
    """Shades [., L] of audio [T]: its spectrogram up to `top` Hz; below, its waveform's outline.
    Black is loudest, white 80 dB less. Lifts out with: envelope.
    """
    # A window of 1/16 s parts a low string's harmonics.
    size, hop = 2 ** round(math.log2(rate / 16)), -(-len(audio) // columns)
    peaks = envelope(audio[None], hop)                                         # [1, L]
    S = torch.stft(audio, size, hop, window=torch.hann_window(size), pad_mode="constant",
                   return_complex=True).abs()[1:top * size // rate + 1, :peaks.shape[1]].flip(0)
    decibels = 20 * (S / S.max().clamp_min(1e-9)).clamp_min(1e-4).log10()      # 0 down to -80
    return torch.cat([decibels / -80, torch.linspace(1, -1, rows)[:, None].abs() > peaks])    # 80


def chart(title, x_name, lines, log=False, left=52, right=262, top=10, bottom=160, apart=16):
    """An SVG figure of lines {name: [(x, y)]}, y from 0 or, if log, from the least on a log axis.
    Dashes, and the names at their ends, tell them apart. What has no place (NaN, infinity, 0 if
    log) is left out; "" if nothing is left. Text is escaped. Lifts out with: nothing.
    """
    place, value = (math.log, math.exp) if log else (float, float)
    able = lambda y: 0 < y < math.inf or y == 0 and not log                    # NaN is neither
    lines = {name: kept for name, line in lines.items()
             if (kept := [(x, place(y)) for x, y in line if able(y)])}
    if not lines:
        return ""
    xs, ys = zip(*itertools.chain(*lines.values()))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys) if log else 0, max(ys)
    X = lambda x: round(left + (right - left) * (x - x0) / (x1 - x0 or 1), 1)
    Y = lambda y: round(bottom + (top - bottom) * (y - y0) / (y1 - y0 or 1), 1)
    write = lambda x, y, text: f'<text x="{x}" y="{y}">{html.escape(text)}</text>'
    marks, said, below = [write(left, bottom + 2 * apart, x_name)], [title], 0 - top
    for x, y in (x0, y0), ((x0 + x1) / 2, (y0 + y1) / 2), (x1, y1):
        marks += [write(0, Y(y), f"{value(y):.3g}"), f'<path d="M{left} {Y(y)}H{right}"/>',
                  f'<g text-anchor="middle">{write(X(x), bottom + apart, f"{x:.4g}")}</g>']
    dashes = itertools.cycle(("", "7 4", "2 3", "9 3 2 3"))
    for name, line in sorted(lines.items(), key=lambda named: -named[1][-1][1]):   # the top first
        below = max(Y(line[-1][1]), below + apart)                         # names never meet
        said.append(f"{name} {value(line[-1][1]):.3g}")
        points = " ".join(f"{X(x)},{Y(y)}" for x, y in line)
        marks += [f'<polyline points="{points}" stroke-dasharray="{next(dashes)}"/>',
                  write(right + apart / 2, below, said[-1])]
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 400 200" role='
            f'"img" aria-label="{html.escape("; ".join(said))}">{"".join(marks)}</svg></figure>')


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>body {{ font: 1rem/1.4 sans-serif; margin: auto; max-width: 75rem; padding: 0 1rem }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }}
figure {{ margin: 0; padding: .75rem; border: 1px solid #888; overflow-wrap: anywhere }}
audio, img, svg {{ width: 100%; display: block; margin-top: .5rem }} img {{ height: 12rem }}
svg {{ font-size: 13px; dominant-baseline: middle; stroke-width: 1.6 }} path {{ stroke: #ccc }}
polyline {{ fill: none; stroke: #000 }} hr {{ grid-column: 1 / -1; width: 100% }}</style>
<h1>{title}</h1><p>real: kept from training; codec: through the codec; generated: from noise.
Time runs to the right; 0 to 3000 Hz upwards, dark is loud; below, the outline of the waveform.</p>
<main>{figures}</main></html>
"""


def write_page(run, folder, fresh={}):
    """Write folder/index.html, self-contained: sounds to hear and see, and charts of the Run.

    `fresh` {name: figure} stand before those that page.json remembers; a chart whose file is
    missing is left out.
    """
    figures = fresh | read_json(folder / "page.json") | fresh
    write_json(folder / "page.json", figures)
    path, log = figures.pop("path", ""), run.folder / "log.csv"
    rows = [row.split(",") for row in log.read_text().splitlines()] if log.exists() else []

    def losses(phase, *names):
        lines = {name: [(int(step), float(value)) for kind, step, quantity, value in rows
                        if (kind, quantity) == (phase, name)] for name in names}
        return chart(f"{phase}: losses, log axis", "step of the training", lines, log=True)

    (name, steps), measured = run.sampler(), read_json(run.folder / "evaluation.json")
    t = run.objective.times(steps)
    levels = {name: [*enumerate((run.objective.sigma(t) / run.objective.alpha(t)).tolist())]}
    tuned = {float(w): share for w, share in measured.get("pitch_accuracy", {}).items()}
    shares = {kind: [(w, measured[f"pitch_accuracy_{kind}"]) for w in tuned]
              for kind in ("real", "codec")} | {"generated": [*tuned.items()]}
    every = [*figures.values(), "<hr>", path,
             losses("diffusion", "loss", "held out", "zero network", "ideal Gaussian"),
             losses("codec", "l1", "stft", "kl"),
             chart("noise level sigma / alpha, log axis", "step of the sampler", levels, log=True),
             chart("notes in tune", "guidance scale w", shares)]
    page = PAGE.format(title=html.escape(f"minidiff: {run.folder.name}"), figures="\n".join(every))
    write_file(folder / "index.html", page.encode())


def write_sounds(run, folder, sounds, path):
    """Write sounds [(name, text, label [K], audio [T])] and their page; print how each came out.

    path is from Run.generate. Names are not to be trusted.
    """
    fresh, rate = {}, run.codec.sample_rate
    figure = lambda words, body: f"<figure><figcaption>{words}</figcaption>{body}</figure>"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text, (pitch, velocity, source), audio in sounds:
        file, title = folder / f"{name}.wav", html.escape(name)
        peak = save_audio(str(file), audio, rate)
        track = pitch_track(audio[None], rate, round(rate / 60), low=20.0)     # 60 frames a second
        heard = note_pitch(track).item()
        said = [text, f"pitch {pitch}" * (pitch >= 0), f"velocity {velocity}" * (velocity >= 0),
                "" if source < 0 else run.settings["sources"][source],
                "no pitch heard" if math.isnan(heard) else f"heard {heard:.2f}",
                f"{100 * (heard - pitch):+.0f} cents" * (pitch >= 0 and heard > 0),   # a semitone
                f"peak {peak:.2f}" + ", scaled down to 1" * (peak > 1)]
        print(f"{file}:", said := "; ".join(filter(None, said)))
        sound, picture = base64.b64encode(file.read_bytes()).decode(), png(portrait(audio, rate))
        fresh[name] = "<hr>" * (not fresh) + figure(                # a row begins with each call
            f"<b>{title}</b><br>{html.escape(said)}", f'<audio controls src="data:audio/wav;base64,'
            f'{sound}"></audio><img src="{picture}" alt="spectrogram and waveform of {title}">')
    path = [path[round(k * (len(path) - 1) / 5)] for k in range(6)]            # six, evenly
    strips = [F.pad(x / x.std() / 6 + 0.5, (0, 0, 0, 2), value=1) for _, x in path]    # -3 to 3
    said = "the first sound out of noise: latents at t = " + ", ".join(f"{t:.2g}" for t, _ in path)
    fresh["path"] = figure(said, f'<img src="{png(torch.cat(strips))}" alt="{said}">')
    write_page(run, folder, fresh)
    print(f"listen to them at {folder / 'index.html'}")


def frechet_distance(a, b):
    """|m1 - m2|^2 + trace(C1 + C2 - 2 R), R = (C1^1/2 C2 C1^1/2)^1/2, of a [N, D], b [M, D]: what
    it costs to move the Gaussian fitted to a onto that of b ([16] eq. 6).

    The cost is the least mean of |x - y|^2 over all pairings of x ~ N(m1, C1) with y ~ N(m2, C2).
    The means cost |m1 - m2|^2; without them it is trace(C1 + C2) - 2 E[x.y]: how large is E[x.y]?
    Take T symmetric and positive with T C1 T = C2. Since |T^1/2 x - T^-1/2 y|^2 is never negative,
        2 E[x.y] <= E[x.T x] + E[y.T^-1 y] = trace(T C1) + trace(T^-1 C2) = 2 trace(T C1),
    and y = T x makes it equal. T = C1^-1/2 R C1^-1/2 is such a matrix, with trace(T C1) = trace R.
    In one dimension y = x s2/s1, and the cost is (m1 - m2)^2 + (s1 - s2)^2.

    A float, from float64 and eigenvalues of symmetric matrices: never negative. It falls with N, so
    compare at equal N. Raises ValueError below two rows. Lifts out with: nothing.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(a)} and {len(b)}")
    a, b = a.double().cpu(), b.double().cpu()
    c1, c2 = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))          # [D, D]
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T             # rounding may leave -1e-17
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (means + c1.trace() + c2.trace() - 2 * cross).item())


class Comparison:
    """Held-out sounds of a Run, halved: generated ones get B's conditions and are compared with A.

    A and B [N, C, L], N <= count, so every Frechet distance has equal N, and B against A is its
    floor. Its features are each channel's mean and deviation over a sound. ValueError if fewer than
    two pairs are held out.
    """

    def __init__(self, run, count, seed):
        s, self.run, self.seed = run.settings, run, seed
        self.data = LatentDataset(run.folder / "latents", s["frames"], s["channels"], run.device,
                                  disk=True)
        valid = self.data.valid
        self.N = min(count, len(valid) // 2)
        if self.N < 2:
            raise ValueError(f"{run.folder}: evaluate needs --count 2 and 4 windows held out, "
                             f"got {count} and {len(valid)}")
        pick = torch.linspace(0, len(valid) - 1, 2 * self.N).round().long().to(run.device)
        self.A, _, _ = self.data.held_out(pick[0::2])
        self.B, labels, curves = self.data.held_out(pick[1::2])
        self.cond = run.conditions(labels, curves)
        pitch = labels[:, 0].cpu() if (labels[:, 0] >= 0).all() else None
        self.asked = {"pitch": pitch, "curves": curves}
        recorded = [self.data.recorded[i] for i in valid[pick[1::2]].tolist()]
        self.real = {name: np.mean([figures[name] for figures in recorded]).item()
                     for name in recorded[0] if pitch is not None or name != "pitch_accuracy"}

    def line(self, into, key, title, figures):
        """Print what is known of some sounds, and keep it as into[figure][key]."""
        columns = (("pitch_accuracy", ".3f"), ("frechet", ".3f"), ("level_db", ".1f"),
                   ("centroid_hz", ".0f"))
        cells = (format(figures[name], form) if name in figures else "-" for name, form in columns)
        print(f"{title:32}", *(f"{cell:>9}" for cell in cells),
              *(f" {name} {figures[name]:.3f}" for name in FOLLOWING if name in figures))
        for figure, value in figures.items():
            into.setdefault(figure, {})[key] = value

    def row(self, into, key, title, asked, w, sampler, steps, **how):
        """Draw N sounds, print a line of figures, keep each as into[figure][key].

        asked: what `measure` holds them against; how: for `generate`, the condition too. Returns
        the latents [N, C, L] and a dict of what they cost.
        """
        run, codec, calls = self.run, self.run.codec, []
        began, watch = time.perf_counter(), Stopwatch(run.device)

        def timed(x, t, **cond):
            calls.append(t)
            with watch:
                return run.net(x, t, **cond)

        x, _ = run.generate(GuidedNet(timed, w), self.B.shape, sampler, steps, self.seed, **how)
        share, audio = watch.share(), run.decode(x)                # both wait for a GPU
        each = (time.perf_counter() - began) / self.N
        features = lambda x: torch.cat([x.mean(2), x.std(2).nan_to_num()], dim=1)  # NaN: one frame
        figures = {"frechet": frechet_distance(features(x), features(self.A)),
                   **measure(audio, codec.sample_rate, codec.hop, **asked)}
        self.line(into, key, title, figures)
        return x, {"nfe": len(calls), "seconds_per_item": each, "network_share": share,
                   "real_time_factor": run.settings["seconds"] / each}

    def by_evaluations(self, into, kinds):
        """Rows for kinds (steps, sampler, eta), at w = 2 if there is a condition to guide by."""
        w = 2.0 if self.cond else 1.0
        for steps, name, eta in kinds:
            key = f"{2 * steps - 1 if name == 'heun' else steps} {name}"
            key += f", eta = {eta:g}" * (name == "dpmpp_3m_sde")
            self.row(into, key, f"w = {w:g}, {key}", self.asked if self.cond else {}, w, name,
                     steps, eta=eta, **self.cond)


def evaluate_more(test, result):
    """Two tables: quality against network evaluations, and what is left of a sound at each noise.
    """
    result["from_sound"], pitch = {}, {"pitch": test.asked["pitch"]}
    kinds = (("euler", 0.0), ("heun", 0.0), ("dpmpp_3m_sde", 0.0), ("dpmpp_3m_sde", 1.0))
    print("\nevaluations of the network")
    test.by_evaluations(result["evaluations"], [
        (n // 2 if name == "heun" else n, name, eta)           # Heun's steps cost two, but the last
        for n, (name, eta) in itertools.product((4, 8, 16, 32, 64), kinds)])       # each twice more
    print("\nheld-out sounds, noised to sigma / alpha and denoised without a condition")
    for ratio in (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0):               # octaves of noise
        t = test.run.objective.time_at(torch.tensor(ratio)).item()
        test.row(result["from_sound"], f"{ratio:g}", f"{ratio:g}, --init-noise {t:.2f}", pitch, 1.0,
                 *test.run.sampler(), init=test.B, init_noise=t)


@torch.no_grad()
def evaluate(run, count=185, seed=0, sampler=None, steps=None, more=False):
    """Measure a Run on `count` sounds: print a table, write evaluation.json and the page.

    Returns what it wrote, a dict. Costs and nearest_ratio are of w = 1; more: two more tables, see
    `evaluate_more`.
    """
    test, (name, steps) = Comparison(run, count, seed), run.sampler(sampler, steps)
    B, cond, asked = test.B, test.cond, test.asked if test.cond else {}
    result = {"count": test.N, "seed": seed, "sampler": name, "steps": steps,
              "pitch_accuracy": {}, "evaluations": {}}
    print(f"{run.folder}: N = {test.N}, {name} with {steps} steps, seed {seed}\n"
          f"{'':32}   in tune   Frechet  level dB centre Hz")
    test.line(result, "real", "real", test.real)
    # To start from real latents with no noise on them is to leave them as they are.
    test.row(result, "codec", "real, codec (the floor)", test.asked, 1.0, name, steps,
             init=B, init_noise=0)
    for kind in "real", "codec":
        result[f"pitch_accuracy_{kind}"] = result["pitch_accuracy"].pop(kind, None)
    result["frechet_floor"] = result["frechet"].pop("codec")
    run.net(B, B.new_ones(len(B)), **cond)                    # the first call is slow and not timed
    x, costs = test.row(result, "1", "generated, w = 1", asked, 1.0, name, steps, **cond)
    for w in ("2", "3") if cond else ():
        test.row(result, w, f"generated, w = {w}", asked, float(w), name, steps, **cond)
    fewer = sorted({max(1, steps // 4), max(1, steps // 2)})               # a quarter, and half
    test.by_evaluations(result["evaluations"], [(n, name, 1.0) for n in fewer])
    some = test.data.train[::len(test.data.train) // 5000 + 1]     # at most 5000, evenly spread
    train = test.data.window(some, 0 * some)[0].flatten(1)
    near = lambda x: torch.cdist(x.flatten(1), train).amin(1).mean().item()
    result |= costs | {"nearest_ratio": near(x) / near(B)}
    print("nearest training sound: {nearest_ratio:.2f} of a held-out one's distance; {nfe} calls, "
          "{seconds_per_item:.3f} s a sound ({real_time_factor:.0f} times real time), "
          "{network_share:.1%} in the network".format(**result))
    if more:
        evaluate_more(test, result)
    write_json(run.folder / "evaluation.json", result)
    write_page(run, run.folder / "samples")
    return result


# --------------------------------------------------------------------------------------------------
# 11. The command line: python minidiff.py --help
# --------------------------------------------------------------------------------------------------
# Each option stands here once, under its heading: its name, who takes it (Codec, Train, Sample,
# Evaluate), its default ("-" if that depends), its values, what it is. 0..127 are whole numbers,
# 0.0..1.0 any between; x2 says that two are wanted, + that there may be more; what begins with
# blanks goes on from the line above. `parse` tells argparse all of it. The rest of the chapter is
# what the commands do with it: they put together pieces of the chapters before.
#
# A run's settings travel in its checkpoints, so `sample` and `evaluate` need no option to match the
# training, and one that contradicts them is an error. A budget (--steps, --minutes) is no setting:
# `train --resume` takes it anew.
#
# Try `sample --run runs/plucks --pitch 60 --count 4 --cfg 0 --out w0`, then `--cfg 1 --out w1` and
# `--cfg 8 --out w8`. Sound i starts from the same noise in all three: what of it comes from the
# noise, what from the pitch, and what does too much guidance do?
COMMANDS = {
    "codec": ("train the Snake VAE alone", "--data my_folder --codec-steps 5000"),
    "train": ("train a codec where there is none, and a diffusion model", "--data my_folder"),
    "sample": ("make sounds with a trained run", "--run runs/plucks --pitch 60 64 67 --cfg 3"),
    "evaluate": ("measure a trained run", "--run runs/plucks --sampler heun --steps 8")}
OPTIONS = """
data and run
--data             ct   plucks TEXT                    plucks, melodies, nsynth (335 MB), a folder
--seconds          cts  -      0.05..3600.0            seconds (the data's, at most 8; the run's)
--run              ctse -      PATH                    folder of the run (runs/ and the data's name)
--steps            tse  -      1..                     steps: training (1300; recordings 10000),
                                                       sampling (heun 9; the others 16)
--device           ctse auto   TEXT                    auto, cpu, cuda, cuda:1 or mps
--seed             ctse 0      0..                     of all that is random; sound i has seed + i
model
--codec            t    auto   auto|vae|music2latent   auto: vae for built-in data, else the other
--net              t    unet   unet|tutorial           the network, chapter 4
--objective        t    rf     rf|edm|vp               rectified flow, EDM or variance preserving
--condition        t    auto   auto|note|control|none  pitch, velocity and source; curves; nothing
training
--codec-steps      ct   -      1..                     steps of the VAE (2600; recordings 10000)
--minutes          ct   -      0.01..                  minutes after which a training ends (none)
--batch-size       t    -      1..65536                sounds in a step (of 2000 frames in all)
--lr               t    0.0015 0.0..                   highest learning rate of the diffusion model
--adversarial-from ct   -      0..                     codec step: its discriminator joins (half
                                                       of them; for built-in data never)
--without          t    -      time|norm|residuals|attention|position|levels|ema|schedule+
                                                       what to leave out, to see what it is worth
                                                       (schedule: of the learning rate)
--latents          t    memory memory|disk             where they are while the training draws them
--compile          t    -      FLAG                    compile the network: slow start, then faster
--precision        t    auto   auto|fp32|bf16          auto: bf16 where a GPU has it
--resume           ct   -      FLAG                    go on where the run was stopped
sampling
--count            se   -      1..10000                sounds: for each pitch (1), measured (185)
--pitch            s    -      0..127+                 MIDI pitches (left open)
--velocity         s    -      0..127                  MIDI velocity (left open)
--source           s    -      TEXT                    such as guitar_acoustic (left open)
--more             e    -      FLAG                    two tables more: by evaluations, from sounds
--sampler          se   -      euler|heun|dpmpp_3m_sde chapter 3 (heun)
--eta              s    1.0    0.0..                   fresh noise of dpmpp_3m_sde: 0 is none
--schedule         s    -      linear|karras|polyexponential
                                                       grid of times (linear; karras for EDM,
                                                       polyexponential for dpmpp_3m_sde)
--sigma-min        s    0.002  1e-6..1e6               its smallest sigma/alpha before 0
--sigma-max        s    80.0   1e-6..1e6               its largest sigma/alpha
--rho              s    -      1e-3..1e3               its bend (karras 7, polyexponential 1)
--plot-schedule    s    -      FLAG                    draw the noise levels of the three grids
--cfg              s    2.0    -1e3..1e3               guidance scale w: 1 is none, 0 unconditional
--rescale          s    0.0    0.0..1.0                give back the loudness that guidance adds
--cfg-interval     s    -      0.0..x2                 guide only between these times t (always)
--negative-pitch   s    -      0..127                  MIDI pitch to move away from (none)
--init-audio       s    -      PATH                    sound file to start from (noise)
--init-noise       s    -      0.0..                   its noise level t, 0: as it is (the largest)
--midi             s    -      PATH                    MIDI file to play, its highest voice (none)
--keep             s    -      0.0..x2                 start and end of what to keep of it, s (none)
--match            s    -      PATH                    sound with the envelope to follow (none)
--out              s    -      PATH                    folder for the sounds (samples in the run)
"""


BUILT_IN = {"plucks": Plucks, "melodies": Melodies}


def option_kind(word):
    """What argparse wants to know of a word in the fourth column. Lifts out with: nothing."""
    if word == "FLAG":
        return {"action": "store_true"}
    nargs = "+" if word.endswith("+") else 2 if word.endswith("x2") else None
    word = word.removesuffix("+").removesuffix("x2")
    if "|" in word:
        return {"choices": word.split("|"), "nargs": nargs}
    if ".." not in word:
        return {"type": {"TEXT": str, "PATH": pathlib.Path}[word], "nargs": nargs}
    low, high = word.split("..")
    kind = float if re.search("[.e]", low) else int

    def number(text):
        with contextlib.suppress(ValueError):
            # No limit is 2^62: all that a seed can take, and less than infinity; NaN fails too.
            if kind(low) <= (value := kind(text)) <= kind(high or 2 ** 62):
                return value
        raise argparse.ArgumentTypeError(f"expected {word} ({kind.__name__}), got {text!r}")

    return {"type": number, "metavar": word, "nargs": nargs}


class Parser(argparse.ArgumentParser):
    """argparse that names the option you may have meant. Lifts out with: nothing."""

    def error(self, message):
        unknown = re.search(r"(?:arguments: |command: invalid choice: ')([\w-]+)", message)
        names = [*COMMANDS, *re.findall(r"--\S+", OPTIONS)]
        near = difflib.get_close_matches(unknown[1], names, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near and near[0] != unknown[1] else ""
        self.exit(2, f"minidiff: {message}{hint} (see {self.prog} --help)\n")


def parse(argv):
    """argv -> (options, names of those given); a mistake ends the program with status 2.
    Lifts out with: Parser, option_kind.
    """
    top, defaults = Parser(prog="minidiff.py", description=__doc__.splitlines()[0]), {}
    commands = top.add_subparsers(dest="command", required=True)
    subs = [commands.add_parser(name, help=what, description=what,
                                epilog=f"example: python minidiff.py {name} {example}")
            for name, (what, example) in COMMANDS.items()]
    for row in re.sub("\n +", " ", OPTIONS).strip().splitlines():
        if not row.startswith("--"):
            groups = [sub.add_argument_group(row) for sub in subs]
            continue
        name, users, default, word, text = row.split(maxsplit=4)
        kind, fixed = option_kind(word), default != "-"
        key = name[2:].replace("-", "_")
        defaults[key] = kind.get("type", str)(default) if fixed else None
        text += f" (default {default})" * fixed
        for group, command in zip(groups, COMMANDS):
            if command[0] in users:
                # SUPPRESS: what was not given does not appear, so that we know what was.
                group.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)
    given = vars(top.parse_args(argv))
    return argparse.Namespace(**defaults | given), set(given)


def pick_device(name):
    """The device of that name; auto: the GPU, if any; or ValueError. Lifts out with: nothing."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"           # torchrun numbers the GPUs
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} is not usable: {str(error).splitlines()[0]}") from None
    return name


def run_settings(options, given):
    """The settings of a run: those in its checkpoints if it has any, else the options. ValueError
    if a run would be overwritten, or an option contradicts it.
    """
    kept, names = {}, ("data", "codec", "net", "objective", "condition", "seconds", "seed",
                       "without")
    for path in options.run / "codec.pt", options.run / "model.pt":
        if not path.exists():
            continue
        state = load_checkpoint(path, mmap=True)
        with fitting(path):
            kept |= state["settings"]
            finished = path.name == "codec.pt" and state["complete"]
        if not (options.resume or finished and options.command == "train"):
            raise ValueError(f"{options.run} holds a run already ({path.name}, step "
                             f"{state['step']:,}): go on with --resume, choose another --run, or "
                             "delete it")
    for name in sorted(given & {*names} & {*kept}):
        if getattr(options, name) not in (kept[name], "auto"):
            raise ValueError(f"{options.run} was made with --{name} {kept[name]}, got "
                             f"{getattr(options, name)}: leave it out, or choose another --run")
    fresh = {name: getattr(options, name) for name in names}
    fresh["without"] = fresh["without"] or []
    if fresh["codec"] == "auto":
        fresh["codec"] = "vae" if fresh["data"] in BUILT_IN else "music2latent"
    return fresh | kept


def open_data(settings, run):
    """The sounds of a run; says which files are unusable."""
    rate = settings.get("sample_rate")
    if settings["codec"] == "music2latent":
        rate = Music2Latent.sample_rate
    wanted = {"seed": settings["seed"], "seconds": settings["seconds"], "sample_rate": rate}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if settings["data"] in BUILT_IN:
        return BUILT_IN[settings["data"]](**wanted)
    root = download_nsynth() if settings["data"] == "nsynth" else settings["data"]
    recordings = AudioFolder(root, known=run / "files.json", **wanted)
    for name, reason in recordings.unusable.items():
        print(f"unusable: {name!r} {reason}", file=sys.stderr)
    print(f"{len(recordings)} recordings used, {len(recordings.unusable)} unusable",
          file=sys.stderr)
    return recordings


def choose_condition(settings, recordings):
    """The condition asked for; for auto, the richest there is. ValueError if it cannot be had, or
    if what shall be left out of the tutorial's network is not in it. Lifts out with: nothing.
    """
    has_not = {*settings["without"]} - {"levels", "ema", "schedule"}
    if has_not and settings["net"] == "tutorial":
        raise ValueError(f"--without {has_not.pop()}: the tutorial's network has none anyway")
    asked, tutorial = settings["condition"], settings["net"] == "tutorial"
    labelled = bool((recordings.labels[:, 0] >= 0).any())
    best = ("none" if tutorial else "control" if settings["data"] == "melodies" else
            "note" if labelled else "none")
    why = ("the tutorial's network takes no conditions" if tutorial else
           "the file names hold no labels (guitar_acoustic_004-071-025.wav would)")
    if asked == "note" and not labelled or tutorial and asked not in ("auto", "none"):
        raise ValueError(f"--condition {asked}: {why}; use --condition {best}")
    if asked == "auto" and best == "none":
        print(f"--condition none: {why}")
    return best if asked == "auto" else asked


def prepare_codec(options, settings, recordings, device):
    """The run's codec, a VAE trained first where it must be."""
    path, rate = options.run / "codec.pt", recordings.sample_rate
    settings["sample_rate"] = rate
    options.run.mkdir(parents=True, exist_ok=True)
    # A model knows the latents of its codec alone: once there is one, the codec stays as it is.
    fixed = (options.run / "model.pt").exists() or options.command == "train" and (
        path.exists() and load_checkpoint(path, mmap=True)["complete"])
    if settings["codec"] == "vae" and not fixed:
        torch.manual_seed(settings["seed"])
        codec = SnakeVAE(rate)
        print(f"codec: {sum(p.numel() for p in codec.parameters()):,} parameters, "
              f"{int((~recordings.valid).sum())} recordings at {rate} Hz, on {device}")
        kept = {k: settings[k] for k in ("data", "codec", "seconds", "seed", "sample_rate")}
        built_in, judge_from = settings["data"] in BUILT_IN, options.adversarial_from
        if judge_from is None and not built_in:
            judge_from = options.codec_steps // 2
        # What a latent gains the decoder shrinks with the level of the sound, what the KL charges
        # does not: 0.05 suits strings near full scale, and silences every channel of quiet ones.
        train_codec(codec, recordings, options.codec_steps, path, settings["seed"], device,
                    kl_weight=0.05 if built_in else 1e-3, adversarial_from=judge_from,
                    resume=options.resume, settings=kept, minutes=options.minutes or math.inf)
        convergence, decibels = codec_distances(codec, recordings, device)
        print(f"codec, held-out recordings: spectral convergence {convergence:.3f}, log-spectral "
              f"distance {decibels:.2f} dB")
    codec = open_codec(path, settings, device)
    now = {"channels": codec.channels, "sources": recordings.sources,
           "frames": codec.frames(round(recordings.seconds * rate)),
           "seconds": recordings.seconds, "made_from": codec.made_from}
    for name, value in now.items():
        if settings.get(name) not in (None, value):
            raise ValueError(f"{options.run}/model.pt was made with {name} {settings[name]}, "
                             f"--data {settings['data']} has {value} now: choose another --run")
    settings |= now
    return codec


def meet(device):
    """Join the other processes of torchrun, if any; waits for them. Lifts out with: nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        half_hour = torch.distributed.constants.default_pg_timeout
        torch.distributed.init_process_group(backend, timeout=48 * half_hour)    # one day


def reuse_memory():
    """Where the C library is glibc: what a step frees is kept for the next one. Otherwise each step
    gets its memory anew from the system, page by page, in an eighth of its time.
    Lifts out with: nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        trim_threshold, mmap_max = -1, -4                          # their numbers in malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, 1 << 30)         # a gibibyte
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def first_sounds(options, recordings, data, device, count=4):
    """Play held-out notes as recorded, through the codec, and generated: the page; then measure.
    """
    run, (latents, labels, curves) = Run(options.run, device), data.held_out(slice(count))
    x, path = run.generate(GuidedNet(run.net, options.cfg), latents.shape, *run.sampler(),
                           run.settings["seed"], **run.conditions(labels, curves))
    length = round(recordings.seconds * recordings.sample_rate)
    real = [recordings.audio(i, at * run.codec.hop, length)
            for i, at in zip(data.valid[:count].tolist(), data.start.tolist())]
    kinds = {"real": real, "codec": run.decode(latents), "generated": run.decode(x)}
    sounds = [(f"{kind}_{i}", "", labels[i], audio[i])
              for i in range(len(x)) for kind, audio in kinds.items()]
    write_sounds(run, run.folder / "samples", sounds, path)
    if len(data.valid) >= 4:               # two to compare with, and two for the floor, at least
        evaluate(run, seed=options.seed)
    else:
        print(f"not measured: {len(data.valid)} windows are held out, and evaluate needs 4")


def command_train(options, given, device):
    """codec, train: codec, latents, diffusion model, sounds."""
    rank, world = (int(os.environ.get(*of)) for of in (("RANK", 0), ("WORLD_SIZE", 1)))
    if (options.batch_size or 8) % world:                          # 8: see below
        raise ValueError(f"--batch-size {options.batch_size or 'a multiple of 8'} cannot be shared "
                         f"by {world} processes")
    if rank > 0:
        meet(device)                    # rank 0 comes when all is made that the others will find
    settings = run_settings(options, given)
    reuse_memory()
    # What notes from a formula need, 2,600 and 1,300 steps; recordings get 10,000 as a beginning.
    usual = (2600, 1300) if settings["data"] in BUILT_IN else (10_000, 10_000)
    options.codec_steps, options.steps = options.codec_steps or usual[0], options.steps or usual[1]
    recordings = open_data(settings, options.run)
    if options.command == "train":
        settings["condition"] = choose_condition(settings, recordings)
    codec = prepare_codec(options, settings, recordings, device)
    if options.command == "codec":
        return
    latents, seed = options.run / "latents", settings["seed"]
    encode_recordings(codec, recordings, latents, settings["condition"] == "control", device)
    if rank == 0:
        meet(device)
    data = LatentDataset(latents, settings["frames"], codec.channels, device,
                         options.latents == "disk")
    settings |= {"mean": data.mean.tolist(), "std": data.std.tolist(), "touch": data.touch}
    torch.manual_seed(seed)
    net = build_net(settings).to(device)
    print(f"diffusion: {sum(p.numel() for p in net.parameters()):,} parameters, {len(data.train)} "
          f"recordings to train on, {len(data.valid)} windows held out, on {device}")
    # A step's work depends on its frames: 32 windows of the built-in strings, which have 63.
    batch_size = options.batch_size or 8 * max(1, round(32 * 63 / settings["frames"] / 8))
    able = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    precision = {"auto": "bf16" if able else "fp32"}.get(options.precision, options.precision)
    train_diffusion(net, OBJECTIVES[settings["objective"]](), data, options.steps,
                    options.run / "model.pt", seed, batch_size, options.lr,
                    settings["condition"], precision, options.compile, resume=options.resume,
                    settings=settings, minutes=options.minutes or math.inf,
                    without=settings["without"])
    if rank == 0:
        first_sounds(options, recordings, data, device)


def plot_schedule(objective, steps, **levels):
    """Print where the grids' steps lie, sigma/alpha from 0.001 to 100; digits count what meets.
    """
    print(f"noise levels sigma / alpha of {steps} steps\n{'':16}" + "".join(
        f"{10.0 ** power:<12g}" for power in range(-3, 3)))                # 12 places to a decade
    for grid in ("linear", "karras", "polyexponential"):
        t = schedule(objective, grid, steps, **levels)[:-1]
        decade = (objective.sigma(t) / objective.alpha(t)).log10().clamp(-3, 2)    # 10^-3 to 10^2
        place = 12 * (decade + 3)                                          # 0 to 60
        count = place.round().long().bincount(minlength=61)                # 61 of them
        row = (".o"[n] if n < 2 else f"{min(n, 9)}" for n in count.tolist())     # 9: or more
        print(f"{grid:16}" + "".join(row))


def match_envelope(draw, shape, seed, decode, hop, target, steps=30, lr=0.1):
    """Noise [B, C, L] = shape whose sounds have the envelope of target [1, T], found by DITTO.

    draw: noise -> latents [B, C, L]; decode: latents -> audio [B, T]. The loss is the squared error
    over that of silence; `steps` of Adam.
    Lifts out with: envelope, optimise_noise, standard_normal.
    """
    wanted, said = envelope(target, hop), []                                   # [1, L]

    def loss(latents):
        L = min(latents.shape[2], wanted.shape[1])
        error = (envelope(decode(latents), hop)[:, :L] - wanted[:, :L]).square().mean(1)
        # Each item has its own noise: the sum lets each find its own way. Silence must not be 0/0.
        said.append(error.sum() / wanted.square().mean().clamp_min(1e-12))
        return said[-1]

    seeds = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    # The fast LSTM of cudnn has no gradient outside of training.
    with torch.backends.cudnn.flags(enabled=False):
        best = optimise_noise(draw, standard_normal(shape, seeds, target.device), loss, steps, lr)
    print(f"--match: squared error of the envelope, of silence's: {said[0] / shape[0]:.3f} at "
          f"first, {min(said) / shape[0]:.3f} at best of {steps} steps")
    return best


def check_sample(options, given, run):
    """ValueError for what this run cannot do, or what means nothing. Lifts out with: nothing."""
    condition, sources = run.settings["condition"], run.settings["sources"]
    first = lambda names: "--" + min(names).replace("_", "-")
    asked = given & {"pitch", "velocity", "source", "negative_pitch"}
    if asked and condition != "note":
        raise ValueError(f"{run.folder} was trained with --condition {condition}: it takes no "
                         f"{first(asked)}")
    if options.midi and condition != "control":
        raise ValueError(f"{run.folder} was trained with --condition {condition}; --midi needs the "
                         "envelope and pitch curves of --condition control")
    if options.source not in [None, *sources]:
        raise ValueError(f"--source {options.source}: {run.folder} knows {', '.join(sources)}")
    if options.init_audio is None and given & {"init_noise", "keep"}:
        raise ValueError("--init-noise and --keep need --init-audio, the file that they speak of")
    if len(given & {"seconds", "init_audio", "midi"}) > 1:
        raise ValueError("--seconds, --init-audio and --midi each say how long the sound is: "
                         "give one of them")
    if options.match and options.init_noise == 0:
        raise ValueError("--match changes the noise, and --init-noise 0 has none: give it more")
    shaped = given & {"sigma_min", "sigma_max", "rho"}
    if options.schedule == "linear" and shaped and not options.plot_schedule:
        raise ValueError(f"{first(shaped)} shapes --schedule karras and polyexponential; linear "
                         "has no use for it")


def asked_for(options, run):
    """What the options ask of a Run: labels [B, K], curves [2, L] (NaN: any), init, latents [B, C,
    L] to start from, or None, and keep [L], which of its frames stay, or None. ValueError for a
    MIDI file without notes.
    """
    s, codec, init, keep = run.settings, run.codec, None, None
    velocity = -1 if options.velocity is None else options.velocity
    source = [None, *s["sources"]].index(options.source) - 1             # None becomes -1
    labels = torch.tensor([[pitch, velocity, source] for pitch in options.pitch or [-1]
                           for _ in range(options.count or 1)])
    frames, frame = s["frames"], codec.hop / codec.sample_rate           # how many, and seconds
    if options.seconds:
        frames = codec.frames(round(options.seconds * codec.sample_rate))
    if options.init_audio:
        audio = load_audio(options.init_audio, codec.sample_rate)[None].to(run.device)   # [1, T]
        init = ((codec.encode(audio) - run.mean) / run.std).expand(len(labels), -1, -1)
        frames = init.shape[2]
    curves = torch.full((2, frames), math.nan)
    if options.midi:
        notes = read_midi(options.midi)
        if not notes or not s["touch"]:
            raise ValueError(f"{options.midi}: {len(notes)} notes; expected some, and a run of "
                             "pitched sounds")
        last = max(end for _, end, _, _ in notes) + 1              # and a second to die away
        curves = midi_curves(notes, math.ceil(last / frame), frame, *s["touch"])
    if options.keep:
        second = torch.arange(frames, device=run.device) * codec.hop / codec.sample_rate
        keep = (second >= options.keep[0]) & (second < options.keep[1])
    return labels, curves, init, keep


def guided_net(options, run, count):
    """A Run's network with the guidance asked for, for `count` sounds at once."""
    negative, interval = None, options.cfg_interval
    if options.negative_pitch is not None:
        away = torch.tensor([options.negative_pitch, -1, -1], device=run.device)
        negative = {"labels": away.expand(count, -1)}
    if interval and isinstance(run.objective, EDM):
        interval = [math.log(max(t, 1e-9)) / 4 for t in interval]  # EDM's net is told ln(t)/4
    return GuidedNet(run.net, options.cfg, options.rescale, interval, negative)


def command_sample(options, given, device):
    """sample: sounds from a trained run."""
    run = Run(options.run, device)
    codec, edm = run.codec, isinstance(run.objective, EDM)
    name, steps = run.sampler(options.sampler, options.steps)
    # dpmpp_3m_sde wants steps of like sizes in log-SNR.
    options.schedule = options.schedule or ("polyexponential" if name == "dpmpp_3m_sde" else
                                            "karras" if edm else "linear")
    check_sample(options, given, run)
    if edm:
        run.objective = EDM(sigma_max=options.sigma_max)           # where sampling starts
    labels, curves, init, keep = asked_for(options, run)
    net, curves = guided_net(options, run, len(labels)), curves.expand(len(labels), -1, -1)
    shape = len(labels), run.settings["channels"], curves.shape[2]
    levels = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max, "rho": options.rho}
    if options.plot_schedule:
        plot_schedule(run.objective, steps, **levels)
    times = None if options.init_noise == 0 else schedule(
        run.objective, options.schedule, steps, options.init_noise, **levels)
    how = {"times": times, "eta": options.eta, "init": init, "init_noise": options.init_noise,
           "keep": keep, **run.conditions(labels, curves)}
    noise = None
    if options.match:
        draw = lambda noise: generate(net, run.objective, shape, name, steps, options.seed,
                                      noise=noise, **how)
        play = lambda x: codec.decode(x * run.std + run.mean)
        target = load_audio(options.match, codec.sample_rate)[None].to(device)           # [1, T]
        noise = match_envelope(draw, shape, options.seed, play, codec.hop, target)
    x, path = run.generate(net, shape, name, steps, options.seed, noise=noise, **how)
    text, audio = f"w = {options.cfg:g}, {name} {steps}", run.decode(x)
    names = [f"sample_{options.seed + i}" + f"_pitch_{pitch}" * (pitch >= 0)
             for i, pitch in enumerate(labels[:, 0].tolist())]
    folder = options.out or run.folder / "samples"
    # Sounds of an earlier call stay: one may want to compare them.
    takes = itertools.chain([""], (f"_{k}" for k in itertools.count(2)))       # the second, and on
    take = next(k for k in takes if not any((folder / f"{n}{k}.wav").exists() for n in names))
    write_sounds(run, folder, [(names[i] + take, text, labels[i], audio[i])
                               for i in range(len(x))], path)
    if options.midi:
        figures = measure(audio, codec.sample_rate, codec.hop, curves=curves)
        print(f"{options.midi}: " + ", ".join(f"{k} {figures[k]:.3f}" for k in FOLLOWING))


def main(argv=None):
    """Run a command: 0, 2 for a mistake, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print("Start here:  python minidiff.py train     (eight minutes on two CPU cores)\n"
              "Then:        python minidiff.py sample --run runs/plucks --pitch 60 64 67\n"
              "All of it:   python minidiff.py --help")
        return 0
    options, given = parse(argv)
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout = open(os.devnull, "w")                         # rank 0 speaks for all of them
    try:
        device = pick_device(options.device)
        data = os.path.basename(os.path.abspath(options.data))
        options.run = options.run or pathlib.Path("runs") / data
        if options.command == "evaluate":
            evaluate(Run(options.run, device), options.count or 185, options.seed,   # the usual
                     options.sampler, options.steps, options.more)
        elif options.command == "sample":
            command_sample(options, given, device)
        else:
            if options.command == "codec":
                options.codec, given = "vae", given | {"codec"}
            command_train(options, given, device)
    except KeyboardInterrupt as stopped:
        print(f"\nminidiff: interrupted. {stopped or 'What was saved is whole'}", file=sys.stderr)
        return 130                                                 # the shell's 128 + SIGINT
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # How torch says that memory is full depends on the device; other RuntimeErrors are faults.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        where = f"{options.run}: " * bool(getattr(error, "errno", 0) and not error.filename)
        said = (str(error) or "out of memory").splitlines()[0]
        print(f"minidiff: {where}{said}", file=sys.stderr)
        return 2
    finally:
        if rank_and_world()[1] > 1:
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    if "RANK" not in os.environ:                                 # torchrun has its own way to end
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
