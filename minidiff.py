"""minidiff: audio latent diffusion in one file to read, run, and take apart.

A codec turns a second of sound into 63 vectors, its latents. A network learns to turn noise into
latents: ask for a pitch, hear a note nobody has played. To copy a piece of chapters
0 to 7, take the imports and its docstring's "Lifts out with".

    python minidiff.py toy    # the idea
    python minidiff.py train  # an instrument
    python minidiff.py sample --pitch 60

The alphabet
  B batch  T audio samples  C latent channels  L latent frames  D features  N how many
  Audio is [B, T], mono, float32; latents [B, C, L]; times [B].
  x_0 is data, noise is Normal(0, 1), mean 0 and variance 1. x_t = alpha(t) x_0 + sigma(t) noise.
  A deviation is a variance's root.
  t = 0 is data, the largest t is noise. velocity is dx/dt, away from the data.
  w is the guidance scale, --cfg: 1 is off.
  Not given is -1 for a label (one number per sound), NaN for a curve (one per frame, a control).
  A pitch is a MIDI number: 60 is middle C, 69 is 440 Hz; a semitone is 1, a cent 0.01.
  a, b: two halves or sets  d: dx/dt  f: frequency; f(x): function  g: gradient  h: step
  i, j, k, n: counts  p: density or probability  r: autocorrelation  y: target
  z: latents before they are standardised  c, u: with, without condition  m, V: mean, covariance
  eta: how much fresh noise  H: (1 + eta) h  phi: weights, as in [6]  q: from 0 to h
  s: VPDiffusion's offset

References (arXiv)
   [1] Rectified flow 2209.03003  [2] Logit-normal 2403.03206  [3] EDM          2206.00364
   [4] Guidance       2207.12598  [5] Rescaling    2305.08891  [6] DPM-Solver++ 2211.01095
   [7] DITTO          2401.12179  [8] Diff-A-Riff  2406.08384  [9] Stable Audio 2407.14358
  [10] Snake          2006.08195  [11] EnCodec      2210.13438  [12] VAE          1312.6114
  [13] NSynth         1704.01279  [14] Music2Latent 2408.06500  [15] FID          1706.08500
  [16] v-prediction   2202.00512  [17] Score SDEs   2011.13456  [18] Attention    1706.03762
  [19] STFT loss      1910.11480  [20] Muon         2502.16982  [21] Polar Express 2505.16932
"""
import argparse
import json
import math
import os
import re
import struct
import time
import zipfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

# ---
# 0. The whole idea
#
# We have examples x_0 and want more. Draw a line from noise to x_0, x_t = (1 - t) x_0 + t noise,
# and let a network predict, from x_t and t, its direction x_0 - noise. Many such lines pass through
# one point: there it learns their mean direction. For a new example, start at fresh noise and
# follow the network in small straight steps, Euler's rule, from t = 1 to t = 0 [1].
#
# Try: `python minidiff.py toy`. Then replace 3000 steps by 200: the moons blur.

def toy(steps=3000, seed=0):
    """Learn two half moons, draw them, return the shares near a moon."""
    torch.manual_seed(seed)

    def moons(n, blur=0.05):
        angle = math.pi * torch.rand(n)
        upper = torch.stack([angle.cos(), angle.sin()], 1)  # [n, 2]
        lower = torch.tensor([1.0, 0.5]) - upper
        return torch.where(torch.rand(n, 1) < 0.5, upper, lower) + blur * torch.randn(n, 2)
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 64), relu, nn.Linear(64, 64), relu, nn.Linear(64, 64), relu,
                        nn.Linear(64, 64), relu, nn.Linear(64, 2))
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    for _ in range(steps):
        x_0 = 2 * moons(1024)  # about noise's size
        noise = torch.randn(1024, 2)
        t = torch.rand(1024, 1)
        x_t = (1 - t) * x_0 + t * noise
        loss = (net(torch.cat([x_t, t], 1)) - (x_0 - noise)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    x = torch.randn(2000, 2)
    with torch.no_grad():
        for i in range(100):
            t = torch.full((2000, 1), 1 - i / 100)
            x = x + net(torch.cat([x, t], 1)) / 100
    samples = x / 2
    data = moons(2000)
    curve = moons(2000, blur=0)
    shares = [(torch.cdist(x, curve).amin(1) < 0.1).float().mean().item() for x in (samples, data)]
    beside = torch.cat([samples[:600], data[:600] + torch.tensor([4.0, 0.0])])
    counts, _ = torch.histogramdd(beside, [76, 14], range=[-1.5, 6.5, -1.0, 1.5])
    for row in counts.clamp(max=4).int().T.flip(0):
        print("".join(" .:*#"[n] for n in row))
    print("within 0.1 of a moon: {:.3f} of the samples (left), {:.3f} of the data".format(*shares))
    return shares

# ---
# 1. Noising and objectives: what does the network learn?
#
# A network sees t and x_t = alpha(t) x_0 + sigma(t) noise. It is asked for y, a mixture of x_0 and
# noise, but cannot know it: many pairs of x_0 and noise give the same x_t. Over those pairs, an
# answer has the mean squared error
#
#     E[(answer - y)^2 | x_t]  =  (answer - E[y | x_t])^2  +  the variance of y given x_t,
#
# so the best answer is the mean E[y | x_t]. Write x_0^ and noise^ for such means. Means obey
# x_t = alpha x_0^ + sigma noise^. This and the answer are two equations for x_0^ and noise^. With '
# for d/dt:
#
#     noise^    =  (x_t - alpha x_0^) / sigma
#     velocity  =  alpha' x_0^ + sigma' noise^     the mean of dx_t/dt at x_t
#     score     =  -noise^ / sigma                 the gradient of ln p(x_t)
#
# The last: p(x_t) is the mean over x_0 of p(x_t | x_0), a normal of mean alpha x_0 and deviation
# sigma. The normal's gradient is p(x_t | x_0) (-noise / sigma). The mean of this over x_0, divided
# by p(x_t), is by Bayes the mean of -noise / sigma given x_t.
#
# Only flow changes a density, and flow is density times mean velocity. So points that follow
# this velocity have, at every t, the density of x_t ([1] th. 3.3): noise arrives as data.
#
# Rectified flow [1] takes straight paths: velocity = -answer, x_0^ = x_t + t answer. The x_t below
# differ in scale: x_t / alpha is EDM's x_t at its t = sigma / alpha. loss: that of a net that
# answers 0, for data of mean square 1.
#
#                    alpha       sigma       target                      t        loss
#     RectifiedFlow  1 - t       t           x_0 - noise                 0 to 1   2
#     VPDiffusion    cos(angle)  sin(angle)  alpha noise - sigma x_0     0 to 1   1
#     EDM (below)    1           t           (x_0 - c_skip x_t) / c_out  0 to 80  1
#
# Try: `python -c "from minidiff import *; print(EDM().loss(lambda x, t: 0*x, torch.ones(99, 99)))"`
# and RectifiedFlow(): the table's losses.

def expand(t, x):
    """t, a float or [B], as [B, 1, ...] for x [B, ...]."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
    return t.reshape(-1, *[1] * (x.ndim - 1))

def standard_normal(shape, generator=None):
    """Normal(0, 1) from the CPU for any device. A list of generators: one per item."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape[1:], generator=one) for one in generator])
    return torch.randn(shape, generator=generator)

class Objective:
    """A child adds alpha, sigma, target, denoise, velocity, sample_times and
    time_at(sigma/alpha) -> t.
    t: a float or [B].  net: (x [B, ...], t [B], **cond) -> [B, ...].
    Lifts out with: expand, standard_normal. A child needs Objective too."""
    t_max = 1.0

    def add_noise(self, x, noise, t):
        t = expand(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise
    def answer(self, net, x_t, t, **cond):
        return net(x_t, expand(t, x_t).flatten(), **cond)
    def loss_at(self, net, x, noise, t, reduce=True, **cond):
        """The mean squared error: a scalar, or [B] if not reduce."""
        answer = self.answer(net, self.add_noise(x, noise, t), t, **cond)
        error = (answer - self.target(x, noise, t)).square().flatten(1).mean(1)
        return error.mean() if reduce else error
    def loss(self, net, x, generator=None, reduce=True, **cond):
        """loss_at fresh times and noise."""
        t = self.sample_times(len(x), generator).to(x)
        noise = standard_normal(x.shape, generator).to(x)
        return self.loss_at(net, x, noise, t, reduce, **cond)

@dataclass
class RectifiedFlow(Objective):
    """Straight paths [1]. In training, ln(sigma/alpha) has mean p_mean and deviation p_std: most
    times fall in the hard middle ([2] section 3.1)."""
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
    """Variance preserving. The target is dx_t/d(angle) ([16] appendix D). s keeps sigma above
    0.012."""
    s: float = 0.008

    def angle(self, t):
        return math.pi / 2 * (torch.as_tensor(t) + self.s) / (1 + self.s)
    def alpha(self, t):
        return self.angle(t).cos()
    def sigma(self, t):
        return self.angle(t).sin()
    def target(self, x, noise, t):
        t = expand(t, x)
        return self.alpha(t) * noise - self.sigma(t) * x
    def denoise(self, net, x_t, t, **cond):
        angle = self.angle(expand(t, x_t))
        return angle.cos() * x_t - angle.sin() * self.answer(net, x_t, t, **cond)
    def velocity(self, net, x_t, t, **cond):  # d(angle)/dt dx/d(angle)
        return math.pi / 2 / (1 + self.s) * self.answer(net, x_t, t, **cond)
    def sample_times(self, n, generator=None):
        return torch.rand(n, generator=generator)
    def time_at(self, ratio):
        angle = torch.as_tensor(ratio).atan()
        return (angle * (1 + self.s) / (math.pi / 2) - self.s).clamp_min(0)

@dataclass
class EDM(Objective):
    """x_0^ = c_skip x_t + c_out net(c_in x_t, c_noise) ([3] eq. 7); t is the noise level, c_noise
    the net's time. For data of deviation sigma_data, c_in and c_out bring input and target to
    variance 1. c_out, the deviation of x_0 - c_skip x_t, scales the net's error; c_skip makes
    c_out smallest ([3] B.6)."""
    sigma_data: float = 1.0
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_max: float = 80.0

    def __post_init__(self):
        self.t_max = self.sigma_max
    def alpha(self, t):
        return t ** 0  # ones like t
    def sigma(self, t):
        return t
    def preconditioning(self, sigma):
        variance = sigma ** 2 + self.sigma_data ** 2
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
        c_skip, c_out, _, _ = self.preconditioning(expand(t, x_t))
        return c_skip * x_t + c_out * self.answer(net, x_t, t, **cond)
    def velocity(self, net, x_t, t, **cond):  # noise^
        return (x_t - self.denoise(net, x_t, t, **cond)) / expand(t, x_t)
    def sample_times(self, n, generator=None):
        return torch.exp(self.p_mean + self.p_std * standard_normal((n,), generator))
    def time_at(self, ratio):
        return ratio

# ---
# 2. Guidance: how do we ask for a note?
#
# In training, a condition such as "pitch 60" is withheld now and then, so one network learns both
# p(x | condition) and p(x), x at any t. By Bayes, their ratio is proportional to p(condition | x).
# For more of the condition, raise p(condition | x) to a power w: let p_w(x) be proportional to
#
#     p(x) p(condition | x)^w,  that is,  p(x)^(1 - w) p(x | condition)^w.
#
# The scores, gradients of logarithms, add up: (1 - w) score_u + w score_c. A network's answer mixes
# score and x_t. The x_t term is the same in both and the weights sum to one, so answers mix as
# scores do: classifier-free guidance [4]. With w > 1, notes fit the condition better but are more
# alike, and answers' deviation grows; GuidedNet's `rescale` undoes this [5].
#
# Try: `python minidiff.py evaluate --cfg 1 8`. At w = 8 most notes are in tune, but noisier, and
# Frechet, their distance from real ones, is far larger.

def guide(conditional, unconditional, scale, rescale=0.0):
    """u + w (c - u) for answers c, u [B, ...] ([4]'s w is ours - 1). rescale, 0 to 1, brings the
    deviation of each item towards that of c ([5] section 3.4)."""
    guided = unconditional + scale * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    wanted = conditional.std(axes, correction=0, keepdim=True)
    found = guided.std(axes, correction=0, keepdim=True).clamp_min(1e-12)
    return guided * (1 - rescale + rescale * wanted / found)

@dataclass
class GuidedNet:
    """Called like the plain net. u is its answer without conditions, or with those of `negative`.
    Lifts out with: guide."""
    net: object
    scale: float
    rescale: float = 0.0
    negative: dict = None

    def __call__(self, x, t, **cond):
        if not cond or self.scale == 1:
            return self.net(x, t, **cond)
        withheld = {name: torch.full_like(value, math.nan if value.is_floating_point() else -1)
                    for name, value in cond.items()} | (self.negative or {})
        both = {name: torch.cat([cond[name], withheld[name]]) for name in cond}
        answers = self.net(torch.cat([x, x]), torch.cat([t, t]), **both)
        return guide(*answers.chunk(2), self.scale, self.rescale)

# ---
# 3. Samplers: how do we get from noise to a note?
#
# A sampler follows dx/dt = velocity(x, t) down a list of times to 0. Euler's rule asks the network
# once per step. Heun's asks again where Euler's step lands, and averages. DPM-Solver++ [6] fits a
# parabola to the last three x_0^. Twice the steps leave about 1/2, 1/4 and 1/8 of the error.
#
# Unless eta is 0, DPM-Solver++ adds fresh noise, which widens x_t's density, and moves further to
# x_0^, which narrows it as much ([17] eq. 13). Early errors fade, but 1/8 no longer holds.
#
# Try: `python minidiff.py sample --sampler euler --steps 1`, then `--steps 30`. One step ends near
# the mean of all notes, a blur of pitches; thirty on one note.

def linear_times(steps, start=1.0):
    """Even times from `start` to 0: [steps + 1]."""
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)

def karras_times(steps, sigma_min, sigma_max, rho=7.0):
    """Noise levels even in sigma^(1/rho), then 0: [steps + 1] ([3] eq. 5)."""
    ends = [sigma ** (1 / rho) for sigma in (sigma_max, sigma_min)]
    return F.pad(torch.linspace(*ends, steps, dtype=torch.float64) ** rho, (0, 1))

def polyexponential_times(steps, sigma_min, sigma_max, rho=1.0):
    """As karras_times, but even in ln sigma if rho = 1 [9]."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    return F.pad(sigma_min * (sigma_max / sigma_min) ** ramp, (0, 1))

def euler(velocity, x, times):
    """Follow dx/dt = velocity(x [B, ...], t [B]) down `times` [steps + 1]."""
    for t, t_next in pairwise(times.tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x

def heun(velocity, x, times):
    """As euler, by Heun's rule ([3] Algorithm 1)."""
    for t, t_next in pairwise(times.tolist()):
        h = t_next - t
        d = velocity(x, x.new_full((len(x),), t))
        x_euler = x + h * d
        if t_next == 0:
            return x_euler  # EDM's velocity at 0 would be 0/0
        d_next = velocity(x_euler, x.new_full((len(x),), t_next))
        x = x + h * (d + d_next) / 2
    return x

def dpmpp_3m_sde(denoise, x, sigmas, eta=1.0, generator=None):
    """DPM-Solver++(3M) SDE [6] for x_t = x_0 + sigma noise. Its velocity is (x - x_0^) / sigma. In
    lambda = -ln sigma, dx/dlambda = x_0^ - x; to make up for fresh noise, 1 + eta times that.
    Multiply by exp((1 + eta) lambda), integrate over a step h: x becomes exp(-H) x, plus all x_0^
    weighted by (1 + eta) exp((1 + eta) (q - h)), plus fresh noise up to sigma^2, as exp(-H) shrinks
    the old to sigma^2 exp(-2 eta h), sigma at the step's end. As x_0^ we extend the parabola
    through the last three, newest + q slope + q^2 / 2 bend. With this weight, 1, q, q^2 / 2 have
    integrals phi_1 = 1 - exp(-H), h phi_2 and h^2 phi_3: by parts, phi_(k+1) = 1/k! - phi_k / H.
    denoise: (x, sigma) -> x_0^.  Lifts out with: standard_normal."""
    past = []  # (lambda, x_0^), newest first
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        newest = denoise(x, x.new_full((len(x),), sigma))
        if sigma_next == 0:
            return newest
        past = [(-math.log(sigma), newest)] + past[:2]
        slope = bend = 0
        if len(past) > 1:
            (l0, _), (l1, old) = past[:2]
            slope = (newest - old) / (l0 - l1)
        if len(past) > 2:
            l2, older = past[2]
            bend = 2 * (slope - (old - older) / (l1 - l2)) / (l0 - l2)
            slope = slope + bend * (l0 - l1) / 2  # at l0, not midway
        h = math.log(sigma / sigma_next)
        H = (1 + eta) * h
        phi_1 = -math.expm1(-H)
        phi_2 = 1 - phi_1 / H
        phi_3 = 1 / 2 - phi_2 / H
        x = math.exp(-H) * x + phi_1 * newest + h * phi_2 * slope + h ** 2 * phi_3 * bend
        noise = standard_normal(x.shape, generator).to(x)
        x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise
    return x

def optimise_noise(sample, noise, loss, steps, lr):
    """DITTO ([7] section 3): Adam moves the noise [B, ...] to lower loss(sample(noise))."""
    noise = noise.detach().clone().requires_grad_()
    adam = torch.optim.Adam([noise], lr)
    for _ in range(steps):
        noise.grad, = torch.autograd.grad(loss(sample(noise)), noise)
        adam.step()
    return noise.detach()

def generate(net, objective, shape, sampler="heun", steps=9, seed=0, schedule=None, eta=1.0,
             init=None, init_noise=None, keep=None, noise=None, device="cpu", **cond):
    """Draw latents of `shape` [B, C, L]; item i, from noise of seed + i, is the same in any batch.
    schedule: noise levels sigma/alpha, in place of steps; see karras_times.
    init [B, C, L]: starts from it, noised to time init_noise, by default where sigma = alpha.
    keep [L], bool: frames of init that stay; init_noise=t_max invents the others.
    noise: starts from it, with gradients.
    Lifts out with: dpmpp_3m_sde, euler, expand, heun, linear_times, polyexponential_times,
    standard_normal."""
    if sampler not in ("euler", "heun", "dpmpp_3m_sde"):
        raise ValueError(f"got sampler {sampler!r}: euler, heun or dpmpp_3m_sde")
    start = objective.t_max
    if init is not None:
        start = float(objective.time_at(1.0) if init_noise is None else init_noise)
    if not 0 <= start <= objective.t_max:
        raise ValueError(f"init_noise must be from 0 to {objective.t_max:g}, got {start:g}")
    if start == 0:
        return init
    if schedule is None:
        # Rectified flow's even times for all objectives, by sigma/alpha.
        t = torch.tensor(start, dtype=torch.float64)
        flow_t = objective.sigma(t) / (objective.alpha(t) + objective.sigma(t))
        flow_times = linear_times(steps, flow_t)
        schedule = flow_times / (1 - flow_times)  # inf at t = 1
        if sampler == "dpmpp_3m_sde":
            high = min(80.0, schedule[0].item())
            schedule = polyexponential_times(steps, min(0.002, high / 2), high)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    if noise is None:
        noise = standard_normal(shape, generators).to(device)
    data = init if start < objective.t_max else torch.zeros_like(noise)  # t_max: noise alone
    def keeping(x_t, t):  # what stays, noised to t
        return x_t if keep is None else torch.where(keep, objective.add_noise(init, noise, t), x_t)
    def velocity(x_t, t):
        return objective.velocity(net, keeping(x_t, t), t, **cond)
    def denoise(scaled, ratio):  # x_t / alpha, sigma / alpha
        t = objective.time_at(ratio)
        x_t = expand(objective.alpha(t), scaled) * scaled
        return objective.denoise(net, keeping(x_t, t), t, **cond)
    with torch.set_grad_enabled(noise.requires_grad):
        if sampler == "dpmpp_3m_sde":
            x = dpmpp_3m_sde(denoise, data + schedule[0] * noise, schedule, eta, generators)
        else:
            times = objective.time_at(schedule).nan_to_num(start)  # rectified flow's time_at(inf)
            x = objective.add_noise(data, noise, times[0])
            x = (euler if sampler == "euler" else heun)(velocity, x, times)
    return x if keep is None else torch.where(keep, init, x)

# ---
# 4. The U-Net: which network can learn this?
#
# Noise is judged close by, a pitch by the whole note. So the network halves L a few times
# and doubles it back; skip connections carry the detail. `UNet1d` [8] adds to `TutorialUNet`:
#
#     time       scales and shifts the features in every block
#     residuals  x + f(x): gradients pass unchanged
#     norm       scales each frame's features to size 1 at any noise
#     attention  adds a mean of all frames, weighted by likeness; only where frames are few
#     position   near t = 1 nothing in x_t tells a note's start from its end
#
# Try: `python minidiff.py sample --pitch 60 --seconds 3`. After the one second it learnt, all
# frames have one position: the note stops fading.

class TutorialUNet(nn.Module):
    """Convolutions, ReLU, skips by addition; t enters once, at the bottom: [B, C, L] -> same."""
    def __init__(self, channels, width=128, depth=5):
        super().__init__()
        widths = [channels] + [width * 2 ** i for i in range(depth)]
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(nn.Conv1d(D, D_out, 4, 2, 1) for D, D_out in pairs)
        self.middle = nn.Conv1d(widths[-1], widths[-1], 3, 1, 1)
        self.time_mlp = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, widths[-1]))
        self.up = nn.ModuleList(nn.ConvTranspose1d(D_out, D, 4, 2, 1) for D, D_out in pairs[::-1])
        self.exit = nn.Conv1d(channels, channels, 1)
    def forward(self, x, t):
        skips = [F.pad(x, (0, -x.shape[2] % 2 ** len(self.down)))]  # to a multiple
        for conv in self.down:
            skips.append(F.relu(conv(skips[-1])))
        L = x.shape[2]
        x = F.relu(self.middle(skips.pop())) + self.time_mlp(t[:, None])[:, :, None]
        for conv in self.up:
            x = F.relu(conv(x)) + skips.pop()
        return self.exit(x)[:, :, :L]

def time_embedding(t, D):
    """Sines and cosines of 1000 t, since [18] section 3.5 is made for integers: [B] -> [B, D]."""
    powers = torch.arange(D // 2, device=t.device) / (D // 2)
    angles = 1000 * t.float()[:, None] * 10_000 ** -powers
    return torch.cat([angles.sin(), angles.cos()], 1)

class FrameNorm(nn.LayerNorm):
    """LayerNorm over the features of each frame: [B, D, L] -> same."""
    def forward(self, x):
        return super().forward(x.mT).mT

class ResidualBlock(nn.Module):
    """x + f(x, embedding): [B, D, L] -> [B, D_out, L]. Lifts out with: FrameNorm."""
    def __init__(self, D, D_out, embedding):
        super().__init__()
        self.enter = nn.Sequential(FrameNorm(D), nn.SiLU(), nn.Conv1d(D, D_out, 3, 1, 1))
        self.modulate = nn.Linear(embedding, 2 * D_out)
        self.norm = FrameNorm(D_out)
        self.exit = nn.Conv1d(D_out, D_out, 3, 1, 1)
        self.skip = nn.Conv1d(D, D_out, 1) if D != D_out else nn.Identity()
    def forward(self, x, embedding):
        scale, shift = self.modulate(F.silu(embedding))[:, :, None].chunk(2, 1)
        hidden = self.norm(self.enter(x)) * (1 + scale) + shift
        return self.skip(x) + self.exit(F.silu(hidden))

class SelfAttention(nn.Module):
    """x + attention over L ([18] section 3.2): [B, D, L] -> same. Lifts out with: FrameNorm."""
    def __init__(self, D, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Sequential(FrameNorm(D), nn.Conv1d(D, 3 * D, 1))
        self.out = nn.Conv1d(D, D, 1)
    def forward(self, x):
        qkv = self.qkv(x).unflatten(1, (3, self.heads, -1)).mT  # [B, 3, heads, L, D/heads]
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.out(mixed.mT.flatten(1, 2))

class UNet1d(nn.Module):
    """A U-Net with labels [B, n] and curves [B, n, L] ([8] section 3): x [B, C, L] -> same. Any L.
    window: number of distinct positions; later frames share the last.
    Lifts out with: FrameNorm, ResidualBlock, SelfAttention, time_embedding."""
    def __init__(self, channels, width=128, multipliers=(1, 2, 2), label_sizes=(), controls=0,
                 heads=4, window=1):
        super().__init__()
        self.width = width
        self.controls = controls
        self.window = window
        widths = [width * n for n in (1, *multipliers)]
        wide = 2 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.tables = nn.ModuleList(nn.Embedding(size + 1, wide) for size in label_sizes)
        self.enter = nn.Conv1d(channels + 10 * controls, width, 3, 1, 1)
        self.position = nn.Linear(width, width)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for i, (D, D_out) in enumerate(pairwise(widths)):
            halve = nn.Conv1d(D, D, 4, 2, 1) if i > 0 else nn.Identity()
            attend = SelfAttention if i > 0 else nn.Identity  # takes any arguments
            self.down.append(nn.ModuleList([halve, ResidualBlock(D, D_out, wide),
                                            attend(D_out, heads)]))
            self.up.insert(0, nn.ModuleList([ResidualBlock(2 * D_out, D, wide), attend(D, heads)]))
        self.middle = ResidualBlock(widths[-1], widths[-1], wide)
        self.exit = nn.Sequential(FrameNorm(width), nn.SiLU(), nn.Conv1d(width, channels, 3, 1, 1))

    def forward(self, x, t, labels=-1, controls=math.nan):
        B, _, L = x.shape
        labels = torch.as_tensor(labels, device=x.device).expand(B, len(self.tables)) + 1
        rows = [table(label) for table, label in zip(self.tables, labels.T)]  # 0: not given
        embedding = self.time_mlp(time_embedding(t, self.width)) + sum(rows)
        controls = torch.as_tensor(controls, device=x.device).expand(B, self.controls, L)
        # A curve (pitch in octaves) gives 10: value, "is given", waves of 1 to 8 turns a unit.
        waves = [f(math.tau * 2 ** k * controls) for k in range(4) for f in (torch.sin, torch.cos)]
        curves = torch.cat([controls, ~controls.isnan(), *waves], 1).nan_to_num()
        x = F.pad(torch.cat([x, curves], 1), (0, -L % 2 ** (len(self.down) - 1)))
        frame = torch.arange(x.shape[2], device=x.device).clamp(max=self.window - 1)
        position = time_embedding(frame / 1000, self.width)  # undoes its 1000
        skips = [self.enter(x) + self.position(position).T]
        for halve, block, attend in self.down:
            skips.append(attend(block(halve(skips[-1]), embedding)))  # [B, D, L/2^i]
        x = self.middle(skips[-1], embedding)
        for skip, (block, attend) in zip(reversed(skips[1:]), self.up):
            x = F.interpolate(x, skip.shape[2])
            x = attend(block(torch.cat([x, skip], 1), embedding))
        return self.exit(x)[:, :, :L]

# ---
# 5. Sound: what is a note, and how do we hear that it is in tune?
#
# A plucked string is a sum of harmonics. The k-th has about k times the first's frequency; where
# and how dully the string is plucked sets their sizes. They die away.
#
# A sound is most like itself one period later: there its autocorrelation peaks. Noise does not
# repeat, so the peak's height r is the harmonic share of the power (Boersma, IFA Proc. 17, 1993).
#
# Try: `python minidiff.py sample --pitch 43`. It prints the pitch it hears.

def resample(audio, from_rate, to_rate):
    """Cut or extend the spectrum, rates in Hz: [..., T] -> [..., ceil(T to_rate / from_rate)]."""
    T = audio.shape[-1]
    seconds = math.ceil(1.1 * T / from_rate)  # padding: to an FFT a sound repeats
    spectrum = torch.fft.rfft(audio.double(), n=seconds * from_rate)
    out = torch.fft.irfft(spectrum, n=seconds * to_rate) * (to_rate / from_rate)
    return out[..., :math.ceil(T * to_rate / from_rate)].float()

def load_audio(path, sample_rate, start=0.0, seconds=math.inf):
    """Read a sound file, mono: [T]. ValueError names a bad file. Lifts out with: resample."""
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            file.seek(round(start * rate))
            data = file.read(round(min(seconds * rate, file.frames)), "float32", always_2d=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"{path}: expected finite samples")
    return resample(torch.from_numpy(data.mean(axis=1)), rate, sample_rate)

def save_audio(path, audio, sample_rate):
    """Write audio [T] in 16 bits, scaled down if its peak is above 1; returns the peak."""
    peak = audio.abs().max().item()
    if not math.isfinite(peak):
        raise ValueError(f"{path}: expected finite samples")
    soundfile.write(path, (audio / max(peak, 1.0)).detach().cpu().numpy(), sample_rate)
    return peak

def pluck(pitch, velocity, seconds, sample_rate, generator=None):
    """A plucked string of random timbre: [T]. velocity: MIDI's force, to 127."""
    point, bright, decay = torch.rand(3, generator=generator).double()
    force = velocity / 127
    f_0 = 440 * 2 ** ((pitch - 69) / 12)
    k = torch.arange(1, 41).double()[:, None]
    f = f_0 * k * ((1 + 1e-4 * k ** 2) / (1 + 1e-4)).sqrt()  # 1e-4: stiffness
    place = 0.1 + 0.4 * point
    dull = 0.45 - 0.2 * bright - 0.2 * force
    fall = (1 + 3 * decay) * (1 + 0.15 * (k - 1)) * math.sqrt(f_0 / 220)
    loud = (f <= 0.45 * sample_rate) * (math.pi * k * place).sin() / k * ((1 - k) * dull).exp()
    when = torch.arange(round(seconds * sample_rate)) / sample_rate
    turns = (f * when.double()).frac().float()
    audio = (loud.float() * (-fall.float() * when).exp() * (math.tau * turns).cos()).sum(0)
    fade = (when / 0.003).clamp(max=1) * ((seconds - when) / 0.02).clamp(0, 1)
    return (0.1 + 0.8 * force) / audio.abs().max().clamp_min(1e-12) * fade * audio

def envelope(audio, hop):
    """The largest |x| per `hop` samples: [B, T] -> [B, ceil(T / hop)]."""
    return F.max_pool1d(audio.abs(), hop, ceil_mode=True)

def periodicity(audio, sample_rate, hop, low=34.0, finer=4):
    """Per hop, pitch (0 if r <= 0.5) and highest r (0 if 50 dB below the loudest): [B, T] -> [B, L]
    each. low: least pitch. finer: delays per sample. Two periods peak as high as one: to prefer
    the shorter, a peak loses 0.04 an octave. Lifts out with: envelope."""
    longest = finer * math.ceil(sample_rate / (440 * 2 ** ((low - 69) / 12)))
    shortest = math.ceil(finer * sample_rate / 2637)  # pitch 100
    width = 4 * longest // finer  # four longest periods
    left = (width - hop) // 2
    x = F.pad(audio, (left, width - 1 - left)).unfold(1, width, hop)  # [B, L, width]
    window = torch.hann_window(width).to(audio)
    def correlate(x):
        power = torch.fft.rfft(x, n=2 * width).abs().square()
        # Its inverse FFT is the autocorrelation; appended zeros make delays finer.
        return torch.fft.irfft(power, n=2 * width * finer)[..., :longest + 2]
    # The window's own correlation falls: divide it out.
    r = correlate((x - x.mean(-1, keepdim=True)) * window) / correlate(window)
    r = r / r[..., :1].clamp_min(1e-12)
    is_peak = r == F.max_pool1d(r, 3, 1, 1)
    peaks = (r * is_peak)[..., shortest:-1]
    octaves = torch.arange(shortest, longest + 1).to(audio).log2()
    best = shortest + (peaks - 0.04 * octaves).argmax(-1, keepdim=True)
    r0, r1, r2 = (r.gather(-1, best + i) for i in (-1, 0, 1))
    top = (r2 - r0) / 2 / (2 * r1 - r0 - r2).clamp_min(1e-12)  # the parabola's peak, from best
    pitch = 69 + 12 * torch.log2(sample_rate * finer / 440 / (best + top)[..., 0])
    loud = envelope(audio, hop)
    height = peaks.amax(-1).clamp(max=1) * (loud > 3e-3 * loud.amax(1, keepdim=True))
    return torch.where(height > 0.5, pitch, 0.0), height

def pitch_track(audio, sample_rate, hop, low=34.0):
    """The pitch of `periodicity`: [B, T] -> [B, L]. Lifts out with: envelope, periodicity."""
    return periodicity(audio, sample_rate, hop, low)[0]

def note_pitch(track):
    """The median pitch of frames that have one, else NaN: [B, L] -> [B]."""
    return torch.where(track > 0, track, math.nan).nanmedian(dim=1).values

# ---
# 6. The Snake VAE: how does a second of sound become 63 vectors?
#
# 16,000 numbers a second are too many to diffuse, so a codec squeezes 256 samples into one frame of
# 16 channels. A plain auto-encoder leaves holes between its latents that decode to rubbish. A
# *variational* one [12] gives each latent value a mean and a variance, decodes a draw, z = mean +
# e^(log_variance / 2) noise, and adds to the loss, with a small weight,
#
#     KL(Normal(mean, variance) || Normal(0, 1))  =  (mean^2 + variance - 1 - ln variance) / 2,
#
# their gap, 0 if equal. It keeps variances from 0, so neighbouring latents overlap and holes close.
#
# Recorded levels differ a hundredfold, and notes die away. So a sound is divided by its smooth
# level, which travels as channel 17.
#
# Try: `python minidiff.py sample --init-noise 0 --init-audio runs/plucks/samples/real_1.wav`. You
# hear the codec's round trip.

class Snake(nn.Module):
    """x + sin(omega x)^2 / omega, omega > 0 learned by feature ([10] eq. 3): [B, D, T] -> same.
    It bends everywhere, as tones do; a ReLU bends at 0 only."""
    def __init__(self, channels):
        super().__init__()
        self.log_omega = nn.Parameter(torch.zeros(channels, 1))
    def forward(self, x):
        omega = self.log_omega.exp()
        return x + torch.sin(omega * x).square() / omega

class ResidualUnit(nn.Sequential):
    """x + two convolutions of it, the first dilated: [B, D, T] -> same. Lifts out with: Snake."""
    def __init__(self, width, dilation):
        super().__init__(Snake(width), nn.Conv1d(width, width, 3, 1, dilation, dilation),
                         Snake(width), nn.Conv1d(width, width, 1))
    def forward(self, x):
        return x + super().forward(x)

class Recurrent(nn.LSTM):
    """x + an LSTM over frames: [B, D, L] -> same."""
    def forward(self, x):
        return x + super().forward(x.permute(2, 0, 1))[0].permute(1, 2, 0)

class SnakeVAE(nn.Module):
    """Audio [B, T] <-> latents [B, C, L], L = ceil(T / hop) ([11] section 3.1); the last channel is
    ln(level). Lifts out with: Recurrent, ResidualUnit, Snake."""
    def __init__(self, sample_rate, channels=16, strides=(16, 4, 4), width=64, dilations=(1, 3)):
        super().__init__()
        self.sample_rate = sample_rate
        self.channels = channels + 1  # and the level
        self.hop = math.prod(strides)
        widths = [1] + [width * 2 ** i for i in range(len(strides))]
        encoder = []
        decoder = []
        for stride, (D, D_out) in zip(strides, pairwise(widths)):
            shape = 2 * stride, stride, (stride + 1) // 2  # kernel, stride, padding
            encoder += [nn.Conv1d(D, D_out, *shape), ResidualUnit(D_out, 1), Snake(D_out)]
            decoder = [*(ResidualUnit(D_out, n) for n in dilations), Snake(D_out),
                       nn.ConvTranspose1d(D_out, D, *shape, output_padding=stride % 2)] + decoder
        wide = widths[-1]
        encoder.insert(-1, Recurrent(wide, wide // 2, bidirectional=True))
        decoder.insert(0, Recurrent(wide, wide // 2, bidirectional=True))
        self.encoder = nn.Sequential(*encoder, nn.Conv1d(wide, 2 * channels, 3, 1, 1))
        self.decoder = nn.Sequential(nn.Conv1d(channels, wide, 3, 1, 1), *decoder)
        # Little noise at first, or the decoder ignores the latents.
        nn.init.constant_(self.encoder[-1].bias[channels:], -8.0)
    def posterior(self, audio):
        """Levelled audio [B, T] -> mean, log_variance, [B, C - 1, L] each."""
        audio = F.pad(audio, (0, -audio.shape[1] % self.hop))
        mean, log_variance = self.encoder(audio[:, None]).chunk(2, 1)
        return mean, log_variance.clamp(-20, 20)
    def stretch(self, curve):
        """By linear interpolation: [B, L] -> [B, L * hop]."""
        return F.interpolate(curve[:, None], scale_factor=self.hop, mode="linear")[:, 0]
    def levelled(self, audio):
        """Audio [B, T] divided by its level [B, L], the RMS of 15 hops, but at least 0.03 of the
        highest: a note's end is lifted by 30 dB at most, silence stays silent."""
        power = F.avg_pool1d(audio.square(), self.hop, ceil_mode=True)
        level = F.avg_pool1d(power, 15, 1, 7, count_include_pad=False).sqrt()
        level = level.maximum(0.03 * level.amax(1, keepdim=True)).clamp_min(1e-5)
        return audio / self.stretch(level)[:, :audio.shape[1]], level
    def encode(self, audio):
        audio, level = self.levelled(audio)
        return torch.cat([self.posterior(audio)[0], level.log()[:, None]], 1)
    def decode(self, latents):
        audio, _ = self.levelled(self.decoder(latents[:, :-1])[:, 0])  # less its own level
        # Errors differ by frame: the mean of 5 errs less.
        level = F.avg_pool1d(latents[:, -1], 5, 1, 2, count_include_pad=False).exp()
        return audio * self.stretch(level)

def kl_divergence(mean, log_variance):
    """The mean over all values ([12] appendix B)."""
    return 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()

# ---
# 7. What the VAE is trained on: when are two sounds the same?
#
# Shift a tone by half a period: it sounds the same, but the squared error is largest. The
# magnitudes of a spectrogram forget the phase, so we compare these. As they leave the phase open,
# RMS error and L1, the mean |error|, settle it. Where several sounds fit, the decoder plays their
# dull average. With --adversarial-from, a discriminator, the judge, learns to hear dullness, the
# decoder to avoid it.
#
# The gradients g_i = dloss_i/doutput differ a hundredfold. The balancer [11] divides each
# by its running mean norm <|g_i|>, so that weight_i sets its share of total_norm:
#
#     g  =  total_norm  sum over i of  (weight_i / their sum) (g_i / <|g_i|>).
#
# Try: `python minidiff.py train --run runs/d --steps 9 --codec-steps 150 --adversarial-from 100
# --seconds 0.5`. Its log.csv has each loss's share.

def stft(audio, size):
    """Spectra in Hann windows, [B, T] -> [B, frequencies, frames]; a full sine has magnitude 1."""
    window = torch.hann_window(size, device=audio.device)
    return torch.stft(audio, size, size // 4, window=window, pad_mode="constant",
                      return_complex=True) * 4 / size

def stft_loss(estimate, target, sizes=(2048, 512), floor=0.01):
    """||wanted - found|| / ||wanted|| + mean |ln wanted - ln found|, over `sizes` ([19] eq. 4-6).
    Long windows tell pitch, short ones time. Below `floor` all are alike. Lifts out with: stft."""
    total = 0.0
    for size in sizes:
        found, wanted = (stft(audio, size).abs().flatten(1) for audio in (estimate, target))
        silent = floor * math.sqrt(wanted.shape[1])  # the norm if all is `floor`
        total += (wanted - found).norm(dim=1) / wanted.norm(dim=1).clamp_min(silent)
        total += ((wanted + floor).log() - (found + floor).log()).abs().mean(1)
    return total.mean() / len(sizes)

class STFTDiscriminator(nn.Module):
    """Tells recordings from reconstructions: [B, T] -> logits [B, 1, ., .] and hidden layers.
    Lifts out with: stft."""
    def __init__(self, widths=(2, 32, 64, 128, 128)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(D, D_out, 3, 2, 1) for D, D_out in pairwise(widths))
        self.exit = nn.Conv2d(widths[-1], 1, 3, 1, 1)
    def forward(self, audio):
        x = torch.view_as_real(stft(audio, 512)).permute(0, 3, 1, 2)
        # Keep the phase, take the root of the magnitude: faint harmonics count too.
        maps = [x * (x.square().sum(1, keepdim=True) + 1e-7) ** -0.25]
        for layer in self.layers:
            maps.append(F.leaky_relu(layer(maps[-1]), 0.1))
        return self.exit(maps[-1]), maps[1:]

def hinge_discriminator_loss(real, fake):
    """Wants logits above 1 if real, below -1 if fake ([11] section 3.4)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

def hinge_generator_loss(fake):
    """Not [11]'s relu(1 - fake), which is flat above 1."""
    return -fake.mean()

def feature_matching_loss(real, fake):
    """L1 distance of hidden layers, relative to the real ones' size ([11] section 3.4)."""
    return sum(F.l1_loss(b, a.detach()) / a.detach().abs().mean().clamp_min(1e-8)
               for a, b in zip(real, fake)) / len(real)

class LossBalancer(nn.Module):
    """Turn weights {name: number} of losses {name: scalar} into shares of the gradient at the
    output ([11] section 3.4). |g_i|: norm per item, mean over the batch. free: losses that
    bypass it (the KL)."""
    def __init__(self, weights, total_norm=1.0, ema_decay=0.999):
        super().__init__()
        self.weights = weights
        self.total_norm = total_norm
        self.ema_decay = ema_decay
        self.register_buffer("norms", torch.zeros(2, len(weights)))

    def backward(self, losses, output, free=None):
        total = sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(output)
        self.shares = {}
        for name, loss in losses.items():
            g, = torch.autograd.grad(loss, output, retain_graph=True)
            norm = g.flatten(1).norm(dim=1).mean()
            running = self.norms[:, [*self.weights].index(name)]
            running.lerp_(torch.stack([norm, torch.ones_like(norm)]), 1 - self.ema_decay)
            mean = running[0] / running[1]  # undoes the start at 0
            factor = self.weights[name] / total * self.total_norm / mean.clamp_min(1e-12)
            balanced += factor * g
            self.shares[name] = factor * norm / self.total_norm
        # The gradient of this sum at `output` is `balanced`.
        ((balanced * output).sum() + sum((free or {}).values())).backward()

# ---
# 8. Data: where do the notes come from?
#
# data[i] is a sound [T], data.labels[i] its pitch, MIDI velocity and instrument (source),
# data.valid[i] whether it is held out. Each sound is encoded once, and standardised: else noise of
# variance 1 would drown a channel of deviation 0.01. A melody's condition is two curves, loudness
# and pitch by frame.
#
# Try: `python -c "import minidiff as m; m.save_audio('phrase.wav', m.Melodies(1)[0], 16000)"`. You
# hear a phrase.

class Plucks(Dataset):
    """Plucked strings: note i has pitch 40 + i mod 37 and one of five velocities."""
    sources = ["pluck"]

    def __init__(self, count=2220, seed=0, seconds=1.0, sample_rate=16_000):
        self.seed = seed
        self.seconds = seconds
        self.sample_rate = sample_rate
        note = torch.arange(count)
        self.valid = note >= count - count // 6
        generator = torch.Generator().manual_seed(seed)
        velocity = 25 * torch.randint(1, 6, (count,), generator=generator)
        self.labels = torch.stack([40 + note % 37, velocity, 0 * note], 1)
        self.audio = torch.stack([self.play(i, generator) for i in range(count)])
    def play(self, i, generator):
        return pluck(*self.labels[i, :2].tolist(), self.seconds, self.sample_rate, generator)
    def __len__(self):
        return len(self.audio)
    def __getitem__(self, i):
        return self.audio[i]

class Melodies(Plucks):
    """Phrases of notes and rests, without labels."""
    sources = []
    def __init__(self, count=720, seed=0, seconds=2.0, sample_rate=16_000):
        super().__init__(count, seed, seconds, sample_rate)
        self.labels[:] = -1
    def play(self, i, generator):
        random = np.random.default_rng([self.seed, i])
        pitch = random.integers(46, 70)
        notes = []
        while sum(map(len, notes)) < self.seconds * self.sample_rate:
            lasts = random.choice([0.25, 0.375, 0.5, 0.75, 1.0])
            pitch = np.clip(pitch + random.integers(-5, 6), 40, 76)
            note = pluck(pitch, random.integers(40, 128), lasts, self.sample_rate, generator)
            notes.append(note if random.random() > 0.12 else 0 * note)
        return torch.cat(notes)[:round(self.seconds * self.sample_rate)]

class AudioFolder(Dataset):
    """Recordings below a folder, cut into half-overlapping sounds. NSynth's names [13] give
    labels: guitar_004-071-025.wav has pitch 71, velocity 25. Held out: folders that end in -valid,
    else 1 + n // 20 of n files."""
    label = re.compile(r"(.+)_\d+-(0\d\d|1[01]\d|12[0-7])-(0\d\d|1[01]\d|12[0-7])")

    def __init__(self, root, sample_rate=None, seconds=None):
        rates = []
        lengths = {}
        for path in sorted(Path(root).rglob("*")):
            folder = path.is_dir() and not path.is_symlink()
            if folder or "/." in f"/{path.relative_to(root).as_posix()}":  # hidden
                continue
            try:
                # Decode: header lengths lie.
                rate = soundfile.info(path).samplerate
                lengths[path] = len(load_audio(path, rate)) / rate
                rates.append(rate)
            except (RuntimeError, TypeError, ValueError) as error:
                print(f"left out: {path}: {error}")
        if len(rates) < 2:
            raise ValueError(f"{root}: expected a folder with 2 usable sound files")
        self.sample_rate = sample_rate or min(sorted(rates)[len(rates) // 2], 22_050)
        self.seconds = seconds or min(4.0, max(lengths.values()))
        held = {path for path in lengths if path.parent.name.endswith("-valid")}
        if len(held) in (0, len(lengths)):
            shuffled = sorted(lengths, key=lambda path: zlib.crc32(path.name.encode()))
            held = shuffled[:1 + len(lengths) // 20]
        self.pieces = []
        for path, length in lengths.items():
            last = max(0.0, length - self.seconds)
            starts = [*np.arange(0, last, self.seconds / 2), last]
            self.pieces += [(path, start) for start in starts]
        self.valid = torch.tensor([path in held for path, _ in self.pieces])
        names = [self.label.fullmatch(path.stem) for path, _ in self.pieces]
        self.sources = sorted({name[1] for name in names if name})
        self.labels = torch.tensor([[int(name[2]), int(name[3]), self.sources.index(name[1])]
                                    if name else [-1, -1, -1] for name in names])
    def __len__(self):
        return len(self.pieces)
    def __getitem__(self, i):
        path, start = self.pieces[i]
        audio = load_audio(path, self.sample_rate, start, self.seconds)
        return F.pad(audio, (0, round(self.seconds * self.sample_rate) - len(audio)))

NSYNTH_URL = ("https://media.githubusercontent.com/media/SonyCSLParis/test-lfs/refs/heads/master/"
              "NSYNTH_GUITAR_MP3.zip")
NSYNTH_SHA256 = "cbabb3ba2ce81c28982eb41c3ba5127a"  # its first half

def download_nsynth(folder="data", url=NSYNTH_URL, sha256=NSYNTH_SHA256):
    """Fetch NSynth's guitars; returns their folder."""
    target = Path(folder, "NSYNTH_GUITAR_MP3")
    if target.exists():
        return target
    os.makedirs(folder, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, f"{target}.zip", hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{url}: {error}") from None
    zipfile.ZipFile(f"{target}.zip").extractall(f"{target}.new")
    os.replace(f"{target}.new", target)
    return target

class Music2Latent:
    """The codec of [14], used like SnakeVAE: L = (T - 1536) // 4096, at least 1."""
    sample_rate = 44_100
    hop = 4096
    channels = 64

    def __init__(self, seed=0, device="cpu"):
        import music2latent
        self.seed = seed
        self.device = "cpu" if "mps" in str(device) else device  # mps garbles it
        try:
            self.model = music2latent.EncoderDecoder(device=self.device)
        except Exception:
            raise ValueError("Music2Latent does not load: put music2latent.pt of huggingface.co/"
                             f"SonyCSLParis/music2latent in {music2latent.__path__[0]}/models")
    def encode(self, audio):
        audio = F.pad(audio, (0, max(0, self.hop + 1536 - audio.shape[1])))
        latents = self.model.encode(audio.to(self.device), max_batch_size=16)
        return latents.float().to(audio.device)
    def decode(self, latents):
        audio = []
        with torch.random.fork_rng():
            for item in latents.to(self.device).split(1):
                torch.manual_seed(self.seed)
                audio.append(self.model.decode(item))
        return torch.cat(audio).float().to(latents.device)

def measure_curves(audio, sample_rate, hop):
    """Envelope, and octaves from middle C (unvoiced: -5), by hop: [B, T] -> [B, 2, L]."""
    tracks = torch.cat([pitch_track(sound[None], sample_rate, hop) for sound in audio])
    return torch.stack([envelope(audio, hop), (tracks - 60) / 12], 1)

def melody_curves(melody, frames_per_note, played):
    """Curves [2, L] of pitches and None (a rest); notes are as loud as in `played` [N, 2, L]."""
    loud, octaves = played.transpose(0, 1).flatten(1)
    voiced = octaves > -5
    change = loud[1:] / loud[:-1].clamp_min(1e-6)
    fade = change[voiced[1:] & voiced[:-1]].median()
    edges = [round(k * frames_per_note) for k in range(len(melody) + 1)]
    curves = torch.tensor([[0.0], [-5.0]]).repeat(1, edges[-1])
    for pitch, (i, j) in zip(melody, pairwise(edges)):
        if pitch is not None:
            curves[0, i:j] = loud[voiced].quantile(0.8) * fade ** torch.arange(j - i)
            curves[1, i:j] = (pitch - 60) / 12
    return curves

def save_checkpoint(path, **state):
    """Written whole or not at all."""
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)

def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU; else ValueError. No code in a file is run."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:
        raise ValueError(f"{path}: no checkpoint; train first") from None

@torch.no_grad()
def encode_all(codec, data, path, condition="none", device="cpu", batch=16):
    """Write and return x [N, C, L], standardised; cond, for the net; a and b, indices of held-out
    sounds by turns, to compare; real, the sounds b; labels; valid; facts."""
    sounds = DataLoader(data, batch)
    print(f"encoding {len(data)} sounds")
    z = torch.cat([codec.encode(audio.to(device)).cpu() for audio in sounds])
    train = ~data.valid
    mean = z[train].mean((0, 2))[:, None]
    std = z[train].std((0, 2))[:, None].clamp_min(0.01)
    cond = {"labels": data.labels} if condition == "note" else {}
    if condition == "control":
        curves = [measure_curves(audio, codec.sample_rate, codec.hop) for audio in sounds]
        curves = torch.cat(curves)[:, :, :z.shape[2]]  # [N, 2, L]
        curves[:, 0] /= curves[train, 0].max()
        cond["controls"] = curves
    held = data.valid.nonzero()[:, 0]
    pairs = max(1, min(185, len(held) // 2))
    a, b = held[torch.linspace(0, len(held) - 1, 2 * pairs).round().long()].view(-1, 2).T
    facts = dict(condition=condition, sample_rate=codec.sample_rate, sources=data.sources,
                 channels=z.shape[1], frames=z.shape[2], mean=mean, std=std,
                 pitches=data.labels[train, 0].tolist())
    state = dict(x=(z - mean) / std, cond=cond, facts=facts, labels=data.labels, valid=data.valid,
                 a=a, b=b, real=torch.stack([data[i] for i in b]))
    save_checkpoint(path, **state)
    return state

# ---
# 9. Training: how do we get good weights?
#
# A matrix stretches directions by its singular values. A gradient has few large ones: a step along
# it moves few directions. Adam evens out a step's entries, Muon [20] its singular values.
#
# A batch's gradient is noisy: weights rattle about the best ones. They settle as the learning
# rate falls to 0; their moving average (EMA) is steadier at any step. A checkpoint holds all the
# next step needs: on a CPU, with the same --steps, a resumed training ends with the same bits. With
# torchrun, each GPU draws a part of the batch.
#
# Try: `python minidiff.py train --resume --steps 1200`: 100 more.

OBJECTIVES = {"rf": RectifiedFlow(p_mean=0.5, p_std=1.3), "vp": VPDiffusion(),
              "edm": EDM(p_mean=0.5, p_std=1.3, sigma_max=20.0)}
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

def learning_rate(step, steps, peak):
    """Rises to `peak` in 60 steps, falls to 0 over the last half."""
    return peak * min((step + 1) / 60, 1.0, 2 * (steps - step) / steps)

def warm_average(averages, weights, count):
    """EMA, for AveragedModel: a small decay at first forgets the start."""
    decay = min((1 + count.item()) / (5 + count.item()), 0.998)
    for average, weight in zip(averages, weights):
        average.lerp_(weight, 1 - decay)

def orthogonalise(x):
    """Bring singular values of x [N, ., .] from 0.006...1 of its norm into 0.2...2 [21]."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    # x x^T x has the singular values of x, cubed: odd polynomials act on these alone.
    for c1, c3, c5 in [(8.287, -23.60, 17.30), (4.107, -2.948, 0.5448)]:
        square = x @ x.mT
        x = c1 * x + (c3 * square + c5 * square @ square) @ x
    return x

class Muon(torch.optim.Adam):
    """Adam, but kernels of convolutions, as matrices of up to 96 rows, move along their gradient's
    moving average, orthogonalised ([20] section 2), by an RMS of 0.2 lr."""
    def __init__(self, net, lr):
        super().__init__(net.parameters(), lr, (0.9, 0.99))
        self.kernels = [weight for weight in net.parameters() if weight.ndim == 3]
    @torch.no_grad()
    def step(self):
        alike = {}  # blocks by shape
        for kernel in self.kernels:
            if kernel not in self.state:
                self.state[kernel] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(kernel)}
            g = kernel.grad
            mean = self.state[kernel]["exp_avg"].lerp_(g, 0.05)
            rows = g.lerp(mean, 0.95).flatten(1)  # g counts again (Nesterov)
            for weight, block in zip(kernel.flatten(1).split(96), rows.split(96)):
                alike.setdefault(block.shape, []).append((weight, block))
            kernel.grad = None  # Adam skips it
        for shape, pairs in alike.items():
            weights, blocks = zip(*pairs)
            size = 0.2 * self.param_groups[0]["lr"] * max(shape) ** 0.5  # RMS: max(shape)^-1/2
            for weight, block in zip(weights, orthogonalise(torch.stack(blocks))):
                weight.sub_(size * block)
        super().step()

def fit(what, net, learn, steps, path, lr, generator, settings, **parts):
    """Train net up to step `steps`, from the checkpoint at `path`, if any; returns its average.
    learn(step) -> {name: scalar} runs forward and backward. parts: what else has a state."""
    optimiser = Muon(net, lr)
    average = AveragedModel(net, multi_avg_fn=warm_average)
    parts |= {"net": net, "optimiser": optimiser, "average": average}
    done = 0
    if path.exists():
        state = load_checkpoint(path)
        done = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if RANK == 0:
            generator.set_state(state["generator"])
    rows = []
    while done < steps:
        optimiser.param_groups[0]["lr"] = learning_rate(done, steps, lr)
        optimiser.zero_grad()
        seen = learn(done)
        seen["gradient norm"] = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(net)
        done += 1
        if RANK > 0:
            continue
        rows.append({name: value.detach() for name, value in seen.items()})
        if done % 100 and done < steps:
            continue
        means = {name: sum(row[name] for row in rows).item() / len(rows) for name in rows[0]}
        rows.clear()
        if not all(map(math.isfinite, means.values())):
            raise ValueError(f"{what}: not finite at step {done}: --resume with a smaller --lr")
        said = ", ".join(f"{name} {means[name]:.3f}" for name in [*means][:4])
        print(f"{what}: step {done:,} of {steps:,}: {said}")
        with open(path.parent / "log.csv", "a") as log:
            log.writelines(f"{what},{done},{name},{means[name]}\n" for name in means)
        if done % 500 == 0 or done == steps:
            save_checkpoint(path, step=done, settings=settings, generator=generator.get_state(),
                            **{name: part.state_dict() for name, part in parts.items()})
    return average.module

def train_codec(codec, audio, steps, path, seed=0, batch_size=24, lr=1.5e-3, crop=4096,
                kl_weight=0.01, blur=0.2, adversarial_from=math.inf, settings=None):
    """Train a SnakeVAE on windows of `crop` samples of audio [N, T]; returns its average.
    blur: noise on the latents, in deviations of their means, fading: tolerance, then exactness."""
    generator = torch.Generator().manual_seed(seed)
    device = next(codec.parameters()).device
    crop = min(crop, audio.shape[1])
    audio = torch.cat([codec.levelled(some)[0] for some in audio.split(64)])
    judge = STFTDiscriminator().to(device)
    judge_adam = torch.optim.Adam(judge.parameters(), lr / 3, betas=(0.8, 0.99))
    weights = {"l1": 1, "l2": 1, "stft": 2, "adversarial": 1, "features": 2}
    balancer = LossBalancer(weights, ema_decay=0.99).to(device)
    def learn(step):
        chosen = torch.randint(len(audio), (batch_size, 1), generator=generator)
        starts = torch.randint(audio.shape[1] - crop + 1, (batch_size, 1), generator=generator)
        real = audio[chosen, starts + torch.arange(crop)].to(device)
        mean, log_variance = codec.posterior(real)
        blurred = blur * (1 - step / steps)
        variance = log_variance.exp() + (blurred * mean.detach()).var((0, 2), keepdim=True)
        z = mean + variance.sqrt() * standard_normal(mean.shape, generator).to(mean)
        estimate = codec.decoder(z)[:, 0, :crop]
        rms = ((estimate - real).square().mean(1) + 1e-8).sqrt().mean()
        losses = {"l1": F.l1_loss(estimate, real), "l2": rms, "stft": stft_loss(estimate, real)}
        seen = {"kl": kl_divergence(mean, log_variance)}
        if step >= adversarial_from:
            seen["judge"] = hinge_discriminator_loss(judge(real)[0], judge(estimate.detach())[0])
            judge_adam.zero_grad()
            seen["judge"].backward()
            judge_adam.step()
            logits, maps = judge(estimate)
            losses["adversarial"] = hinge_generator_loss(logits)
            losses["features"] = feature_matching_loss(judge(real)[1], maps)
        balancer.backward(losses, estimate, free={"kl": kl_weight * seen["kl"]})
        return losses | seen | {f"{name} share": x for name, x in balancer.shares.items()}
    return fit("codec", codec, learn, steps, path, lr, generator, settings, judge=judge,
               judge_adam=judge_adam, balancer=balancer)

def drop_conditions(cond, generator, p=0.1):
    """Withhold each of n labels [B, n] or controls [B, n, L] with probability p, and all n of an
    item with probability p, so that every subset is learnt ([4] Algorithm 1)."""
    kept = {}
    for name, value in cond.items():
        drop = torch.rand(len(value), value.shape[1] + 1, generator=generator) < p
        drop = (drop[:, 1:] | drop[:, :1]).to(value.device)  # [B, n]
        kept[name] = (value.masked_fill(drop, -1) if name == "labels" else
                      value.masked_fill(drop[:, :, None], math.nan))
    return kept

def train_diffusion(net, objective, x, cond, valid, steps, path, seed=0, batch_size=64, lr=1.5e-3,
                    settings=None):
    """Train net on x [N, C, L] and cond {name: [N, ...]} where not valid [N]; gives its average."""
    generator = torch.Generator().manual_seed(seed + RANK)
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    device = next(net.parameters()).device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    train = (~valid).nonzero()[:, 0]
    def learn(step):
        chosen = train[torch.randint(len(train), (batch_size // WORLD,), generator=generator)]
        given = {name: value[chosen].to(device) for name, value in cond.items()}
        given = drop_conditions(given, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = objective.loss(model, x[chosen].to(device), generator, **given)
        loss.backward()
        return {"loss": loss}
    return fit("diffusion", net, learn, steps, path, lr, generator, settings)

# ---
# 10. Measuring: is it any good?
#
# As asked? We count the notes within 50 cents of their pitch. The codec's own share is the ceiling.
# Like the data? We compare level, harmonics-to-noise and, for the codec, spectra. Frechet: describe
# each sound by the means and deviations of its latent channels. Fit a normal to these, and one to
# those of half of the held-out sounds: how far apart? The floor: real half to real half.
# New? nearest_ratio is the distance from generated to the nearest training latents, over that from
# held-out ones: far below 1 is a copy.
#
# Try: `python minidiff.py evaluate --steps 3`. Frechet grows.

def frechet_distance(a, b):
    """|m1 - m2|^2 + trace(V1 + V2 - 2 (V1 V2)^1/2), for normals fitted to a, b [N, D] ([15] eq. 6).
    For D = 1: (m1 - m2)^2 + (V1^(1/2) - V2^(1/2))^2. Few rows raise it."""
    if min(len(a), len(b)) < 2:
        raise ValueError("expected 2 rows")
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    v1, v2 = (torch.atleast_2d(torch.cov(rows.double().T)) for rows in (a, b))
    roots = torch.linalg.eigvals(v1 @ v2).real.clamp_min(0).sqrt()  # of (V1 V2)^1/2
    return (means + v1.trace() + v2.trace() - 2 * roots.sum()).clamp_min(0).item()

def build_net(settings):
    channels = settings["channels"]
    if settings["net"] == "tutorial":
        return TutorialUNet(channels)
    if settings["condition"] == "control":  # no window: curves tell positions
        return UNet1d(channels, 96, (1, 1, 2), controls=2)
    sizes = (128, 128, len(settings["sources"])) if settings["condition"] == "note" else ()
    return UNet1d(channels, 96, (1, 1, 2), label_sizes=sizes, window=settings["frames"])

class Run:
    def __init__(self, folder, device="cpu"):
        self.folder = Path(folder)
        self.device = device
        self.settings = settings = load_checkpoint(self.folder / "model.pt")["settings"]
        self.objective = OBJECTIVES[settings["objective"]]
        self.net = self.average("model.pt", build_net(settings))
        if settings["codec"] == "music2latent":
            self.codec = Music2Latent(settings["seed"], device)
        else:
            self.codec = self.average("codec.pt", SnakeVAE(settings["sample_rate"]))
    def average(self, name, net):
        average = AveragedModel(net)
        average.load_state_dict(load_checkpoint(self.folder / name)["average"])
        return average.module.to(self.device).eval()
    def decode(self, x):
        """x_0 [B, C, L] -> audio [B, T]."""
        latents = x.cpu() * self.settings["std"] + self.settings["mean"]
        parts = [self.codec.decode(part.to(self.device)) for part in latents.split(16)]
        return torch.cat(parts).cpu()

def describe(audio, codec, cond, real=None):
    """Figures of sounds [N, T]; cond: what was asked; real: what they copy."""
    rate = codec.sample_rate
    tracks = [periodicity(sound[None], rate, rate // 60, low=20.0) for sound in audio]
    pitch, r = map(torch.cat, zip(*tracks))
    r = r[pitch > 0]
    figures = {"level_db": 10 * audio.square().mean(1).clamp_min(1e-12).log10().mean(),
               "harmonics_db": 10 * (r / (1 - r).clamp_min(1e-5)).log10().mean()}
    if "labels" in cond:
        asked = cond["labels"][:, 0]
        close = (note_pitch(pitch) - asked).abs() < 0.5
        figures["pitch_accuracy"] = close[asked >= 0].float().mean()
    if "controls" in cond:
        loud, octaves = cond["controls"].unbind(1)
        heard = measure_curves(audio, rate, codec.hop)[..., :loud.shape[1]]
        both = torch.stack([heard[:, 0], loud]).flatten(1)
        close = (heard[:, 1] - octaves).abs() < 0.5 / 12
        figures["envelope_correlation"] = torch.corrcoef(both)[0, 1]
        figures["voiced_within_50_cents"] = close[octaves > -5].float().mean()
    if real is not None:
        T = min(audio.shape[1], real.shape[1])
        found, wanted = (stft(sounds[:, :T], 1024).abs() for sounds in (audio, real))
        floor = 1e-3 * wanted.amax((1, 2), keepdim=True) + 1e-9
        decibels = 20 * (found.maximum(floor) / wanted.maximum(floor)).log10()
        figures["spectral_distance_db"] = decibels.square().mean(1).sqrt().mean()
    return {name: x.item() for name, x in figures.items() if x.isfinite()}

@torch.no_grad()
def evaluate(run, scales=(1.0, 1.25, 2.0), sampler="heun", steps=9, seed=0):
    """Measure sounds: real, copied by the codec, generated at each scale. nfe: network calls.
    Returns figures, and {name: audio [T]}."""
    data = load_checkpoint(run.folder / "latents.pt")
    a, b = (data["x"][data[half]] for half in ("a", "b"))
    train = data["x"][~data["valid"]].flatten(1)
    cond = {name: value[data["b"]] for name, value in data["cond"].items()}
    result = {"count": len(b), "seed": seed, "nfe": 2 * steps - 1 if sampler == "heun" else steps,
              "frechet": {}, "pitch_accuracy": {}}
    kinds = {"real": (b, data["real"]), "codec": (b, run.decode(b))}
    for w in (scales if cond else [1.0]):
        began = time.perf_counter()
        x = generate(GuidedNet(run.net, w), run.objective, b.shape, sampler, steps, seed,
                     device=run.device, **cond).cpu()
        kinds[f"w = {w:g}"] = (x, run.decode(x))
        result.setdefault("seconds_per_item", (time.perf_counter() - began) / len(b))
        near = [torch.cdist(half.flatten(1), train).amin(1).mean().item() for half in (x, b)]
        result.setdefault("nearest_ratio", near[0] / max(near[1], 1e-9))  # of the first w
    for kind, (x, audio) in kinds.items():
        figures = describe(audio, run.codec, cond, data["real"] if kind == "codec" else None)
        if kind != "codec" and len(b) > 1:
            features = [torch.cat(torch.std_mean(half, 2), 1) for half in (x, a)]
            figures["frechet"] = frechet_distance(*features)
        print(f"  {kind:6}", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        for name, value in figures.items():
            result.setdefault(name, {})[kind.removeprefix("w = ")] = value
    print("{seconds_per_item:.3f} s a sound, nearest_ratio {nearest_ratio:.2f}".format(**result))
    result["frechet_floor"] = result["frechet"].pop("real", None)
    for kind in ("real", "codec"):
        result[f"pitch_accuracy_{kind}"] = result["pitch_accuracy"].pop(kind, None)
    (run.folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    firsts = zip(("real", "codec", "generated"), kinds.values())
    return result, {f"{kind}_{i}": sound for kind, (_, audio) in firsts
                    for i, sound in enumerate(audio[:4])}

def save_spectrogram(path, audio, rate):
    """A BMP of audio [T]: 0 to 3000 Hz, white 80 dB below the loudest."""
    size = 2 ** round(math.log2(rate / 16))
    rows = F.interpolate(stft(audio[None], size).abs()[:, :3000 * size // rate], 320)[0]
    decibels = 20 * (rows / rows.max().clamp_min(1e-9)).clamp_min(1e-4).log10()
    pixels = (decibels * -255 / 80).byte().repeat_interleave(3, dim=1).numpy().tobytes()
    head = struct.pack("<2s6I2H24x", b"BM", 54 + len(pixels), 0, 54, 40, 320, len(rows), 1, 24)
    path.write_bytes(head + pixels)

def write_sounds(folder, sounds, rate):
    """Add {name: audio [T]} to a folder as wav files under new names, and to its page."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "index.html", "a") as page:
        if page.tell() == 0:
            page.write("<!doctype html><style>figure { float: left } img { display: block }</style>"
                       "<p>codec_0: real_0 through the codec. Dark is loud, the top 3000 Hz.</p>\n")
        for name, audio in sounds.items():
            path = folder / f"{name}.wav"
            while path.exists():
                path = path.with_stem(f"{path.stem}+")
            peak = save_audio(path, audio, rate)
            save_spectrogram(path.with_suffix(".bmp"), audio, rate)
            heard = note_pitch(pitch_track(audio[None], rate, rate // 60, low=20.0)).item()
            print(f"{path}: heard MIDI pitch {heard:.2f}, peak {peak:.2f}")
            page.write(f'<figure>{path.stem}<img src="{path.stem}.bmp">'
                       f'<audio controls src="{path.name}"></audio></figure>\n')
    print(f"listen at {folder / 'index.html'}")

# ---
# 11. The command line
#
# A run's checkpoints hold its settings, so `sample` and `evaluate` need only its folder.
#
# Try: `python minidiff.py sample --pitch 60 --count 4 --cfg 0`. w = 0 ignores the pitch.

BUILT_IN = {"plucks": Plucks, "melodies": Melodies}
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"minidiff: {message}\n")

def between(low, high, kind=float):
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return kind(text)
    return number

def build_parser(**saved):
    count = between(1, 10 ** 9, int)
    midi = between(0, 127, int)
    seconds = between(0.1, 600)
    def note(word):
        return None if word == "r" else midi(word)
    gpu = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    top = Parser()
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("toy", help="the idea: ten seconds")
    train = commands.add_parser("train", help="train a codec and a model")
    sample = commands.add_parser("sample", help="make sounds")
    measure = commands.add_parser("evaluate", help="measure a run")
    for command in (train, sample, measure):
        add = command.add_argument
        add("--run", help="folder (default runs/plucks; train: runs/DATA)")
        add("--device", choices={"cpu", gpu}, default=gpu)
        add("--seed", type=int, default=0)
        if command != train:
            command.set_defaults(run="runs/plucks")
            add("--sampler", choices=["euler", "heun", "dpmpp_3m_sde"], default="heun")
            add("--steps", type=count, default=9, help="(default 9)")
    add = train.add_argument
    add("--data", default="plucks", help="plucks, melodies, nsynth or a folder")
    add("--seconds", type=seconds, help="of a sound (default: up to 4)")
    add("--codec", choices=["vae", "music2latent"], help="(default: vae for built-in data)")
    add("--net", choices=["unet", "tutorial"], default="unet", help="(default unet)")
    add("--objective", choices=OBJECTIVES, default="rf", help="(default rf)")
    add("--condition", choices=["note", "control", "none"], help="(default: by the data)")
    add("--codec-steps", type=count, default=900, help="(default 900)")
    add("--steps", type=count, default=1100, help="of the model (default 1100)")
    add("--lr", type=between(0, 1), default=0.0015, help="(default 0.0015)")
    add("--adversarial-from", type=count, help="step where the judge joins")
    add("--resume", action="store_true", help="go on with a run")
    train.set_defaults(**saved | {"device": gpu})  # --resume: as saved
    add = sample.add_argument
    add("--pitch", type=midi, nargs="+", action="extend", help="MIDI pitches")
    add("--melody", type=note, nargs="+", help="pitches, r for a rest")
    add("--beat", type=seconds, default=0.5, help="seconds a note (default 0.5)")
    add("--count", type=count, default=1, help="for each pitch")
    add("--seconds", type=seconds, help="(default: as in training)")
    add("--cfg", type=float, default=1.25, help="guidance scale (default 1.25)")
    add("--init-audio")
    add("--init-noise", type=float, help="its t, 0 keeps all (default: sigma = alpha)")
    add("--out", type=Path, help="(default: in the run)")
    measure.add_argument("--cfg", type=float, nargs="+", default=[1.0, 1.25, 2.0])
    return top

def prepare(args, folder):
    """Make codec.pt and latents.pt."""
    given = {"seconds": args.seconds} if args.seconds else {}
    if args.codec == "music2latent":
        given["sample_rate"] = Music2Latent.sample_rate
    if args.data in BUILT_IN:
        data = BUILT_IN[args.data](seed=args.seed, **given)
    else:
        data = AudioFolder(download_nsynth() if args.data == "nsynth" else args.data, **given)
    best = "note" if data.sources else "control" if args.data == "melodies" else "none"
    args.condition = "none" if args.net == "tutorial" else args.condition or best
    if args.condition == "note" and not data.sources:
        raise ValueError("--condition note needs names such as guitar_004-071-025.wav")
    if args.codec == "music2latent":
        codec = Music2Latent(args.seed, args.device)
    else:
        audio = torch.stack([data[i] for i in (~data.valid).nonzero()[:, 0]])
        codec = train_codec(SnakeVAE(data.sample_rate).to(args.device), audio, args.codec_steps,
                            folder / "codec.pt", args.seed, lr=args.lr, settings=vars(args),
                            adversarial_from=args.adversarial_from or math.inf)
    encode_all(codec, data, folder / "latents.pt", args.condition, args.device)

def train_run(args, argv):
    folder = Path(args.run or f"runs/{Path(args.data).resolve().name}")
    made = [*folder.glob("model.pt"), *folder.glob("codec.pt"), *folder.glob("latents.pt")]
    if made and not args.resume:
        raise ValueError(f"{folder} holds a run: add --resume, or another --run")
    saved = load_checkpoint(made[0]).get("settings", {}) if made else {}
    args = build_parser(**saved).parse_args(argv)
    args.codec = args.codec or ("vae" if args.data in BUILT_IN else "music2latent")
    for name in ("codec", "seconds", "seed", "net", "objective", "condition"):
        if name in saved and getattr(args, name) != saved[name]:
            raise ValueError(f"{folder} has --{name} {saved[name]}; use another --run")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    latents = folder / "latents.pt"
    if RANK == 0 and not latents.exists():
        prepare(args, folder)
    while not latents.exists():
        time.sleep(1)
    if WORLD > 1:
        torch.distributed.init_process_group()
        args.device += f":{os.environ['LOCAL_RANK']}"
    data = load_checkpoint(latents)
    settings = vars(args) | data["facts"]
    torch.manual_seed(args.seed)
    net = build_net(settings).to(args.device)
    batch_size = max(WORLD, 4000 // settings["frames"])
    train_diffusion(net, OBJECTIVES[args.objective], data["x"], data["cond"], data["valid"],
                    args.steps, folder / "model.pt", args.seed, batch_size, args.lr, settings)
    if RANK == 0:
        result, sounds = evaluate(Run(folder, args.device), seed=args.seed)
        write_sounds(folder / "samples", sounds, settings["sample_rate"])
        in_tune = result["pitch_accuracy_codec"]
        louder = result["level_db"]["codec"] - result["level_db"]["real"]
        weak = abs(louder) > 6 or (in_tune is not None and in_tune < 0.9)
        print("verdict: the codec is", "the weak part: train another --run with more --codec-steps"
              if weak else "good: if notes are not, --resume with more --steps")

@torch.no_grad()
def sample_run(args):
    run = Run(args.run, args.device)
    settings = run.settings
    condition = settings["condition"]
    learnt = settings["frames"]
    rate = run.codec.sample_rate / run.codec.hop  # frames a second
    if args.init_noise is not None and not args.init_audio:
        raise ValueError("--init-noise needs --init-audio")
    if args.init_audio and args.melody:
        raise ValueError("--init-audio goes without --melody")
    if (args.pitch and condition != "note") or (args.melody and condition != "control"):
        raise ValueError(f"--pitch needs --condition note, --melody control; this is {condition}")
    pitches = [pitch for pitch in args.pitch or [-1] for _ in range(args.count)]
    frames = math.ceil(args.seconds * rate) if args.seconds else learnt
    B = len(pitches)
    labels = torch.tensor([[pitch, -1, -1] for pitch in pitches])
    given = {"labels": labels} if condition == "note" else {}
    if args.melody:
        played = load_checkpoint(run.folder / "latents.pt")["cond"]["controls"]
        curves = melody_curves(args.melody, args.beat * rate, played)
        given["controls"] = curves.expand(B, -1, -1)
        frames = curves.shape[1]
    if args.init_audio:
        audio = load_audio(args.init_audio, run.codec.sample_rate)[None].to(args.device)
        latents = (run.codec.encode(audio).cpu() - settings["mean"]) / settings["std"]
        given["init"] = latents.expand(B, -1, -1).to(args.device)
        frames = latents.shape[2]
    strange = set(pitches) - {-1, *settings["pitches"]}
    if strange:
        print(f"note: the training had no pitch {sorted(strange)}")
    if frames > learnt and condition != "control":
        print(f"note: the model has learnt sounds of {learnt / rate:.1f} s")
    x = generate(GuidedNet(run.net, args.cfg), run.objective, (B, settings["channels"], frames),
                 args.sampler, args.steps, args.seed, init_noise=args.init_noise,
                 device=args.device, **given)
    names = [f"sample_{args.seed + i}_pitch_{pitch}".removesuffix("_pitch_-1")
             for i, pitch in enumerate(pitches)]
    sounds = dict(zip(names, run.decode(x)))
    write_sounds(args.out or run.folder / "samples", sounds, settings["sample_rate"])

def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "toy":
            toy()
        elif args.command == "train":
            train_run(args, argv)
        elif args.command == "sample":
            sample_run(args)
        else:
            evaluate(Run(args.run, args.device), args.cfg, args.sampler, args.steps, args.seed)
    except KeyboardInterrupt:
        parser.exit(130, "\nminidiff: interrupted; train goes on with --resume\n")
    except (ValueError, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
