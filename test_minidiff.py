"""The proof of minidiff.py, in the order of its chapters: each test states a number and where it comes from.

Most of the mathematics is tested on Gaussian data x_0 ~ N(mu, s^2), where everything is known: the best
denoiser is D = (alpha s^2 x_t + sigma^2 mu) / (alpha^2 s^2 + sigma^2), and the flow's exact path is
x(t) = alpha mu + sqrt(alpha^2 s^2 + sigma^2) z with one z for all t.
"""
import ast
import base64
import contextlib
import copy
import csv
import functools
import http.server
import importlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
import torch

import minidiff as m

HERE = pathlib.Path(m.__file__).parent
SOURCE = (HERE / "minidiff.py").read_text()
TREE = ast.parse(SOURCE)
DEFINITIONS = {n.name: n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
PROCESSES = [m.RectifiedFlow(), m.VPDiffusion(), m.EDM()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_denoiser(process, mu=0.0, s=1.0):
    def denoise(x, t):
        t = m.expand(t, x)
        a, b = process.alpha(t), process.sigma(t)
        return (a * s ** 2 * x + b ** 2 * mu) / (a ** 2 * s ** 2 + b ** 2)
    return denoise


def gaussian_net(process, mu=0.0, s=1.0):
    """The network that answers like the ideal denoiser, solved for its output by hand for each process."""
    def net(x, t, **_):
        if isinstance(process, m.EDM):
            t = (4 * t).exp()                                       # it is shown ln(sigma)/4 and c_in x
            x = x * (m.expand(t, x) ** 2 + 1).sqrt()
        D = gaussian_denoiser(process, mu, s)(x, t)
        t = m.expand(t, x)
        a, b = process.alpha(t), process.sigma(t)
        if isinstance(process, m.EDM):
            return (D - x / (t ** 2 + 1)) * (t ** 2 + 1).sqrt() / t
        noise = (x - a * D) / b
        return D - noise if isinstance(process, m.RectifiedFlow) else a * noise - b * D
    return net


def exact_path(process, z, t, mu=0.0, s=1.0):
    t = torch.tensor(float(t), dtype=z.dtype)
    return process.alpha(t) * mu + (process.alpha(t) ** 2 * s ** 2 + process.sigma(t) ** 2).sqrt() * z


# ---- 1. Noising and objectives ----

@each_process
def test_denoise_recovers_x_0_from_the_true_answer(process):
    """A network that answers the training target exactly must give x_0 back, at every t."""
    x, noise = torch.randn(2, 5, 3, 7, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    x_t = process.add_noise(x, noise, t)
    answer = lambda *_: process.target(x, noise, m.expand(t, x))
    assert torch.allclose(process.denoise(answer, x_t, t), x, atol=1e-9)
    assert torch.allclose(process.add_noise(x, noise, 0.5), process.add_noise(x, noise, torch.full((5,), 0.5)))


@each_process
def test_velocity_is_the_derivative_of_the_exact_path(process):
    """d/dt (alpha mu + sqrt(alpha^2 s^2 + sigma^2) z) by central differences, mu = 1.5, s = 0.7."""
    z, h = torch.randn(4, 1, 3, generator=seeded(), dtype=torch.float64), 1e-6
    for t in (0.1, 0.4, 0.8):
        x = exact_path(process, z, t, 1.5, 0.7)
        slope = (exact_path(process, z, t + h, 1.5, 0.7) - exact_path(process, z, t - h, 1.5, 0.7)) / (2 * h)
        times = torch.full((4,), t, dtype=torch.float64)
        assert torch.allclose(process.velocity(gaussian_net(process, 1.5, 0.7), x, times), slope, atol=1e-6)
        D = gaussian_denoiser(process, 1.5, 0.7)(x, times)
        assert torch.allclose(process.velocity_to(D, x, times), slope, atol=1e-6)


@each_process
def test_loss_of_zero_and_ideal_network(process):
    """Zero network: 2 (rectified flow: 1 + 1), 1, 1. Ideal on N(0, 1): 1.741264 (FACTS), 1, 1."""
    x = torch.randn(40_000, 1, 4, generator=seeded())
    zero = process.loss(lambda x, t: 0 * x, x, seeded(1)).item()
    ideal = process.loss(gaussian_net(process), x, seeded(1)).item()
    flow = isinstance(process, m.RectifiedFlow)
    assert zero == pytest.approx(2 if flow else 1, abs=0.02)
    assert ideal == pytest.approx(1.741264 if flow else 1, abs=0.02)
    per_item = process.loss(lambda x, t: 0 * x, x, seeded(1), reduce=False)
    assert per_item.shape == (40_000,) and per_item.mean().item() == pytest.approx(zero, rel=1e-5)
    t, noise = process.sample_times(40_000, seeded(2)), torch.randn(x.shape, generator=seeded(3))
    assert m.reference_losses(process, x, noise, t) == pytest.approx((zero, ideal), abs=0.03)


def test_edm_preconditioning():
    """FACTS, sigma_data = 0.5: c_skip, c_out, c_in, c_noise; the weight 1/c_out^2 is 8, 5, 4.00015625."""
    edm = m.EDM(sigma_data=0.5)
    expected = {0.5: (0.5, 0.35355339, 1.41421356, -0.17328680), 1.0: (0.2, 0.44721360, 0.89442719, 0),
                80.0: (3.90610e-5, 0.49999023, 0.01249976, 1.09550666),
                0.002: (0.99998400, 0.00199998, 1.99998400, -1.55365202)}
    for sigma, row in expected.items():
        got = [c.item() for c in edm.preconditioning(torch.tensor(sigma, dtype=torch.float64))]
        assert got == pytest.approx(row, rel=3e-6, abs=1e-9)
    weights = [edm.preconditioning(torch.tensor(s))[1].item() ** -2 for s in (0.5, 1.0, 80.0)]
    assert weights == pytest.approx([8, 5, 4.00015625], rel=1e-5)
    x, noise, t = *torch.randn(2, 3, 1, 4, generator=seeded()), torch.tensor([0.1, 1.0, 9.0])
    answer = lambda *_: edm.target(x, noise, m.expand(t, x))        # sigma_data belongs into the target too
    assert torch.allclose(edm.denoise(answer, edm.add_noise(x, noise, t), t), x, atol=1e-4)


def test_training_times():
    """EDM quantiles 5/25/50/75/95 % of FACTS; logit-normal: std 0.20828, P(0.3 < t < 0.7) = 0.60317."""
    sigma = m.EDM().sample_times(400_000, seeded())
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert sigma.quantile(levels).tolist() == pytest.approx([0.04184, 0.13407, 0.30119, 0.67664, 2.16804], rel=0.02)
    t = m.RectifiedFlow().sample_times(400_000, seeded())
    assert t.std().item() == pytest.approx(0.20828, abs=1e-3)
    assert ((t > 0.3) & (t < 0.7)).float().mean().item() == pytest.approx(0.60317, abs=3e-3)
    u = m.VPDiffusion().sample_times(400_000, seeded())
    assert u.quantile(levels).tolist() == pytest.approx(levels.tolist(), abs=5e-3)


def test_time_grids():
    """EDM's 18 sigmas and Stable Audio's 8, as published (FACTS); every grid ends with 0."""
    edm = [80, 57.585985, 40.785574, 28.374585, 19.352453, 12.910082, 8.400935, 5.315195, 3.256822, 1.923340,
           1.088171, 0.585348, 0.296442, 0.139516, 0.059947, 0.022935, 0.007528, 0.002, 0]
    assert m.EDM().times(18).tolist() == pytest.approx(edm, rel=1e-4)
    stable = [500, 173.263, 60.0402, 20.8055, 7.2096, 2.4983, 0.8657, 0.3, 0]
    assert m.polyexponential_times(8, 0.3, 500).tolist() == pytest.approx(stable, rel=1e-4)
    assert m.linear_times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert m.karras_times(3, 1.0, 9.0, rho=1.0).tolist() == pytest.approx([9, 5, 1, 0])
    assert (m.karras_times(1, 0.1, 7.0).tolist() == pytest.approx([7, 0])
            and m.karras_times(3, 1, 2).dtype == torch.float64)
    assert m.polyexponential_times(3, 1, 16, rho=2).tolist() == pytest.approx([16, 2, 1, 0])    # 16^(1, 1/4, 0)
    assert m.EDM().times(2, 0.001).tolist() == pytest.approx([0.001, 0.001, 0])     # a start below sigma_min
    for bad in (lambda: m.linear_times(0), lambda: m.karras_times(4, 0, 1), lambda: m.polyexponential_times(4, 2, 1),
                lambda: m.karras_times(4, 1, 2, rho=0)):
        with pytest.raises(ValueError):
            bad()


@each_process
def test_schedule(process):
    """Each process walks the same sigma/alpha, in its own t: the published levels; VP's t = 0 at tan(pi/2 s/(1+s))."""
    ratio = lambda t: process.sigma(t) / process.alpha(t)
    least = ratio(torch.zeros(1, dtype=torch.float64)).item()
    assert least == pytest.approx(math.tan(math.pi / 2 * 0.008 / 1.008) if isinstance(process, m.VPDiffusion) else 0)
    for times, levels in ((m.schedule(process, "karras", 18), m.EDM().times(18)),
                          (m.schedule(process, "polyexponential", 8, sigma_min=0.3, sigma_max=50.0),
                           m.polyexponential_times(8, 0.3, 50)),
                          (m.schedule(process, "karras", 4, None, 0.1, 10.0, 3.0), m.karras_times(4, 0.1, 10, 3.0))):
        assert (times[-1] == 0
                and ratio(times[:-1]).tolist() == pytest.approx(levels[:-1].clamp_min(least).tolist(), rel=1e-6))
    assert m.schedule(process, "linear", 2).tolist() == [process.t_max, process.t_max / 2, 0]
    for grid in ("linear", "karras", "polyexponential"):
        assert m.schedule(process, grid, 5, 0.5)[0].item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="cosine"):
        m.schedule(process, "cosine", 4)


def test_vp_schedule_is_the_lectures():
    """seeds/003: sigma(t) = sin(pi/2 (t + s)/(1 + s)), alpha = sqrt(1 - sigma^2); alpha(1) is exactly 0."""
    t, vp = torch.linspace(0, 1, 11, dtype=torch.float64), m.VPDiffusion(s=0.008)
    sigma = torch.sin((t + 0.008) / 1.008 * math.pi / 2)
    assert torch.allclose(vp.sigma(t), sigma) and torch.allclose(vp.alpha(t), (1 - sigma ** 2).clamp(0).sqrt())
    assert vp.alpha(torch.ones(1)).item() == 0


def test_one_denoiser_serves_all():
    """Divide x_t by alpha and it is EDM's at sigma / alpha: three processes, one sample from one noise."""
    noise, edm, flow = torch.randn(6, 1, 2, generator=seeded(), dtype=torch.float64), PROCESSES[2], PROCESSES[0]
    D = gaussian_denoiser(edm, 1.0, 0.5)
    times = m.karras_times(400, 0.002, 80)
    x_edm = m.heun(lambda x, t: edm.velocity_to(D(x, t), x, t), noise * 80, times)
    t_flow = times / (1 + times)                                    # FACTS: sigma = t / (1 - t)
    as_flow = lambda x, t: D(x / m.expand(1 - t, x), t / (1 - t))
    x_flow = m.heun(lambda x, t: flow.velocity_to(as_flow(x, t), x, t), noise * 80 / 81, t_flow)
    assert torch.allclose(x_edm, x_flow, atol=1e-4)
    vp = m.VPDiffusion(s=0.0)
    as_vp = lambda x, t: D(x / m.expand(vp.alpha(t), x), vp.sigma(t) / vp.alpha(t))
    x_vp = m.heun(lambda x, t: vp.velocity_to(as_vp(x, t), x, t), noise * 80 / math.hypot(80, 1),
                  torch.atan(times) * 2 / math.pi)
    assert torch.allclose(x_edm, x_vp, atol=1e-4)


# ---- 2. Guidance ----

def test_guide():
    """u + w (c - u) with c = 3, u = 1: w = 0, 1, 2.5 give 1, 3, 6; rescale 1 gives c's deviation back."""
    c, u = torch.full((1, 2), 3.0), torch.full((1, 2), 1.0)
    assert [m.guide(c, u, w)[0, 0].item() for w in (0, 1, 2.5)] == [1, 3, 6]
    c, u = torch.randn(2, 3, 4, 50, generator=seeded())
    assert torch.allclose(m.guide(c, u, 5.0, rescale=1.0).std((1, 2)), c.std((1, 2)), rtol=1e-5)
    half = (m.guide(c, u, 5.0) + m.guide(c, u, 5.0, rescale=1.0)) / 2
    assert torch.allclose(m.guide(c, u, 5.0, rescale=0.5), half, atol=1e-5)
    assert m.guide(torch.ones(1, 4), torch.ones(1, 4), 2.0, 1.0).isfinite().all()


def test_guided_net():
    """c = x + label, u = x - 1: 2 passes' worth of rows for w = 3, one for w = 1 and w = 0."""
    rows = []

    def net(x, t, labels=None, controls=None):
        rows.append(len(x))
        return x + (0 if labels is None else labels[:, :1, None].float())
    x, t, labels = torch.zeros(2, 1, 3), torch.full((2,), 0.5), torch.tensor([[5], [7]])
    run = lambda *a, **k: m.GuidedNet(net, *a, **k)(x, t, labels=labels)[:, 0, 0].tolist()
    assert run(3.0) == [-1 + 3 * 6, -1 + 3 * 8] and run(1.0) == [5, 7] and run(0.0) == [-1, -1]
    assert rows == [4, 2, 2]
    assert run(3.0, interval=(0.6, 1.0)) == [5, 7] and run(3.0, interval=(0.4, 0.6)) == [17, 23]
    mixed = lambda w: m.GuidedNet(net, w, interval=(0.4, 0.6))(x, torch.tensor([0.5, 0.9]),
                                                               labels=labels)[:, 0, 0].tolist()
    assert mixed(3.0) == [17, 7] and mixed(0.0) == [-1, 7]          # one item inside, one outside, where w is 1
    double = m.GuidedNet(lambda x, t, labels: x * (labels[:, :, None] + 2.0), 3.0, rescale=1.0)     # c = 2 x, u = x
    wave = torch.randn(2, 1, 50, generator=seeded())
    assert torch.allclose(double(wave, t, labels=0 * labels), 2 * wave, atol=1e-5)    # 4 x at c's deviation
    assert run(2.0, negative={"labels": torch.tensor([[4], [4]])}) == [6, 10]
    assert torch.equal(m.GuidedNet(net, 3.0)(x, t), x)              # no condition: the plain network
    curves = m.GuidedNet(lambda x, t, controls: torch.nan_to_num(controls, nan=-2.0), 2.0)
    assert curves(x, t, controls=torch.ones(2, 1, 3)).unique().tolist() == [4]      # -2 + 2 (1 + 2)


@each_process
def test_guiding_velocity_is_guiding_the_answer(process):
    """All dresses are affine in the answer with equal coefficients, so guidance commutes with them."""
    nets = gaussian_net(process, 2.0, 0.5), gaussian_net(process, 0.0, 1.0)
    both = lambda x, t, labels: torch.where(labels[:, :, None] >= 0, nets[0](x, t), nets[1](x, t))
    x, t = torch.randn(3, 1, 5, generator=seeded()), torch.tensor([0.2, 0.5, 0.8])
    labels = torch.zeros(3, 1, dtype=torch.long)
    inside = process.velocity(m.GuidedNet(both, 3.0), x, t, labels=labels)
    outside = m.guide(process.velocity(nets[0], x, t), process.velocity(nets[1], x, t), 3.0)
    assert torch.allclose(inside, outside, atol=1e-4)


def test_classifier_guidance_finds_the_posterior():
    """x_0 ~ N(0, 1), y = x_0 + N(0, 0.5^2) = 1: the posterior is N(0.8, 0.2)."""
    edm = m.EDM()

    def log_likelihood(x_0, t):
        spread = 0.25 + m.expand(t, x_0) ** 2 / (1 + m.expand(t, x_0) ** 2)   # tau^2 + var(x_0 | x_t)
        return (-(1.0 - x_0) ** 2 / (2 * spread)).sum((1, 2))
    guided = m.classifier_guidance(edm, gaussian_denoiser(edm), log_likelihood)
    x = edm.start(torch.randn(20_000, 1, 1, generator=seeded()))
    x = m.heun(lambda x, t: edm.velocity_to(guided(x, t), x, t), x, edm.times(30))
    assert x.mean().item() == pytest.approx(0.8, abs=0.02) and x.var().item() == pytest.approx(0.2, abs=0.01)
    flow = m.RectifiedFlow()                                        # at t = 1 alpha is 0: D stays, not 0/0
    guided = m.classifier_guidance(flow, gaussian_denoiser(flow), log_likelihood)
    assert torch.equal(guided(torch.ones(2, 1, 3), torch.ones(2)), torch.zeros(2, 1, 3))


# ---- 3. Samplers ----

def order(sampler, steps, process=m.RectifiedFlow(), mu=1.0, s=0.5):
    """Error of a sampler at `steps` and at twice as many, against the exact map on Gaussian data."""
    z, errors = torch.randn(8, 1, 4, generator=seeded(), dtype=torch.float64), []
    for n in (steps, 2 * steps):
        out = sampler(lambda x, t: process.velocity(gaussian_net(process, mu, s), x, t), z, process.times(n))
        errors.append((out - exact_path(process, z, 0, mu, s)).abs().max().item())
    return errors


def test_euler_has_order_one():
    """Doubling the steps halves the error."""
    coarse, fine = order(m.euler, 64)
    assert coarse / fine == pytest.approx(2, rel=0.1)


def test_heun_has_order_two():
    """Doubling the steps quarters the error."""
    coarse, fine = order(m.heun, 64)
    assert coarse / fine == pytest.approx(4, rel=0.15)


def test_dpmpp_3m_has_order_three():
    """Even log-SNR steps from sigma 20 to 1: twice the steps, an eighth of the error (-phi_3 d2 gives a quarter)."""
    z, errors = torch.randn(8, 1, 4, generator=seeded(), dtype=torch.float64), []
    for n in (32, 64):
        times = torch.logspace(math.log10(20), 0, n + 1, dtype=torch.float64)
        out = m.dpmpp_3m_sde(gaussian_denoiser(PROCESSES[2], s=0.5), z * math.sqrt(400.25), times, eta=0.0)
        errors.append((out - z * math.sqrt(1.25)).abs().max().item() / z.abs().max().item())
    assert errors[0] < 1e-5 and errors[0] / errors[1] > 6
    run = lambda *times: m.dpmpp_3m_sde(gaussian_denoiser(PROCESSES[2], s=0.5), z, torch.tensor(times), eta=0.0)
    assert torch.equal(run(4.0, 2.0, 2.0, 1.0), run(4.0, 2.0, 1.0))    # the same time twice is no step


@each_process
def test_dpmpp_3m_sde_distribution(process):
    """eta = 1 ends at the data: mean 1, deviation 0.5 within 2 %; eta = 0 is the exact map; seeds repeat."""
    noise = torch.randn(20_000, 1, 1, generator=seeded())
    run = lambda eta, n=200: m.dpmpp_3m_sde(gaussian_denoiser(process, 1.0, 0.5), process.start(noise),
                                           process.times(n), eta, process.alpha, process.sigma, seeded(5))
    x = run(1.0)
    assert x.mean().item() == pytest.approx(1, abs=0.02) and x.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(x, run(1.0)) and not torch.equal(run(0.0), x)
    exact = exact_path(process, process.start(noise) / (80.0 if process.t_max > 1 else 1), 0, 1.0, 0.5)
    assert (run(0.0) - exact).abs().max().item() < 0.05
    times = m.schedule(process, "polyexponential", 16)              # even in log-SNR: 16 steps are enough
    x = m.dpmpp_3m_sde(gaussian_denoiser(process), process.sigma(times[:1].float()) * noise, times, 1.0, process.alpha,
                       process.sigma, seeded(5))
    assert x.std().item() == pytest.approx(1, abs=0.1)


@each_process
def test_samplers_count_and_leave_their_input(process):
    """NFE: n for Euler and DPM++, 2 n - 1 for Heun; t arrives as [B] in x's dtype; callbacks before each step."""
    for sampler, evaluations in ((m.euler, 6), (m.heun, 11), (m.dpmpp_3m_sde, 6)):
        calls, steps, x = [], [], torch.ones(2, 3)

        def look(x, t):
            calls.append((t.shape, t.dtype))
            return 0.1 * x
        extra = dict(alpha=process.alpha, sigma=process.sigma) if sampler is m.dpmpp_3m_sde else {}
        out = sampler(look, x, process.times(6), callback=lambda i, t, x: steps.append(i), **extra)
        assert calls == [(torch.Size([2]), torch.float32)] * evaluations and steps == list(range(6))
        assert torch.equal(x, torch.ones(2, 3)) and out.dtype == torch.float32 and out.isfinite().all()


def test_sampling_a_mixture():
    """0.3 N(-2, 0.3^2) + 0.7 N(2, 0.3^2): the weights, means and deviations come out."""
    edm = m.EDM()

    def denoise(x, t):
        s2 = m.expand(t, x) ** 2
        logits = torch.stack([math.log(p) - (x - c) ** 2 / (2 * (0.09 + s2)) for p, c in ((0.3, -2), (0.7, 2))])
        means = torch.stack([(0.09 * x + s2 * c) / (0.09 + s2) for c in (-2, 2)])
        return (logits.softmax(0) * means).sum(0)
    x = edm.start(torch.randn(20_000, 1, 1, generator=seeded()))
    x = m.heun(lambda x, t: edm.velocity_to(denoise(x, t), x, t), x, edm.times(40))
    assert (x < 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert (x[x > 0].mean().item() == pytest.approx(2, abs=0.02)
            and x[x > 0].std().item() == pytest.approx(0.3, abs=0.02))


def test_optimise_noise():
    """Through a sampler that maps z to 1 + z/2, the noise for the target 3 is 4; the loss falls fivefold."""
    flow, target = m.RectifiedFlow(), torch.full((1, 1, 3), 3.0)
    net = gaussian_net(flow, 1.0, 0.5)
    sample = lambda noise: m.generate(net, flow, noise.shape, "heun", 8, noise=noise)
    loss = lambda x: (x - target).square().mean()
    start = torch.zeros(1, 1, 3)
    found = m.optimise_noise(sample, start, loss, steps=150, lr=0.1)
    assert loss(sample(found)).item() < loss(sample(start)).item() / 5
    assert torch.allclose(found, torch.full_like(found, 4.0), atol=0.3) and torch.equal(start, torch.zeros(1, 1, 3))
    weight = torch.ones(1, requires_grad=True)                      # Adam's steps of 1 overshoot 0.1: 0 stays the best
    best = m.optimise_noise(lambda z: weight * z, start, lambda x: (x - 0.1).square().mean(), steps=3, lr=1.0)
    assert torch.equal(best, start) and weight.grad is None         # and the model gets no gradient


def test_standard_normal_and_global_state():
    """Item i is the same in any batch; nothing moves the global generator when one is given."""
    before = torch.get_rng_state()
    two = m.standard_normal((2, 3), [seeded(7), seeded(8)])
    assert torch.equal(two[1:], m.standard_normal((1, 3), [seeded(8)]))
    assert torch.equal(m.standard_normal((4,), seeded(1)), torch.randn(4, generator=seeded(1)))
    m.EDM().loss(lambda x, t: x, torch.ones(3, 1, 2), seeded())
    m.generate(lambda x, t: x, m.RectifiedFlow(), (2, 1, 3), "dpmpp_3m_sde", 4)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="expected one per item: 3"):
        m.standard_normal((3, 1), [seeded()])


# ---- 4. The U-Net ----

def small_unet(**options):
    torch.manual_seed(0)
    return m.UNet1d(4, width=8, label_sizes=(10, 3), controls=2, heads=2, **options)


def test_unet_takes_every_length():
    """L = 1 to 70 and the 42 latents of an NSynth note come back as long as they went in."""
    net, tutorial = small_unet(), m.TutorialUNet(4, width=4)
    for L in range(1, 71):
        x = torch.randn(2, 4, L)
        assert net(x, torch.rand(2)).shape == tutorial(x, torch.rand(2)).shape == x.shape
    x, t = torch.randn(2, 4, 41, generator=seeded()), torch.rand(2)
    for net, length in ((net, 44), (tutorial, 44)):                 # zeros at the end, cropped off at the end
        assert torch.allclose(net(x, t), net(torch.nn.functional.pad(x, (0, length - 41)), t)[..., :41], atol=1e-6)


def test_unet_conditions():
    """None is all "not given"; -1 differs from label 0; NaN differs from 0; t = 0.1 from t = 0.2."""
    net, x, t = small_unet(), torch.randn(2, 4, 42, generator=seeded()), torch.tensor([0.1, 0.1])
    none, zero = torch.full((2, 2), -1), torch.zeros(2, 2, dtype=torch.long)
    plain = net(x, t)
    assert torch.equal(plain, net(x, t, labels=none, controls=torch.full((2, 2, 42), math.nan)))
    for other in (net(x, t, labels=zero), net(x, t, controls=torch.zeros(2, 2, 42)), net(x, t + 0.1)):
        assert (other - plain).abs().max() > 1e-3
    gap = (m.time_embedding(torch.tensor([0.1, 0.2]), 64)[0] - m.time_embedding(torch.tensor([0.2]), 64)[0]).norm()
    assert gap > 1                                                  # unscaled t would give 0.1
    seen, curves = [], torch.tensor([0.125, math.nan])[None, :, None].expand(2, 2, 42)
    net.enter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    # value, given?, sin and cos of 45, 90, 180, 360 degrees
    net(x, t, controls=curves)
    assert seen[0][0, 0, 4::2].tolist() == pytest.approx([0.125, 1, 0.5 ** 0.5, 0.5 ** 0.5, 1, 0, 0, -1, 0, 1],
                                                         abs=1e-6)
    assert seen[0][0, 0, 5::2].abs().max() == 0                     # not given: zeros


def test_positions():
    """Each frame is told sin and cos of its number, the last of the window's for all that come later;
    a run's window is what it trains on, or 1 if curves tell."""
    net, seen = small_unet(window=5), []
    net.position.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = net(torch.ones(1, 4, 8), torch.ones(1))
    number = torch.tensor([0, 1, 2, 3, 4, 4, 4, 4.0])
    waves = [f(number * 10_000 ** (-k / 4)) for f in (torch.sin, torch.cos) for k in range(4)]
    assert torch.allclose(seen[0], torch.stack(waves, dim=1), atol=1e-5)
    torch.nn.init.zeros_(net.position.weight)
    assert (net(torch.ones(1, 4, 8), torch.ones(1)) - plain).abs().max() > 1e-3      # and it listens
    settings = {"net": "unet", "channels": 4, "sources": ["a"], "frames": 63, "without": []}
    assert [m.build_net(settings | {"condition": c}).window for c in ("note", "none", "control")] == [63, 63, 1]


def test_frame_conv():
    """It is nn.Conv1d with the axes in another order, at the U-Net's two kernels."""
    for kernel, stride in ((3, 1), (4, 2)):
        ours, theirs = m.FrameConv(6, 5, kernel, stride), torch.nn.Conv1d(6, 5, kernel, stride, padding=1)
        theirs.weight.data, theirs.bias.data = ours.weight.data[:, :, 0], ours.bias.data
        x = torch.randn(2, 6, 9, generator=seeded())
        assert torch.allclose(ours(x.transpose(1, 2)).transpose(1, 2), theirs(x), atol=1e-6)


def test_blocks_by_hand():
    """Modulation by scale -1 and shift 2 leaves conv2(silu(2)) beside x; a block's two convolutions and its norms
    reach two frames to either side; attention is softmax(q k / sqrt(4)) v beside x."""
    block, attention, x = (m.ResidualBlock(8, 8, 3), m.SelfAttention(8, heads=2),
                           torch.randn(2, 5, 8, generator=seeded()))
    far, e = x.clone(), torch.ones(2, 3)
    far[:, 3, 0] += 1                                               # of one feature: a norm takes a shift of all away
    assert (block(far, e) - block(x, e)).abs().amax((0, 2)).gt(1e-6).tolist() == [False, True, True, True, True]
    torch.nn.init.zeros_(block.modulate.weight)
    block.modulate.bias.data = torch.tensor([-1.0, 2.0]).repeat_interleave(8)
    assert torch.allclose(block(x, e), x + block.conv2(torch.nn.functional.silu(torch.full_like(x, 2))), atol=1e-6)
    q, k, v = attention.qkv(attention.norm(x)).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)  # [B, heads, L, D/heads]
    h = (q @ k.transpose(2, 3) / 2).softmax(3) @ v
    assert torch.allclose(attention(x), x + attention.out(h.transpose(1, 2).reshape(2, 5, 8)), atol=1e-6)


def test_attention_in_spans():
    """Spans of 4: 12 frames all see each other; of 21, frame i sees j if i // 4 and j // 4 differ by at most 1."""
    attention = m.SelfAttention(8, heads=2, span=4)
    for L in (12, 21):
        x, span = torch.randn(2, L, 8, generator=seeded()), torch.arange(L) // 4
        q, k, v = attention.qkv(attention.norm(x)).reshape(2, L, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / 2                          # the root of 4 features a head
        scores = scores.masked_fill(((span[:, None] - span).abs() > 1) & (L > 12), -math.inf)
        h = scores.softmax(3) @ v
        assert torch.allclose(attention(x), x + attention.out(h.transpose(1, 2).reshape(2, L, 8)), atol=1e-5)


def test_unet_keeps_items_apart_and_trains_everything():
    """Changing item 1 leaves item 0's bytes; every parameter gets a gradient that is not 0."""
    net, x = small_unet(), torch.randn(2, 4, 21, generator=seeded())
    labels, controls = torch.tensor([[1, 2], [3, 0]]), torch.randn(2, 2, 21, generator=seeded(1))
    out = net(x, torch.tensor([0.3, 0.6]), labels, controls)
    other = net(torch.stack([x[0], x[1] + 1]), torch.tensor([0.3, 0.9]), labels, controls)
    assert torch.equal(out[0], other[0]) and not torch.equal(out[1], other[1])
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_tutorial_unet():
    """FACTS: 35,207,296 parameters on Music2Latent's 64 channels; conditions are refused by name."""
    assert sum(p.numel() for p in m.TutorialUNet(64).parameters()) == 35_207_296
    with pytest.raises(ValueError, match="labels"):
        m.TutorialUNet(4, width=4)(torch.zeros(1, 4, 8), torch.zeros(1), labels=torch.zeros(1, 3))
    net, x = m.TutorialUNet(4, width=4), torch.zeros(1, 4, 8)
    assert not torch.equal(net(x, torch.zeros(1)), net(x, torch.ones(1)))           # it sees the time


# ---- 5. Sound ----

def test_resample_keeps_frequency_and_level():
    """A sine of 440 Hz at level 0.5 through 30 pairs of rates: the same sine, sample for sample."""
    rates = (8000, 11_025, 16_000, 22_050, 44_100, 48_000)
    for a, b in [(a, b) for a in rates for b in rates if a != b]:
        sine = lambda rate: 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(rate // 2) / rate)
        out = m.resample(sine(a), a, b)
        assert len(out) == math.ceil(a // 2 * b / a)
        middle = slice(b // 8, 3 * b // 8)
        assert (out[middle] - sine(b)[:len(out)][middle]).abs().max() < 5e-3


def test_pitch_track():
    """MIDI 36 to 88 within 20 cents, with the fundamental and without it; 0 on silence and on noise."""
    rate, when = 16_000, torch.arange(8000) / 16_000
    for missing in (False, True):
        for pitch in range(36, 89):
            f = 440 * 2 ** ((pitch - 69) / 12)
            tone = sum(torch.sin(2 * math.pi * k * f * when + k) / k for k in range(1 + missing, 9) if k * f < 7500)
            track = m.pitch_track(0.3 * tone[None], rate, 256)
            assert track.shape == (1, math.ceil(8000 / 256))
            if not missing or 4 * f < 7500:                          # two harmonics at least
                assert m.note_pitch(track).item() == pytest.approx(pitch, abs=0.2)
    assert m.pitch_track(torch.zeros(1, 8000), rate, 256).abs().max() == 0
    assert (m.pitch_track(0.3 * torch.randn(1, 8000, generator=seeded()), rate, 256) > 0).float().mean() < 0.05
    assert m.pitch_track(1e-5 * tone[None], rate, 256).abs().max() == 0    # -100 dB is silence
    f, sine = 440 * 2 ** ((48 - 69) / 12), lambda hz: torch.sin(2 * math.pi * hz * when)
    # half the period: r = (1 - 0.16)/1.16 = 0.72, and no more
    octave = 0.4 * sine(f) + sine(2 * f)
    assert m.note_pitch(m.pitch_track(octave[None], rate, 256)).item() == pytest.approx(48, abs=0.1)
    noise = 0.05 ** 0.5 * torch.randn(8000, generator=seeded())     # a share of about 5 %: the highest peak lacks that
    # half the period lacks 1 - 0.95 (1 - 0.029)/1.029 = 0.10
    rough = 2 * sine(2 * f) + 0.34 * sine(f)
    # 1 - 0.95 (1 - 0.09)/1.09 = 0.21, more than 0.02 + 2 * 0.05
    fifth = 2 * sine(2 * f) + 0.6 * sine(f)
    for sound, pitch in ((rough, 60), (fifth, 48)):
        heard = m.note_pitch(m.pitch_track((sound + sound.std() * noise)[None] / 4, rate, 256)).item()
        assert heard == pytest.approx(pitch, abs=0.2)
    low = m.note_pitch(m.pitch_track(sine(f / 2)[None], rate, 256)).item()
    # undivided, the window pulls a bare sine up by 29 cents
    assert low == pytest.approx(36, abs=0.1)
    # median, NaN
    assert m.note_pitch(torch.tensor([[0.0, 60, 60, 75, 0], [0] * 5])).nan_to_num(-1).tolist() == [60, -1]


def test_pluck_is_in_tune():
    """Within 5 cents for MIDI 40 to 76; harder is louder; a list of generators fixes each note."""
    pitch, velocity = torch.arange(40, 77), torch.full((37,), 100)
    notes = m.pluck(pitch, velocity, 1.0, 16_000, seeded())
    assert (m.note_pitch(m.pitch_track(notes, 16_000, 256)) - pitch).abs().max() < 0.05
    one = m.pluck(pitch[5:6], velocity[5:6], 1.0, 16_000, [seeded(9)])
    two = m.pluck(pitch[4:6], velocity[4:6], 1.0, 16_000, [seeded(1), seeded(9)])
    assert torch.equal(one[0], two[1]) and notes.abs().max() <= 1
    soft, hard = m.pluck(pitch[:2] * 0 + 60, torch.tensor([30, 120]), 1.0, 16_000, [seeded(), seeded()])
    assert hard.abs().max() > 2 * soft.abs().max()
    assert notes[:, 0].abs().max() == 0 and notes[:, -1].abs().max() < 0.01       # faded in and out: no click
    assert m.pluck(torch.tensor([127]), velocity[:1], 0.1, 16_000).abs().max() == 0     # 12.5 kHz would alias


def test_envelope():
    """The largest |x| in each window: [1, -3, 2, 0.5, 4] with hop 2 is [3, 2, 4]."""
    assert m.envelope(torch.tensor([[1, -3, 2, 0.5, 4]]), 2).tolist() == [[3, 2, 4]]


def test_audio_round_trips(tmp_path):
    """wav and flac to 16 bits exactly, mp3 to -20 dB; stereo is averaged; peaks above 1 are scaled, not cut."""
    tone = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(16_000) / 16_000)
    for ending, error in ((".wav", 1 / 32_000), (".flac", 1 / 32_000), (".mp3", 0.05), (".ogg", 0.05)):
        peak = m.save_audio(tmp_path / f"a{ending}", tone, 16_000)
        back = m.load_audio(tmp_path / f"a{ending}", 16_000)[:16_000]
        assert peak == pytest.approx(0.5, abs=1e-3) and (back - tone[:len(back)])[2000:14_000].abs().max() < error
    assert m.save_audio(tmp_path / "loud.wav", 3 * tone, 16_000) == pytest.approx(1.5, abs=1e-3)
    assert m.load_audio(tmp_path / "loud.wav", 16_000).abs().max() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(m.load_audio(tmp_path / "loud.wav", 16_000), 2 * tone, atol=1e-3)
    with pytest.raises(ValueError, match="finite"):
        m.save_audio(tmp_path / "nan.wav", tone / 0, 16_000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, 0 * tone], 1), 16_000, "FLOAT")
    assert torch.allclose(m.load_audio(tmp_path / "stereo.wav", 16_000), tone / 2)
    assert torch.allclose(m.load_audio(tmp_path / "stereo.wav", 16_000, 0.25, 0.5), tone[4000:12_000] / 2)


def midi_bytes(*tracks, ticks=100, form=1):
    chunk = lambda name, body: name + struct.pack(">I", len(body)) + body
    return chunk(b"MThd", struct.pack(">HHH", form, len(tracks), ticks)) + b"".join(chunk(b"MTrk", t) for t in tracks)


def test_midi_curves():
    """Four frames a second: the highest voice, an octave above C4; half the level per frame; a rest;
    the lower note again."""
    notes = [(0.0, 2.0, 60, 127), (0.5, 1.0, 72, 64)]
    envelope, octaves = m.midi_curves(notes, 10, 0.25, level=0.8, fade=0.5)
    low = [0.8 * 0.5 ** k for k in range(8)]
    assert envelope.tolist() == pytest.approx([*low[:2], 0.8 * 64 / 127, 0.4 * 64 / 127, *low[4:], 0, 0])
    assert octaves.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, -5, -5]


def test_read_midi(tmp_path):
    """100 ticks a beat; 0.5 s a beat, 0.25 s from tick 200 on; the second note by running status."""
    tempo = b"\x00\xff\x51\x03" + (500_000).to_bytes(3, "big") + b"\x81\x48\xff\x51\x03" + (250_000).to_bytes(3, "big")
    notes = b"\x00\x90\x3c\x64\x64\x3c\x00\x00\x40\x50\x81\x48\x80\x40\x00"
    (tmp_path / "a.mid").write_bytes(midi_bytes(tempo, notes))
    assert m.read_midi(tmp_path / "a.mid") == [(0, 0.5, 60, 100), (0.5, 1.25, 64, 80)]
    two = b"\x00\x90\x3c\x64\x00\x91\x3c\x50\x64\x80\x3c\x00\x64\x81\x40\x00"     # channel 1 is never let go
    (tmp_path / "two.mid").write_bytes(midi_bytes(two))
    assert m.read_midi(tmp_path / "two.mid") == [(0, 0.5, 60, 100), (0, 1, 60, 80)]
    (tmp_path / "songs.mid").write_bytes(midi_bytes(two, form=2))
    for name, most in (("songs.mid", 10 ** 6), ("a.mid", 20)):      # format 2; larger than allowed
        with pytest.raises(ValueError, match=name):
            m.read_midi(tmp_path / name, most)
    good, random = midi_bytes(tempo, notes), np.random.default_rng(0)
    for k in range(300):                                            # 1,000 take 3 s; the fuzz is the same
        data = bytearray(good[:random.integers(1, len(good) + 1)])
        data[random.integers(len(data))] ^= int(random.integers(1, 256))
        (tmp_path / "b.mid").write_bytes(data)
        try:
            m.read_midi(tmp_path / "b.mid")
        except ValueError as error:
            assert "b.mid" in str(error)


# ---- 6. The Snake VAE ----

def test_snake():
    """FACTS, a = 1: f(-1, .5, 1, 2); df/dx = 1 + sin(2 a x); df/d ln a = x sin(2 a x) - sin^2(a x)/a."""
    snake, x = m.Snake(1), torch.tensor([[[-1.0, 0.5, 1.0, 2.0]]], requires_grad=True)
    assert snake(x).flatten().tolist() == pytest.approx([-0.291927, 0.729849, 1.708073, 2.826822], abs=1e-6)
    torch.nn.init.constant_(snake.log_a, math.log(0.7))
    snake(x).sum().backward()
    assert torch.allclose(x.grad, 1 + torch.sin(1.4 * x))
    slope = (x * torch.sin(1.4 * x) - torch.sin(0.7 * x) ** 2 / 0.7).sum()
    assert snake.log_a.grad.item() == pytest.approx(slope.item(), abs=1e-5)
    torch.nn.init.constant_(snake.log_a, -6)                        # however small, a stays positive
    assert torch.allclose(snake(x), x + 0.0024788 * x ** 2, atol=2e-4)


def test_snake_gradients():
    """Derivatives by hand equal finite differences, in x and in ln a."""
    x, log_a = (torch.randn(shape, dtype=torch.float64, generator=seeded(), requires_grad=True)
                for shape in ((2, 3, 5), (3, 1)))
    assert torch.autograd.gradcheck(m.SnakeFunction.apply, (x, log_a))


def test_snake_vae_lengths_and_range():
    """L = ceil(T / 256), L * 256 samples back, for any T; finite on silence; decoding passes gradients."""
    vae = m.SnakeVAE(16_000, width=8)
    for T in (1, 255, 256, 257, 4000):
        z = vae.encode(torch.zeros(2, T))
        assert z.shape == (2, 16, math.ceil(T / 256)) and vae.decode(z).shape == (2, 256 * z.shape[2])
        assert vae.hop == 256 and vae.frames(T) == z.shape[2] and vae.decode(z).isfinite().all()
    z = torch.randn(1, 16, 3, requires_grad=True)
    vae.decode(z).square().sum().backward()
    assert z.grad.abs().sum() > 0 and vae.posterior(torch.zeros(1, 512))[1].shape == (1, 16, 2)
    sound = torch.randn(1, 512, generator=seeded())
    torch.nn.init.constant_(vae.to_log_variance.bias, 100)
    assert torch.equal(vae.encode(sound), vae.posterior(sound)[0]) and vae.posterior(sound)[1].max() == 20    # clamped
    units = [sum(isinstance(layer, m.ResidualUnit) for layer in part) for part in (vae.encoder, vae.decoder)]
    assert units == [4, 8]                                          # four stages: one unit each, and two to play
    x, unit = torch.randn(1, 8, 40, generator=seeded()), m.ResidualUnit(8, 3)
    assert (unit(x) - x).std(2).max() < 0.02                        # the identity and a constant, at first


def test_no_buzz_at_the_rate_of_the_strides():
    """Transposed convolutions with equal weights make a constant of a constant: each sample has equally many inputs."""
    for strides in ((4, 4, 4, 4), (2, 3, 5)):
        layers = [layer for layer in m.SnakeVAE(16_000, strides=strides, width=8).decoder
                  if isinstance(layer, torch.nn.ConvTranspose1d)]
        assert [layer.stride for layer in layers] == [(s,) for s in reversed(strides)]
        for layer in layers:
            torch.nn.init.ones_(layer.weight)
            y = layer(torch.ones(1, layer.in_channels, 20))[..., 10:-10]
            assert y.unique(dim=2).shape[2] == 1


def test_kl_divergence():
    """Against torch.distributions; N(1, 1): 0.5 nats; equal to N(0, 1): 0."""
    mean, log_variance = torch.randn(2, 3, 4, 5, generator=seeded())
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1)).mean()
    assert m.kl_divergence(mean, log_variance).item() == pytest.approx(exact.item(), rel=1e-5)
    assert m.kl_divergence(torch.ones(3), torch.zeros(3)).item() == 0.5


# ---- 7. What the VAE is trained on ----

def test_stft_loss():
    """Half as loud everywhere: convergence 0.5, log magnitude ln 2. Silence and short clips are finite."""
    sound = torch.randn(1, 8000, generator=seeded())
    assert m.stft_loss(0.5 * sound, sound).item() == pytest.approx(0.5 + math.log(2), abs=0.01)
    assert m.stft_loss(sound, sound).item() == 0
    impulse = torch.zeros(1, 128)                                   # one bin by hand: window 128, centre frames
    impulse[0, 64] = 1.0                                            # Hann is 1 at its middle, 1/2 a quarter away
    # Frames at 0, 32, 64, 96, 128 see it at 0, 1/2, 1, 1/2, 0: three of five tell ln 2 when it is halved.
    assert m.stft_loss(0.5 * impulse, impulse, sizes=(128,)).item() == pytest.approx(0.5 + 0.6 * math.log(2), abs=1e-4)
    for odd in (torch.zeros(1, 8000), torch.zeros(1, 10), torch.ones(2, 1)):
        estimate = odd.clone().requires_grad_()
        m.stft_loss(estimate, odd).backward()
        assert m.stft_loss(odd, odd).isfinite() and estimate.grad.isfinite().all()


def test_codec_distances():
    """A codec that halves the sound: ||S - S/2|| / ||S|| = 1/2, and 20 log10 2 = 6.0206 dB
    where nothing is below the floor."""
    class Half(StubCodec):
        encode, decode = lambda self, audio: audio[:, None], lambda self, z: z[:, 0] / 2
    recordings = m.Plucks(12)
    recordings.cache = {i: torch.randn(16_000, generator=seeded(i)) for i in range(12)}
    assert m.codec_distances(Half(), recordings) == pytest.approx([0.5, 6.0206], rel=1e-4)


def test_adversarial_losses():
    """Hinge by hand: relu(1 - (2, 0)) + relu(1 + (-2, 0)) = 1/2 + 1/2; generator -mean; feature L1 over mean."""
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])
    assert m.hinge_discriminator_loss(real, fake).item() == 1 and m.hinge_generator_loss(fake).item() == 1
    four, two, three = (torch.full((2, 2), v, requires_grad=v != 3) for v in (4.0, 2.0, 3.0))
    matching = m.feature_matching_loss([four, two], [three, three])    # (1/4 + 1/2) / 2; real maps are targets only
    assert matching.item() == pytest.approx(0.375) and not matching.requires_grad
    logits, maps = m.STFTDiscriminator(width=4)(torch.zeros(2, 4000))
    assert len(logits) == 2 and len(maps) == 4 and logits.isfinite().all()


def test_loss_balancer():
    """EnCodec's case: |x - 1| and 100 |x + 1| at 0 pull with 99 unbalanced, with 0 balanced; KL joins behind."""
    def gradient(balance):
        x = torch.zeros(1, requires_grad=True)
        losses = {"a": (x - 1).abs().sum(), "b": 100 * (x + 1).abs().sum()}
        balancer = m.LossBalancer({"a": 1, "b": 1})
        balancer.backward(losses, x) if balance else sum(losses.values()).backward()
        return x.grad.item(), balancer.shares
    assert gradient(False)[0] == 99 and gradient(True)[0] == pytest.approx(0, abs=1e-6)
    assert sum(gradient(True)[1].values()).item() == pytest.approx(1)
    latent = torch.ones(2, 3, requires_grad=True)
    output, balancer = latent * 2, m.LossBalancer({"a": 3, "b": 1}, total_norm=2.0)
    balancer.backward({"a": output.sum(), "b": (7 * output[:, 0]).sum()}, output,
                      free={"kl": latent.square().sum() / 2})
    a, b = 2 * 3 / 4 / math.sqrt(3), 2 * 1 / 4                      # weights' shares over the per-item norms
    assert latent.grad[0].tolist() == pytest.approx([2 * (a + b) + 1, 2 * a + 1, 2 * a + 1], rel=1e-5)
    balancer, x = m.LossBalancer({"a": 1, "b": 1}, ema_decay=0.5), torch.zeros(1, requires_grad=True)
    # running norm (1/4 + 3/2) / (1 - 1/4) = 7/3; b rests
    for slope in (1, 3):
        x.grad = None
        balancer.backward({"a": slope * x.sum(), "b": 0 * x.sum()}, x)
    assert x.grad.item() == pytest.approx(3 / 2 / (7 / 3))
    with pytest.raises(ValueError, match="c"):
        balancer.backward({"c": output.sum()}, output)


# ---- 8. Data ----

def test_built_in_data():
    """Plucks: 60 to each of 37 pitches, a sixth held out evenly; Melodies: what is heard is what is written."""
    data = m.Plucks()
    pitches = data.labels[data.valid][:, 0]
    assert len(data) == 2220 and pitches.bincount()[40:77].tolist() == [10] * 37
    assert torch.equal(m.Plucks().audio(7), data.audio(7)) and len(data.audio(7, 100, 50)) == 50
    crops = data.crops(3, 20_000, seeded())
    assert crops.shape == (3, 20_000) and crops[:, 16_000:].abs().max() == 0
    assert torch.corrcoef(torch.stack([data.audio(0), data.audio(37)]))[0, 1].abs() < 0.99   # one pitch, two tones
    few = m.Plucks(12)
    few.lengths, few.audio = [12] * 12, lambda i, start, length: torch.tensor([float(i), start])
    which, start = few.crops(300, 10, seeded())[:, :2].T.tolist()
    assert set(which) == set(range(10)) and set(start) == {0, 1, 2}    # 10 and 11 are held out; 12 - 10 + 1 starts
    phrase = m.Melodies(count=2, seconds=4.0)
    track = m.pitch_track(phrase.audio(0)[None], 16_000, 256)[0]
    for begin, end, pitch, _ in phrase.notes(0)[:-1]:               # the last may be cut short
        heard = track[round((begin + 0.06) * 62.5):round((end - 0.06) * 62.5)]
        assert heard[heard > 0].median().item() == pytest.approx(pitch, abs=0.3)


def test_progress(monkeypatch, capsys):
    """From 2 to 7 of 10 in 20 s: 3 / 0.25 = 12 s are left; a file's lines are 15 s apart;
    short work leaves none without a text."""
    for live, text, calls, line in ((0, "", [(2, 0), (3, 1), (7, 20), (8, 21)],
                                     "work 7/10  0.2 items/s  12 s left\n"),
                                    (0, "", [(10, 4)], ""),
                                    (1, "", [(3, 0.1), (7, 20)], "\r\033[Kwork 7/10  0.2 items/s  12 s left"),
                                    (1, "", [(10, 4)], "\r\033[K"),
                                    (0, "loss 1", [(10, 4)], "work 10/10  2.0 items/s  4 s in all  loss 1\n")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: live)
        progress = m.Progress("work", 10, done=2)
        for done, now in calls:
            monkeypatch.setattr(m.time, "monotonic", lambda: progress.began + now)
            progress(done, text)
        assert capsys.readouterr().err == line


def test_postponed_interrupt():
    """The first Ctrl-C is noted, the second interrupts, and then the old handler is back;
    in a thread there is nothing to note."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), m.postponed_interrupt() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    entered = []
    thread = threading.Thread(target=lambda: entered.append(m.postponed_interrupt().__enter__()))
    thread.start()
    thread.join()
    assert entered == [[]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven NSynth-like notes of 0.4 s in two folders, and files that are no notes."""
    root = tmp_path_factory.mktemp("notes")
    for i in range(11):
        where = root / ("nsynth-guitar-valid" if i > 5 else "nsynth-guitar-train")
        where.mkdir(exist_ok=True)
        note = m.pluck(torch.tensor([60 + i]), torch.tensor([100]), 0.4, 16_000, [seeded(i)])[0]
        m.save_audio(where / f"guitar_acoustic_00{i // 6}-{60 + i:03d}-100.wav", note, 16_000)
    (root / "text.wav").write_text("no audio")
    (root / "empty.mp3").write_bytes(b"")
    (root / "dangling.wav").symlink_to(root / "nowhere")
    (root / "dir.wav").mkdir()
    soundfile.write(root / "nan \u00e9\n.wav", np.full(9000, np.nan, np.float32), 16_000, "FLOAT")
    soundfile.write(root / "short.flac", np.ones(1), 16_000)
    soundfile.write(root / "silent.wav", np.zeros(9000), 16_000)
    (root / "cut.wav").write_bytes((root / "nsynth-guitar-train" / "guitar_acoustic_000-060-100.wav").read_bytes()[:30])
    (root / "readme.txt").write_text("not counted")
    return root


def test_audio_folder(folder, tmp_path):
    """19 files, 8 of them unusable, each named with a reason; labels from the names; the folders' split."""
    data = m.AudioFolder(folder, known=tmp_path / "files.json")
    assert len(data) == 11 and data.sample_rate == 16_000 and data.seconds == pytest.approx(0.4)
    assert set(data.unusable) == {"text.wav", "empty.mp3", "dangling.wav", "nan \u00e9\n.wav", "short.flac",
                                  "silent.wav", "cut.wav"}
    assert (all(data.unusable.values()) and "silen" in data.unusable["silent.wav"]
            and "NaN" in data.unusable["nan \u00e9\n.wav"])
    assert data.sources == ["guitar_acoustic"] and data.labels[0].tolist() == [60, 100, 0]
    assert data.valid.tolist() == [False] * 6 + [True] * 5 and len(data.audio(0, 100, 50)) == 50
    assert m.AudioFolder(folder, known=tmp_path / "files.json").made_from == data.made_from
    again = m.AudioFolder(folder / "nsynth-guitar-train", sample_rate=8000)
    assert again.valid.sum() == 1 and len(again.audio(0)) == 3200    # no -valid beside it: a seeded 5 %
    copied = shutil.copytree(folder / "nsynth-guitar-train", tmp_path / "copied")
    before = m.AudioFolder(copied, known=tmp_path / "copied.json").made_from
    shutil.copy(copied / "guitar_acoustic_000-060-100.wav", copied / "guitar_acoustic_000-061-100.wav")
    assert m.AudioFolder(copied, known=tmp_path / "copied.json").made_from != before     # one file changed
    for i in range(7):
        (copied / f"{i}.wav").write_text("no audio")
    for name in (*data.unusable, "dir.wav", "missing.wav"):
        if name not in ("short.flac", "silent.wav"):
            with pytest.raises(ValueError, match=re.escape(name)):
                m.load_audio(folder / name, 16_000)
    for path, words in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "0 audio files"),
                        (copied, "7 of them unusable")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=words):
            m.AudioFolder(path)


def header(rate=16_000, channels=1, size=8000, data=bytes(range(1, 251)) * 32):
    """A wav file of 16 bits that claims what it is told to, with 8,000 bytes of sound."""
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size & 2 ** 32 - 1, b"WAVE", b"fmt ", 16, 1, channels, rate,
                       2 * rate * channels & 2 ** 32 - 1, 2 * channels & 65535, 16, b"data", size) + data


def odd_files(root):
    """Some 90 files, bad and odd ones; returns {name: is it usable}."""
    x = 0.5 * np.sin(np.arange(4000) * 0.17)

    def coded(form, subtype=None, y=x, rate=16_000):
        file = io.BytesIO()
        soundfile.write(file, y, rate, format=form, subtype=subtype)
        return file.getvalue()
    wav, flac, ogg, mp3 = map(coded, ("WAV", "FLAC", "OGG", "MP3"))
    with_one = lambda value: coded("WAV", "FLOAT", np.where(np.arange(4000) == 2000, value, x))
    huge = flac[:21] + b"\x0f\xff\xff\xff\xff" + flac[26:]         # a FLAC of 2^36 - 1 samples
    bad = {f"cut {k}.{end}": data[:k] for end, data in (("wav", wav), ("flac", flac), ("ogg", ogg), ("mp3", mp3))
           for k in (0, 1, 3, 11, 20, 35, 43, 44, 100, 300)}
    bad |= {"text.wav": b"RIFF, but no audio", "text.mp3": b"no audio\n" * 99,
            "png.ogg": b"\x89PNG\r\n\x1a\n" + bytes(99),
            "noise.wav": np.random.default_rng(0).bytes(9999), "zeros.mp3": bytes(9999), "nan.wav": with_one(np.nan),
            "inf.wav": with_one(np.inf), "minus inf.wav": with_one(-np.inf), "1e30.wav": with_one(1e30),
            "one.wav": coded("WAV", y=x[:1]),
            "silent.ogg": coded("OGG", y=0 * x), "1e300.wav": coded("WAV", "DOUBLE", x * 1e300), "huge.flac": huge,
            "three hours.wav": header(size=3 * 3600 * 32_000, data=b""), "1 Hz.wav": header(rate=1),
            "2 GHz.wav": header(rate=2 ** 31 - 1),
            "0 Hz.wav": header(rate=0), "no channel.wav": header(channels=0), "channels.wav": header(channels=65535),
            "1024 channels.wav": header(channels=1024)}
    good = {"flac.wav": flac, "wav.mp3": wav, "ogg.flac": ogg, "mp3.ogg": mp3, "up.WAV": wav, "half.wav": wav[:5000],
            "96k.wav": coded("WAV", y=np.tile(x, 6), rate=96_000), "8k.flac": coded("FLAC", rate=8000),
            "six.wav": coded("WAV", y=np.stack([x] * 6, 1)),
            "24.wav": coded("WAV", "PCM_24"), "double.wav": coded("WAV", "DOUBLE"),
            "claims 4 GB.wav": header(size=2 ** 32 - 1)}
    good |= {f"{name}.wav": wav for name in ("a b", "caf\u00e9 \u97f3", "it's \"x\"", "new\nline", "-rf", "<script>x",
                                              "$(touch x)", "%s{}\\n", "n" * 240, "esc\x1b[31m", "\u202egpj",
                                              ": colon: ")}
    for name, data in (bad | good).items():
        (root / name).write_bytes(data)
    (root / "dir.wav").mkdir()
    os.mkfifo(root / "pipe.wav")
    links = {"dangling.wav": "nowhere", "loop.wav": "loop.wav", "a.wav": "b.wav", "b.wav": "a.wav",
             "zero.wav": "/dev/zero", "mem.wav": "/proc/self/mem",
             "good.wav": "24.wav", "round.wav": "."}                # the last is a folder: no file, and not walked into
    for name, target in links.items():
        (root / name).symlink_to(target)
    del links["round.wav"]
    return ({name: name == "good.wav" for name in links} | dict.fromkeys(bad, False) | dict.fromkeys(good, True)
            | {"pipe.wav": False})


def test_odd_files(tmp_path, capfd):
    """Each unusable file is named once, with a reason; used + unusable = found;
    no claim of a header costs memory or time."""
    root = tmp_path / "notes"
    root.mkdir()
    usable = odd_files(root)
    assert len(usable) > 80
    for i in range(60):                                             # half of all must be usable
        shutil.copy(root / "24.wav", root / f"more {i}.wav")
    tracemalloc.start()
    data = m.open_data({"data": root, "codec": "vae", "seconds": None, "seed": 0}, tmp_path)
    m.encode_recordings(TinyCodec(), data, tmp_path / "latents", curves=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.unusable.keys() == {name for name, good in usable.items() if not good}
    assert ({name for name in data.names if not name.startswith("more")}
            == {name for name, good in usable.items() if good})
    said = capfd.readouterr().err
    assert all(reason and said.count(f"unusable: {name!r} {reason}\n") == 1 for name, reason in data.unusable.items())
    assert (f"{len(data)} recordings used, {len(data.unusable)} unusable" in said
            and len(data) + len(data.unusable) == len(usable) + 60)
    for name, words in (("1 Hz.wav", " 1 Hz"), ("2 GHz.wav", "2147483647 Hz"), ("1e30.wav", "1000"),
                        ("three hours.wav", "0 samples"), ("loop.wav", "no such file")):
        assert words in data.unusable[name]
    assert peak < 50e6 and max(data.lengths) <= 8000 and (tmp_path / "latents" / "index.json").stat().st_size < 1e5


class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.server.data; by its `mood` it truncates, stalls or resets once, ignores ranges, sends other bytes."""

    def do_GET(self):
        data, mood = self.server.data, self.server.mood
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if mood != "no ranges" else 0
        self.server.asked.append(start)
        self.send_response(206 if start else 200)
        body = data[start:] if mood != "wrong" else b"x" * len(data)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        once = len(self.server.asked) == 1 and mood in ("truncates", "stalls", "resets")
        self.wfile.write(body[:len(body) // 2] if once else body)
        if once and mood == "stalls":
            time.sleep(1)
        if once and mood == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.asked, running.url = [], f"http://127.0.0.1:{running.server_port}/a.zip"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def zipped(path, *entries):
    with zipfile.ZipFile(path, "w") as bundle:
        for name in entries:
            bundle.writestr(name, b"note " * 100)
    return path.read_bytes()


def test_download_nsynth(server, tmp_path):
    """FACTS: 334,999,208 bytes, sha256 cbabb3ba...; here from a server that truncates, restarts and lies."""
    assert m.NSYNTH_SIZE == 334_999_208 and m.NSYNTH_SHA256.startswith("cbabb3ba2ce81c28982eb41c3ba5127a")
    server.data = zipped(tmp_path / "z.zip", "NSYNTH_GUITAR_MP3/nsynth-guitar-train/a.mp3")
    digest = importlib.import_module("hashlib").sha256(server.data).hexdigest()
    get = lambda name, **k: m.download_nsynth(tmp_path / name, server.url,
                                              **dict(dict(size=len(server.data), sha256=digest), **k))
    (tmp_path / "no ranges").mkdir()
    (tmp_path / "no ranges" / "NSYNTH.zip").write_bytes(b"half")    # this server will not go on there
    bundle = server.data
    for mood in ("truncates", "no ranges"):
        server.mood, server.asked = mood, []
        notes = get(mood)
        assert [path.read_bytes() for path in notes.rglob("nsynth-guitar-train/a.mp3")] == [b"note " * 100]
        assert server.asked == ([0, len(server.data) // 2] if mood == "truncates" else [0])
        assert get(mood) == notes and len(server.asked) < 3          # the second time nothing is asked
    server.mood = "wrong"
    with pytest.raises(ValueError, match="SHA-256"):
        get("wrong")
    for data in (zipped(tmp_path / "evil.zip", "../evil.txt"), bundle[:-30] + b"x" * 30,
                 bundle.replace(b"note ", b"nope "), bundle + b"x"):
        (tmp_path / "wrong" / "NSYNTH.zip").write_bytes(data + b"x" * (len(bundle) - len(data)))
        with pytest.raises(ValueError, match="NSYNTH.zip.*SHA-256"):    # it is there already, and was touched
            get("wrong")
    assert [path.name for path in (tmp_path / "wrong").iterdir()] == ["NSYNTH.zip"]                # nothing is unpacked
    # the right bytes, and yet nothing leaves its folder
    for name in ("../evil.txt", "/tmp/evil.txt", "a/../../evil.txt"):
        server.mood, server.data = "", zipped(tmp_path / "evil.zip", name)
        get("evil", size=len(server.data), sha256=importlib.import_module("hashlib").sha256(server.data).hexdigest())
        shutil.rmtree(tmp_path / "evil")
    assert not (tmp_path / "evil.txt").exists() and not pathlib.Path("/tmp/evil.txt").exists()


def test_download_goes_on_after_a_stall_and_a_reset(server, tmp_path):
    """Half, then silence for longer than the time-out, or a reset: the second request brings the rest.
    A bomb of 5 GB is refused."""
    server.data = zipped(tmp_path / "z.zip", "a.mp3")
    digest = lambda: importlib.import_module("hashlib").sha256(server.data).hexdigest()
    for server.mood in ("stalls", "resets"):
        server.asked = []
        m.download(server.url, tmp_path / server.mood, len(server.data), digest(), timeout=0.3)
        assert (tmp_path / server.mood).read_bytes() == server.data and len(server.asked) == 2
    at = server.data.rindex(b"PK\x01\x02") + 24                     # where the directory claims the size unpacked
    server.mood, server.data = "", server.data[:at] + struct.pack("<I", 4_100_000_000) + server.data[at + 4:]
    with pytest.raises(ValueError, match="more than 4 GB"):
        m.download_nsynth(tmp_path / "bomb", server.url, len(server.data), digest())
    assert [path.name for path in (tmp_path / "bomb").iterdir()] == ["NSYNTH.zip"]


def test_music2latent(tmp_path, monkeypatch):
    """The real package with random weights: [2, 64, 4] from 4 * 4096 + 1536 samples; decoding repeats itself."""
    shutil.copytree(pathlib.Path(importlib.import_module("music2latent").__file__).parent, tmp_path / "music2latent")
    for name in [name for name in sys.modules if name.startswith("music2latent")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("music2latent.models")
    (tmp_path / "music2latent" / "models").mkdir(exist_ok=True)
    weights = tmp_path / "music2latent" / "models" / "music2latent.pt"
    torch.manual_seed(0)
    torch.save({"gen_state_dict": package.UNet().state_dict()}, weights)
    codec, before = m.Music2Latent(), torch.get_rng_state()
    sound = 0.1 * torch.randn(2, 4 * 4096 + 1536, generator=seeded())
    z = codec.encode(sound)
    assert z.shape == (2, 64, 4) and z.dtype == torch.float32 and codec.frames(176_400) == 42 and z.abs().max() < 16.68
    assert torch.allclose(codec.encode(sound[1:]), z[1:], atol=1e-5) and codec.encode(sound[:, :9]).shape == (2, 64, 1)
    one = codec.decode(z[:1, :, :1])
    assert torch.equal(before, torch.get_rng_state()) and codec.sample_rate == 44_100
    torch.manual_seed(1)                                            # the decoder's noise is its own
    assert one.shape == (1, 4096 + 1536) and torch.equal(one, codec.decode(z[:1, :, :1]))
    weights.unlink()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", functools.partial(open, "/nowhere", opener=None))
    for name in [name for name in sys.modules if name.startswith("music2latent")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"put\s+music2latent.pt.*models"):
        m.Music2Latent()


class TinyCodec:
    """Frames of 100 samples, two channels: their mean and their mean square. Dies when told to."""
    sample_rate, hop, channels, tail, made_from, dies_after = 16_000, 100, 2, 0, "tiny", 10 ** 9

    def frames(self, samples):
        return -(-samples // 100)

    def encode(self, audio):
        self.dies_after -= 1
        if self.dies_after < 0:
            raise KeyboardInterrupt
        x = torch.nn.functional.pad(audio, (0, -audio.shape[-1] % 100)).reshape(len(audio), -1, 100)
        return torch.stack([x.mean(2), x.square().mean(2)], dim=1)


def test_encoding_once(folder, tmp_path, monkeypatch):
    """Cut off and continued equals never stopped, byte for byte; pieces equal the whole; statistics by hand."""
    data, codec = m.AudioFolder(folder), TinyCodec()
    m.encode_recordings(codec, data, tmp_path / "whole", curves=True)
    monkeypatch.setattr(m.time, "monotonic", functools.partial(next, iter(range(0, 10 ** 6, 100))))   # always save
    dying = TinyCodec()
    dying.dies_after = 2
    # after 6 pieces of 0.1 s: half of a recording is there
    with pytest.raises(KeyboardInterrupt):
        m.encode_recordings(dying, data, tmp_path / "cut", curves=True, seconds=0.1, batch=3)
    m.encode_recordings(codec, data, tmp_path / "cut", curves=True, seconds=0.1, batch=3)
    whole, cut = (tmp_path / n / "frames.bin" for n in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    wide = np.fromfile(whole, np.float32).reshape(-1, 4)
    assert len(wide) == 11 * 64
    latents = m.LatentDataset(tmp_path / "whole", 64, 2)
    assert np.allclose(latents.mean, wide[:6 * 64, :2].mean(0), atol=1e-6)         # the training part alone
    x, labels, curves = latents.held_out()
    assert x.shape == (5, 2, 64) and labels[:, 0].tolist() == [66, 67, 68, 69, 70] and curves.shape == (5, 2, 64)
    assert np.allclose(x[0].T * latents.std + latents.mean, wide[6 * 64:7 * 64, :2], atol=1e-5)
    assert (curves[0, 1] * 12 + 60)[2:20].median().item() == pytest.approx(66, abs=0.1)
    assert torch.equal(latents.batch(4, seeded(1))[0], latents.batch(4, seeded(1))[0])
    calls = codec.dies_after
    m.encode_recordings(codec, data, tmp_path / "whole", curves=True)
    assert codec.dies_after == calls                                # found again: nothing is encoded
    codec.made_from = "another"
    m.encode_recordings(codec, data, tmp_path / "whole", curves=True)
    assert codec.dies_after < calls                                 # another codec's latents are not these


def test_pieces_have_no_seam(tmp_path):
    """A sound of 4 s in pieces of 1 s, each with a second more on both sides, is within 0.1 % of the whole."""
    torch.manual_seed(0)
    codec, data = m.SnakeVAE(16_000, width=8), m.Melodies(6, seconds=4.0, lasts=4.0)
    codec.made_from = "random"
    for name, seconds in (("whole", 8.0), ("pieces", 1.0)):
        m.encode_recordings(codec, data, tmp_path / name, seconds=seconds)
    whole, pieces = (np.fromfile(tmp_path / name / "frames.bin", np.float32) for name in ("whole", "pieces"))
    assert len(whole) == len(pieces) and np.abs(whole - pieces).max() < 1e-3 * whole.std()


def test_encoding_goes_on_in_the_same_batches(folder, tmp_path, monkeypatch):
    """44 pieces in threes, cut off after 6 (recording 2 of 4 pieces is half done):
    the last batch is of 2 still, not of 1."""
    class Rounds(TinyCodec):
        def encode(self, audio):
            return super().encode(audio) + len(audio)               # as rounding does, but to be seen

    monkeypatch.setattr(m.time, "monotonic", functools.partial(next, iter(range(0, 10 ** 6, 100))))
    for name, calls in (("once", [99]), ("twice", [2, 99])):
        for count in calls:
            codec = Rounds()
            codec.dies_after = count
            with contextlib.suppress(KeyboardInterrupt):
                m.encode_recordings(codec, m.AudioFolder(folder), tmp_path / name, seconds=0.1, batch=3)
    assert (tmp_path / "once" / "frames.bin").read_bytes() == (tmp_path / "twice" / "frames.bin").read_bytes()
    # One of the two is spoilt: both are made again.
    for spoilt in ("frames.bin", "index.json"):
        (tmp_path / "twice" / spoilt).write_bytes(b"half")
        m.encode_recordings(Rounds(), m.AudioFolder(folder), tmp_path / "twice", seconds=0.1, batch=3)
        assert (tmp_path / "once" / "frames.bin").read_bytes() == (tmp_path / "twice" / "frames.bin").read_bytes()


def test_latent_windows(tmp_path):
    """Recordings of 5, 4 and (held out) 9 frames, windows of 3: they start at rows 0, 1, 2, 5 and 6,
    held-out ones at 9, 12 and 15."""
    items = [[name, n, name == "c", None, [60, 1, 0]] for name, n in (("a", 5), ("b", 4), ("c", 9))]
    (tmp_path / "index.json").write_text(json.dumps({"width": 2, "items": items}))
    np.stack([np.arange(18), np.full(18, 7)], 1).astype(np.float32).tofile(tmp_path / "frames.bin")
    data = m.LatentDataset(tmp_path, 3, 2)
    rows = data.batch(300, seeded())[0][:, 0] * data.std[0] + data.mean[0]
    assert set(rows[:, 0].round().tolist()) == {0, 1, 2, 5, 6} and torch.allclose(rows[:, 2], rows[:, 0] + 2)
    held = data.held_out()[0][:, 0] * data.std[0] + data.mean[0]
    assert (held[:, 0].round().tolist() == [9, 12, 15]
            and (data.valid.tolist(), data.start.tolist()) == ([2, 2, 2], [0, 3, 6]))
    assert data.std[1].item() == pytest.approx(0.01)                # a constant channel is not divided by 0


# ---- 9. Training ----

def test_ema():
    """Weights 0 then 1: d = 2/11 at the first update, min(decay, 3/12) at the second."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ema = m.EMA(net, decay=0.2)
    torch.nn.init.ones_(net.weight)
    ema.update(net)
    assert ema.module.weight.item() == pytest.approx(1 - 2 / 11)
    ema.update(net)
    assert ema.module.weight.item() == pytest.approx(1 - 2 / 11 * 0.2)


def test_learning_rate():
    """1e-3 at its peak; 1 % of it at the first of 100 warm-up steps; half of it at 4 * settle."""
    assert [m.learning_rate(k, 1e-3) for k in (0, 99, 500, 2000)] == pytest.approx([1e-5, 1e-3, 1e-3, 5e-4])


def test_drop_conditions():
    """Each slot stays with (1 - p)^2 = 0.81; everything goes with p + (1 - p) p^K; NaN marks a curve."""
    labels, curves = m.drop_conditions(torch.ones(40_000, 2, dtype=torch.long), torch.ones(40_000, 2, 3), seeded())
    assert (labels == 1).float().mean().item() == pytest.approx(0.81, abs=0.01)
    assert (labels == -1).all(1).float().mean().item() == pytest.approx(0.1 + 0.9 * 0.01, abs=0.005)
    assert curves.isnan().float().mean().item() == pytest.approx(0.19, abs=0.01)
    assert (curves.isnan().all(2) | ~curves.isnan().any(2)).all()   # a curve goes as a whole


def test_checkpoints(tmp_path):
    """What goes in comes out; code is refused unrun; a failed write leaves the old file."""
    m.save_checkpoint(tmp_path / "a.pt", step=3, weights=torch.arange(3))
    for mmap in (False, True):
        assert m.load_checkpoint(tmp_path / "a.pt", mmap)["weights"].tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="missing"):
        m.save_checkpoint(tmp_path / "missing" / "a.pt", step=4)
    with pytest.raises(Exception):
        m.save_checkpoint(tmp_path / "a.pt", step=lambda: 0)        # pickle refuses half way through
    assert m.load_checkpoint(tmp_path / "a.pt")["step"] == 3

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)
    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "junk.pt").write_text("junk")
    torch.save({"format": 99}, tmp_path / "new.pt")
    for name in ("evil", "junk", "new", "missing"):
        for mmap in (False, True):
            with pytest.raises(ValueError, match=f"{name}.pt"):
                m.load_checkpoint(tmp_path / f"{name}.pt", mmap)
    assert not (tmp_path / "ran").exists()


def latents_for_training(folder, tmp_path):
    if not (tmp_path / "latents").exists():
        m.encode_recordings(TinyCodec(), m.AudioFolder(folder), tmp_path / "latents", curves=True)
    return m.LatentDataset(tmp_path / "latents", 64, 2)


def same(a, b):
    """Two checkpoints agree bit for bit."""
    if isinstance(a, (dict, list)):
        return len(a) == len(b) and all(same(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_training_loop(tmp_path):
    """One step on a slope of 1000, clipped to 1: Adam's first moment 0.1, weight -1e-3/100 (warm-up),
    average 9/11 of it."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)

    def learn(*_):
        loss = 1000 * net.weight.sum()
        loss.backward()
        return {"loss": loss}
    average = m.training_loop("it", net, [net.weight], lambda: None, learn, lambda *_: ({}, ""), tmp_path / "a.pt", 1,
                              1e-3, (0.9, 0.99), 1.0, seeded())
    assert (net.weight.item() == pytest.approx(-1e-5, rel=1e-3)
            and average.weight.item() == pytest.approx(-9e-5 / 11, rel=1e-3))
    assert (m.load_checkpoint(tmp_path / "a.pt")["optimiser"]["state"][0]["exp_avg"].item()
            == pytest.approx(0.1, rel=1e-3))


def test_side_by_side():
    """Three steps of Adam on weights side by side are three steps on each: the same weights, the same norm."""
    torch.manual_seed(0)
    one = m.UNet1d(2, 8, (1, 2), heads=1)
    two, x, t = copy.deepcopy(one), torch.randn(4, 2, 16), torch.rand(4)
    weights = m.side_by_side(two)
    assert same(one.state_dict(), two.state_dict())
    for net, parts in ((one, list(one.parameters())), (two, [weights])):
        adam = torch.optim.AdamW(parts, 1e-2)
        for _ in range(3):
            adam.zero_grad(set_to_none=False)
            net(x, t).square().mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(parts, 1e-2).item()
            adam.step()
        weights.seen = [norm] if net is one else [*weights.seen, norm]
    assert weights.seen[0] == pytest.approx(weights.seen[1], rel=1e-4)
    gathered = torch.cat([p.flatten() for p in one.parameters()])
    assert torch.allclose(weights, gathered, atol=1e-5) and len(weights) == sum(p.numel() for p in two.parameters())
    assert torch.equal(weights, torch.cat([p.flatten() for p in two.parameters()]))


def test_what_training_leaves_out(tmp_path):
    """`without` ema: the average is the last weights, else it is taken at steps 1, 5 and 9; schedule: Adam's
    first step is the whole rate, 1e-3; minutes = 0: one step."""
    def train(steps=1, **how):
        net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(net.weight)

        def learn(*_):
            loss = net.weight.sum()
            loss.backward()
            return {"loss": loss}
        average = m.training_loop("it", net, [net.weight], lambda: None, learn, lambda *_: ({}, ""), tmp_path / "a.pt",
                                  steps, 1e-3, (0.9, 0.99), 1.0, seeded(), **how)
        return net.weight.item(), average.weight.item(), m.load_checkpoint(tmp_path / "a.pt")
    weight, average, state = train(without=("ema", "schedule"))
    assert weight == average == pytest.approx(-1e-3, rel=1e-3)
    weight, average, state = train(steps=3, without=("ema",))
    assert weight == average and train(steps=10)[2]["ema"]["updates"] == 3
    weight, average, state = train(steps=1000, minutes=0.0)
    assert weight == pytest.approx(-1e-5, rel=1e-3) and (state["step"], state["complete"]) == (1, True)


def test_stopwatch(monkeypatch):
    """Inside for 1 s and for 2 s of 4 s: 3/4."""
    now = iter([0.0, 0.5, 1.5, 2.0, 4.0, 4.0])
    monkeypatch.setattr(m.time, "perf_counter", lambda: next(now))
    watch = m.Stopwatch("cpu")
    for _ in range(2):
        with watch:
            pass
    assert watch.share() == 0.75


def test_latents_on_disk(tmp_path):
    """A map of the file gives the windows that memory gives; statistics of 250,000 frames in pieces are numpy's."""
    rows = np.random.default_rng(0).normal(3, 2, (250_000, 2)).astype(np.float32)
    rows.tofile(tmp_path / "frames.bin")
    items = [[f"{i}", 50_000, i == 4, None, [-1, -1, -1]] for i in range(5)]
    (tmp_path / "index.json").write_text(json.dumps({"width": 2, "items": items}))
    a, b = (m.LatentDataset(tmp_path, 10, 2, disk=disk) for disk in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(a.batch(8, seeded())[:2], b.batch(8, seeded())[:2]))
    assert (a.mean.tolist() == pytest.approx(rows[:200_000].mean(0, float), rel=1e-5)
            and a.std.tolist() == pytest.approx(rows[:200_000].std(0, float), rel=1e-5))
    assert b.flat.untyped_storage().data_ptr() != a.flat.untyped_storage().data_ptr()
    (tmp_path / "frames.bin").write_bytes((rows + 1).tobytes())     # memory keeps what it has read, a map does not
    assert b.flat[0, 0] == rows[0, 0] + 1 and a.flat[0, 0] == rows[0, 0]


@pytest.mark.parametrize("what", ["attention", "norm", "position", "residuals", "time"])
def test_taking_an_idea_out(what):
    """Attention out: frames far away are not heard. Norm out: twice the input, another answer scale.
    Position out: it is worth 0. Residuals out: a block whose last convolution is 0 gives 0.
    Time out: a block's answer is that of e = 0's modulation, whatever e is."""
    torch.manual_seed(0)
    net = m.take_out(m.UNet1d(2, 8, (1, 2), heads=1), [what])
    x, e = torch.randn(1, 16, 8), torch.randn(1, 16)
    if what == "attention":
        attention, = {type(a): a for _, _, a in net.down[1:]}.values()
        assert torch.equal(attention(x), x)
    elif what == "norm":
        assert torch.equal(net.exit[0](x), x)
    elif what == "position":
        before = m.UNet1d.forward(net, x[..., :2].mT, e[0, :1])
        torch.nn.init.ones_(net.position.weight)
        assert torch.equal(m.UNet1d.forward(net, x[..., :2].mT, e[0, :1]), before) and net.position(e) == 0
    else:
        block = net.down[0][1]
        torch.nn.init.zeros_(block.conv2.weight)
        torch.nn.init.zeros_(block.conv2.bias)
        assert torch.equal(block(x, e), 0 * x) == (what == "residuals")
        assert block.modulate(e).abs().sum().item() == 0 or what == "residuals"
        assert net.middle.modulate(e).abs().sum().item() > 0
    assert net(torch.randn(1, 2, 9), torch.tensor([0.5])).shape == (1, 2, 9)


RANK = """
import pathlib, sys, torch, minidiff as m
folder, steps, resume = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
m.meet("cpu")
torch.manual_seed(0)
rank, world = m.rank_and_world()
data, net = m.LatentDataset(folder / "latents", 10, 2), m.UNet1d(2, 8, (1,), (128, 128, 1), heads=1)
m.train_diffusion(net, m.RectifiedFlow(), data, steps, folder / "model.pt", batch_size=8, condition="note",
                  every=2, resume=resume)
torch.save(net.state_dict(), folder / f"rank_{rank}_of_{world}.pt")
"""


def test_two_processes_are_one(folder, tmp_path):
    """torchrun: the same global batch gives the same losses within 1e-5, all ranks the same weights;
    a resume may change their number."""
    def train(name, world, steps, resume=False):
        where = tmp_path / name
        if not where.exists():
            where.mkdir()
            latents_for_training(folder, where)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(where), str(steps), str(resume)], cwd=HERE,
                                  stderr=subprocess.PIPE, text=True,
                                  env=os.environ | {"RANK": str(r), "WORLD_SIZE": str(world),
                                                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                 for r in range(world)]
        said = [rank.communicate(timeout=100)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, said
        rows = list(csv.DictReader((where / "log.csv").open()))
        return [float(r["value"]) for r in rows if r["quantity"] in ("loss", "held out")]
    one, two = train("one", 1, 8), train("two", 2, 4)
    assert two == pytest.approx(one[:4], abs=1e-5)
    a, b = (torch.load(tmp_path / "two" / f"rank_{r}_of_2.pt") for r in range(2))
    assert same(dict(a), dict(b))
    assert train("two", 1, 8, resume=True) == pytest.approx(one, abs=1e-5)


class StubCodec(torch.nn.Module):
    """Means 0 and variances 4 (at first), and a decoder that keeps what it is given."""
    channels = 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def posterior(self, audio):
        mean = self.weight + torch.zeros(len(audio), 2, 4096)
        return mean, mean + math.log(4)

    def decode(self, z):
        self.deviation = z.std().item()
        return (1 + self.weight) * z.flatten(1)


def test_train_codec(tmp_path, monkeypatch):
    """Variance 4: z deviates by 2, KL is (4 - 1 - ln 4) / 2, times its weight; the judge joins at its step;
    averaged weights."""
    calls, backward = [], m.LossBalancer.backward
    monkeypatch.setattr(m.LossBalancer, "backward", lambda self, losses, output, free: (
        calls.append((len(losses), free["kl"].item(), codec.deviation)), backward(self, losses, output, free)))
    codec = StubCodec()
    m.train_codec(codec, m.Plucks(12), 2, tmp_path / "codec.pt", kl_weight=0.25, adversarial_from=1)
    assert [losses for losses, _, _ in calls] == [3, 5]
    assert calls[0][1:] == pytest.approx((0.25 * (3 - math.log(4)) / 2, 2), rel=0.02)
    state = m.load_checkpoint(tmp_path / "codec.pt")
    assert codec.weight == state["ema"]["module"]["weight"] != state["net"]["weight"]


def test_collapsed_channels_and_the_judges_step(tmp_path, monkeypatch):
    """Means that never move: 0 of 2 channels active.
    Where the balancer stays silent the codec learns nothing from its judge."""
    monkeypatch.setattr(m.LossBalancer, "backward", lambda *_, **__: None)
    codec = StubCodec()
    m.train_codec(codec, m.Plucks(12), 2, tmp_path / "codec.pt", adversarial_from=0)
    assert codec.weight.item() == 0 and m.load_checkpoint(tmp_path / "codec.pt")["judge_optimiser"]["state"]
    logged = {row["quantity"]: float(row["value"]) for row in csv.DictReader((tmp_path / "log.csv").open())}
    assert logged["active"] == 0 and logged["judge"] > 0


def test_resumed_codec_is_never_having_stopped(tmp_path):
    """2 steps and 2 more equal 4 steps bit for bit, with the judge, its optimiser and the balancer."""
    states = []
    for name, plan in (("once", [4]), ("twice", [2, 4])):
        for steps in plan:
            torch.manual_seed(0)
            m.train_codec(m.SnakeVAE(16_000, width=4), m.Plucks(12), steps, tmp_path / name, batch_size=2, crop=512,
                          adversarial_from=0, resume=True)
        states.append(m.load_checkpoint(tmp_path / name))
    assert {"judge", "judge_optimiser", "balancer"} < set(states[0]) and same(*states)


def test_train_diffusion(folder, tmp_path):
    """Labels are withheld with 1 - 0.9^2 = 0.19;
    the held-out loss is the averaged net's, at seed 0's noise and times."""
    data, seen, flow = latents_for_training(folder, tmp_path), [], m.RectifiedFlow()
    net = m.UNet1d(2, 8, (1,), (128, 128, 1), heads=1)
    net.register_forward_pre_hook(lambda net, _, given: seen.append(given["labels"]) if net.training else None,
                                  with_kwargs=True)
    average = m.train_diffusion(net, flow, data, 30, tmp_path / "model.pt", batch_size=16, condition="note")
    assert (torch.stack(seen) == -1).float().mean().item() == pytest.approx(0.19, abs=0.05)
    x, labels, _ = data.held_out()
    fixed = seeded(0)
    noise, t = m.standard_normal(x.shape, fixed), flow.sample_times(len(x), fixed)
    logged = {row["quantity"]: float(row["value"]) for row in csv.DictReader((tmp_path / "log.csv").open())}
    with torch.no_grad():
        assert flow.loss_at(average, x, noise, t, labels=labels).item() == pytest.approx(logged["held out"], rel=1e-4)


@pytest.mark.parametrize("condition", ["note", "control", "none"])
def test_resume_is_never_having_stopped(folder, tmp_path, condition):
    """10 steps and 10 more equal 20 steps bit for bit: weights, average, optimiser, random state, log."""
    data, states = latents_for_training(folder, tmp_path), []
    for name, plan in (("once", [20]), ("twice", [10, 20])):
        (tmp_path / name).mkdir()
        for steps in plan:
            torch.manual_seed(0)
            net = m.UNet1d(2, 8, (1, 1), (128, 128, 1) if condition == "note" else (), 2 * (condition == "control"),
                           heads=1)
            m.train_diffusion(net, m.RectifiedFlow(), data, steps, tmp_path / name / "model.pt", batch_size=4,
                              condition=condition, resume=True, every=5)
        states.append((torch.load(tmp_path / name / "model.pt"), (tmp_path / name / "log.csv").read_text()))
    assert same(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    losses = [float(r["value"]) for r in csv.DictReader(states[0][1].splitlines()) if r["quantity"] == "loss"]
    assert len(losses) == 4 and states[0][0]["step"] == 20


def test_training_stops_at_a_loss_that_is_not_finite(folder, tmp_path):
    """NaN in step 13 of 300 stops in step 13, with its learning rate, 13 % of the peak, and what to try;
    step 10 stays saved."""
    data, steps = latents_for_training(folder, tmp_path), []

    def train(objective, steps):
        torch.manual_seed(0)
        return m.train_diffusion(m.UNet1d(2, 8, (1,), heads=1), objective, data, steps, tmp_path / "model.pt",
                                 batch_size=4, resume=True)

    class Breaks(m.RectifiedFlow):
        def loss_at(self, net, *rest, **cond):
            steps.append(net.training)
            return super().loss_at(net, *rest, **cond) * (math.nan if sum(steps) == 3 else 1)
    train(m.RectifiedFlow(), 10)
    good = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(ValueError, match=r"diffusion: the loss is not finite at step 13, learning rate 0.000195; "
                                         r".*--resume .*--lr"):
        train(Breaks(), 300)
    assert sum(steps) == 3 and (tmp_path / "model.pt").read_bytes() == good


@pytest.mark.parametrize("name", ["rf", "edm"])
def test_levels_of_noise(name, folder, tmp_path):
    """Trained on ln(sigma/alpha) from N(1, 1), `without` levels from N(0, 1); held out at N(1, 1) both times."""
    data, means = latents_for_training(folder, tmp_path), []
    for without in ((), ("levels",)):
        objective, seen = m.OBJECTIVES[name](), {True: [], False: []}

        def look(net, x, noise, t, *rest, seen=seen, objective=objective, **cond):
            seen[net.training].append((objective.sigma(t) / objective.alpha(t)).log())
            return type(objective).loss_at(objective, net, x, noise, t, *rest, **cond)
        objective.loss_at = look
        m.train_diffusion(m.UNet1d(2, 8, (1,), heads=1), objective, data, 2, tmp_path / f"{without}.pt",
                          batch_size=4000, without=without)
        means.append((torch.cat(seen[True]).mean().item(), torch.cat(seen[False])))
    assert [mean for mean, _ in means] == pytest.approx([1, 0], abs=0.05)    # a deviation of 1/sqrt(8000) = 0.011
    assert torch.equal(means[0][1], means[1][1])


# ---- 10. Listening and measuring ----

def test_frechet_distance():
    """N(0,1) to N(1,1): 1; to N(0,4): 1; to itself: 0; commuting 2-D: (1-2)^2 + (3-1)^2 + |(1, 2)|^2 = 10."""
    x = torch.randn(100_000, 1, generator=seeded())
    x = (x - x.mean()) / x.std()
    assert m.frechet_distance(x, x + 1) == pytest.approx(1, abs=1e-5)
    assert m.frechet_distance(x, 2 * x) == pytest.approx(1, abs=1e-5) and 0 <= m.frechet_distance(x, x) < 1e-9
    y = torch.randn(100_000, 2, generator=seeded(1), dtype=torch.float64)
    y = (y - y.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(y.T))).T
    a, b = y * torch.tensor([1.0, 3.0]), y * torch.tensor([2.0, 1.0]) + torch.tensor([1.0, 2.0])
    assert m.frechet_distance(a, b) == pytest.approx(10, abs=1e-6)
    with pytest.raises(ValueError):
        m.frechet_distance(x[:1], x)


@each_process
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_3m_sde"])
def test_generate_is_the_same_in_any_batch(process, sampler):
    """Item i is drawn from seed + i: item 2 of seed 5 is item 0 of seed 7; twice gives the same bytes."""
    make = lambda n, seed: m.generate(gaussian_net(process, 1.0, 0.5), process, (n, 2, 3), sampler, 5, seed)
    three = make(3, 5)
    assert torch.equal(three, make(3, 5)) and torch.allclose(three[2:], make(1, 7), atol=1e-6)
    assert not torch.equal(three[0], three[1])
    given = m.generate(gaussian_net(process, 1.0, 0.5), process, (3, 2, 3), sampler, 9, 5, times=process.times(5),
                       eta=0.0)
    assert torch.equal(given, three) == (sampler != "dpmpp_3m_sde")    # times rule, not steps; eta = 0 draws no noise
    with pytest.raises(ValueError, match="unknown sampler"):
        m.generate(None, process, (1, 1, 1), "eular")


def test_a_scale_from_midi(tmp_path):
    """A network learns in seconds to follow curves; its latents are pitch and level of a sine,
    and a MIDI scale is heard in it."""
    random, rows = np.random.default_rng(0), []
    while len(rows) < 4000:
        octave, level, n = random.integers(0, 13) / 12, random.uniform(0.3, 0.9), int(random.integers(6, 16))
        rows += [(octave, e := level * 0.95 ** k, e, 60 + 12 * octave) for k in range(n)]
    np.array(rows[:4000], np.float32).tofile(tmp_path / "frames.bin")
    items = [[f"{i}", 200, i == 19, None, [-1, -1, -1]] for i in range(20)]
    (tmp_path / "index.json").write_text(json.dumps({"width": 4, "items": items}))
    data, flow, rate, scale = (m.LatentDataset(tmp_path, 32, 2), m.RectifiedFlow(), 16_000,
                               (60, 62, 64, 65, 67, 69, 71, 72))
    assert (data.touch[0] == pytest.approx(np.quantile([r[2] for r in rows[:3800]], 0.9), rel=0.01)
            and data.touch[1] == pytest.approx(0.95))
    torch.manual_seed(0)
    net = m.train_diffusion(m.UNet1d(2, 32, (1, 2), controls=2), flow, data, 300, tmp_path / "x.pt", 0, 32, 2e-3,
                            "control")
    # half a second each
    events = b"".join(b"\x00\x90" + bytes([p, 110]) + b"\x64\x80" + bytes([p, 0]) for p in scale)
    (tmp_path / "scale.mid").write_bytes(midi_bytes(events))
    notes = m.read_midi(tmp_path / "scale.mid")
    curves = m.midi_curves(notes, 256, 256 / rate, *data.touch)[None]
    x = m.generate(net, flow, (1, 2, 256), controls=curves)[0] * data.std[:, None] + data.mean[:, None]
    hertz, level = (v.repeat_interleave(256) for v in (440 * 2 ** (x[0] - 9 / 12), x[1]))    # C4: 9 semitones below A4
    sound = (level * torch.sin(2 * math.pi * (hertz.double() / rate).cumsum(0)))[None].float()
    found = [m.note_pitch(m.pitch_track(sound[:, int(a * rate):int(b * rate)], rate, 256)).item()
             for a, b, _, _ in notes]
    assert found == pytest.approx(scale, abs=0.5)


@each_process
def test_generate_from_a_sound(process):
    """Noise level 0 gives it back, the largest ignores it; kept frames come back, the others do not."""
    net, init = gaussian_net(process), 3 * torch.randn(2, 2, 8, generator=seeded())
    make = lambda **k: m.generate(net, process, init.shape, steps=20, init=init, **k)
    assert torch.equal(make(init_noise=0), init)
    assert torch.equal(make(init_noise=process.t_max), m.generate(net, process, init.shape, steps=20))
    near, far = (make(init_noise=f * process.t_max) - init for f in (0.001, 0.5))
    assert near.abs().mean() < 0.2 * far.abs().mean()
    keep = torch.arange(8) < 3
    for sampler in ("euler", "heun", "dpmpp_3m_sde"):
        kept = make(keep=keep, sampler=sampler)
        assert (kept - init)[..., :3].abs().max() < 0.1 and (kept - init)[..., 3:].abs().mean() > 1
    with pytest.raises(ValueError, match="noise level"):
        make(init_noise=100)


def test_measure():
    """A sine of 0.5 at MIDI 60, asked for 60 and for 62: half are in tune, -9.03 dB, its middle is its frequency.

    Of the frames that should be voiced, 60, 60 and 62, two thirds are right.
    """
    tone = torch.sin(2 * math.pi * 440 * 2 ** (-9 / 12) * torch.arange(16_000) / 16_000)[None]
    found = m.measure(0.5 * tone.expand(2, -1), 16_000, 160, pitch=torch.tensor([60, 62]))
    assert (found["pitch_accuracy"] == 0.5
            and found["level_db"] == pytest.approx(20 * math.log10(0.5 / 2 ** 0.5), abs=0.01))
    bright = torch.sin(2 * math.pi * 2000 * torch.arange(16_000) / 16_000)[None]
    assert m.measure(bright, 16_000, 160)["centroid_hz"] == pytest.approx(2000, rel=0.02)
    octaves = torch.tensor([0.0, 0, 2 / 12, -5]).repeat_interleave(25)[None]    # 60, 60, 62, unvoiced
    swell = tone * torch.linspace(0.2, 0.6, 16_000)
    followed = m.measure(swell, 16_000, 160, curves=torch.stack([m.envelope(swell, 160), octaves], 1))
    assert followed["voiced_within_50_cents"] == pytest.approx(2 / 3, abs=0.03)
    assert followed["envelope_correlation"] == pytest.approx(1)


def test_pictures():
    """Shades come back from the PNG; 1000 Hz is line 64 of 192, so row 128 is the darkest;
    a peak of 0.51 blackens 33 of 65 rows."""
    def read(uri):
        data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
        (width, height, *rest), (size,) = struct.unpack_from(">IIBBBBB", data, 16), struct.unpack_from(">I", data, 33)
        for at, kind, n in ((8, b"IHDR", 13), (33, b"IDAT", size), (45 + size, b"IEND", 0)):
            assert (struct.unpack_from(">I4s", data, at) == (n, kind)
                    and zlib.crc32(data[at + 4:at + 8 + n]) == struct.unpack_from(">I", data, at + 8 + n)[0])
        rows = np.frombuffer(zlib.decompress(data[41:41 + size]), np.uint8).reshape(height, width + 1)
        # 8 bits, grey, not filtered
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and rest == [8, 0, 0, 0, 0] and not rows[:, 0].any()
        return rows[:, 1:]
    assert read(m.png(torch.tensor([[0, 0.5, 1], [2, -1, 0.2]]))).tolist() == [[0, 127, 255], [255, 0, 51]]
    picture = read(m.png(m.portrait(0.51 * torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000), 16_000)))
    assert (picture.shape == (192 + 65, 320) and (picture[:192, 20:-20].argmin(0) == 128).all()
            and (picture[0, 20:-20] == 255).all())
    assert ((picture[192:] == 0).sum(0) == 33).all() and m.portrait(torch.zeros(10), 16_000).shape == (192 + 65, 10)


def test_chart():
    """Log: 1, 10, 100 at 0, 1/2, 1; linear, from 0: 1 and 2 at 1/2 and 1.
    What cannot be shown is not; labels keep 16 pixels apart."""
    def points(svg):
        lines = re.findall(r'<polyline points="([^"]+)" stroke-dasharray="[^"]*"/>'
                           r'<text x="270.0" y="[\d.-]+">([^<]+)', svg)
        return {name: [((float(x) - 52) / 210, (160 - float(y)) / 150) for x, y in re.findall("(.+?),(.+?)(?: |$)", p)]
                for p, name in lines}
    svg = m.chart("T", "s", {"a": [(0, 1), (5, 10), (10, 100)], "<b>": [(0, math.inf), (5, 0), (10, 99)],
                             "c": [(1, math.nan)]}, log=True)
    assert points(svg) == {"a 100": [(0, 0), (0.5, 0.5), (1, 1)], "&lt;b&gt; 99": [(1, pytest.approx(0.998, abs=1e-3))]}
    assert (re.findall(r'<text x="0" y="[\d.]+">([^<]+)', svg) == ["1", "10", "100"]
            and 'aria-label="T; a 100; &lt;b&gt; 99"' in svg)
    assert (re.findall(r'<text x="270.0" y="([\d.]+)', svg) == ["10.0", "26.0"]
            and len(set(re.findall("dasharray=.[^/]*", svg))) == 2)
    assert (points(m.chart("T", "s", {"a": [(3, 1), (4, 2)]})) == {"a 2": [(0, 0.5), (1, 1)]}
            and m.chart("T", "s", {"a": []}) == "")


def test_page(tmp_path):
    """A chart of each thing known, with its last numbers; sound and path as given; markup comes out as text;
    what was there stays."""
    run = m.argparse.Namespace(folder=tmp_path / "<i>t", objective=m.EDM(), sampler=lambda: ("heun", 3),
                               codec=TinyCodec, settings={"sources": ["<b>x"]})
    m.write_page(run, run.folder)
    read = lambda: (run.folder / "index.html").read_text()
    assert (re.findall('aria-label="(.+?)"', read()) == ["noise level sigma / alpha, log axis; heun 0.002"]
            and "&lt;i&gt;t" in read())
    (run.folder / "log.csv").write_text("phase,step,quantity,value\ncodec,5,kl,2\ndiffusion,5,loss,4\n"
                                        "diffusion,9,held out,1\ndiffusion,9,loss,3\n")
    (run.folder / "evaluation.json").write_text('{"pitch_accuracy": {"1": 0.25, "3": 0.5}, '
                                                '"pitch_accuracy_real": 1, "pitch_accuracy_codec": 0.75}')
    tone = torch.sin(2 * math.pi * 440 * 2 ** (1 / 240) * torch.arange(16_000) / 16_000)      # 5 cents above A
    m.write_sounds(run, run.folder, [("<s>a", "", torch.tensor([69, 90, 0]), tone)],
                   [(1.0, torch.eye(3)), (0.0, 2 * torch.eye(3))])
    page, _ = read(), m.write_page(run, run.folder)                 # twice the same
    assert re.findall('aria-label="(.+?)"', page) == [
        "diffusion: losses, log axis; loss 3; held out 1", "codec: losses, log axis; kl 2",
        "noise level sigma / alpha, log axis; heun 0.002", "notes in tune; real 1; codec 0.75; generated 0.5"]
    assert ("<s>" not in page and "<b>x" not in page
            and "pitch 69; velocity 90; &lt;b&gt;x; heard 69.05; +5 cents; peak 1.00<" in page)
    assert base64.b64decode(re.search('audio/wav;base64,([^"]+)', page)[1]) == (run.folder / "<s>a.wav").read_bytes()
    assert read() == page and (page.count("<audio"), page.count("<img")) == (1, 2)


# ---- 11. The command line, as a user ----

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`train` on 60 short plucks, from the command to sounds."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setattr(m.Plucks.__init__, "__defaults__", (60, 0, 0.4, 16_000))
    patch.setattr(m.UNet1d.__init__, "__defaults__", (16, (1, 2), (), 0, 4, 1))
    argv = ["train", "--run", str(root / "r"), "--codec-steps", "2", "--steps", "3", "--batch-size", "4"]
    assert m.main(argv) == 0
    yield root / "r"
    patch.undo()


def test_train_leaves_everything(run, capsys):
    """codec.pt, model.pt, log.csv, sounds and the page; a second run refuses, --resume goes on."""
    assert {p.name for p in run.iterdir()} == {"codec.pt", "model.pt", "log.csv", "latents", "samples",
                                               "evaluation.json"}
    page = (run / "samples" / "index.html").read_text()
    assert ((page.count("<audio"), page.count("<img"), page.count("<svg")) == (12, 13, 4)
            and re.findall("<b>(.+?)_3<", page) == ["real", "codec", "generated"])
    # 50 are trained on
    assert torch.allclose(m.load_audio(run / "samples" / "real_3.wav", 16_000), m.Plucks().audio(53), atol=1e-4)
    settings = m.load_checkpoint(run / "model.pt")["settings"]
    assert (settings["objective"], settings["condition"], settings["frames"]) == ("rf", "note", 25)
    opened = m.Run(run)
    for file, part in (("codec.pt", opened.codec), ("model.pt", opened.net)):       # what plays is the averaged weights
        assert same(dict(part.state_dict()), dict(m.load_checkpoint(run / file)["ema"]["module"]))
    assert m.main(["train", "--run", str(run)]) == 2 and "--resume" in capsys.readouterr().err
    assert m.main(["train", "--run", str(run), "--resume", "--objective", "edm"]) == 2
    assert "--objective rf" in capsys.readouterr().err
    assert m.main(["train", "--run", str(run), "--resume", "--steps", "4"]) == 0


def test_sample(run, tmp_path, capsys):
    """Every option once; the same seed gives the same bytes, count or no count."""
    base = ["sample", "--run", str(run), "--steps", "2", "--pitch", "60", "64"]
    assert m.main(base + ["--out", str(tmp_path / "a"), "--seed", "3"]) == 0
    assert m.main(base + ["--out", str(tmp_path / "b"), "--seed", "3"]) == 0
    a, b = (sorted((tmp_path / n).glob("*.wav")) for n in "ab")
    assert len(a) == 2 and [x.read_bytes() for x in a] == [x.read_bytes() for x in b]
    assert m.main(base + ["--out", str(tmp_path / "b"), "--seed", "3", "--cfg", "1"]) == 0    # overwrites nothing
    assert [x.read_bytes() for x in a] == [x.read_bytes() for x in b]
    assert sorted(x.stem for x in (tmp_path / "b").glob("*_2.wav")) == [f"{x.stem}_2" for x in b]
    extra = ["--count", "2", "--velocity", "90", "--source", "pluck", "--seconds", "0.9", "--sampler", "dpmpp_3m_sde",
             "--eta", "0.5", "--cfg", "3", "--rescale", "0.7", "--cfg-interval", "0.2", "0.8", "--negative-pitch", "50",
             "--out", str(tmp_path / "c")]
    assert m.main(base + extra) == 0 and len(list((tmp_path / "c").glob("*.wav"))) == 4
    assert soundfile.info(next((tmp_path / "c").glob("*.wav"))).frames == math.ceil(0.9 * 16_000 / 256) * 256
    init = ["--init-audio", str(a[0]), "--init-noise", "0", "--out", str(tmp_path / "d")]
    assert m.main(base + init) == 0
    run_object = m.Run(run)
    x, ((t, noise), *path) = run_object.generate(run_object.net, (2, 16, 25), "euler", 3, 7)
    assert (torch.equal(noise, torch.randn(16, 25, generator=seeded(7))) and torch.equal(path[-1][1], x[0])
            and len(path) == t + 2)
    with torch.no_grad():
        trip = run_object.codec.decode(run_object.codec.encode(m.load_audio(a[0], 16_000)[None]))[0]
    back = m.load_audio(sorted((tmp_path / "d").glob("*.wav"))[0], 16_000)
    assert torch.allclose(back, trip, atol=1e-3)                    # noise 0: the codec's round trip
    assert m.main(base + init[:2] + ["--keep", "0", "0.2", "--out", str(tmp_path / "e")]) == 0
    m.save_audio(tmp_path / "pluck.wav", m.pluck(torch.tensor([60]), torch.tensor([90]), 0.3, 16_000, seeded())[0],
                 16_000)
    assert m.main(base + ["--match", str(tmp_path / "pluck.wav"), "--out", str(tmp_path / "f")]) == 0
    first, best = map(float, re.search(r"([\d.]+) at first, ([\d.]+) at best", capsys.readouterr().out).groups())
    assert 0 < best <= first                                        # test_match_envelope sees it fall
    page = (tmp_path / "a" / "index.html").read_text()
    assert page.count("data:audio/wav;base64") == 2 and "http" not in page.replace("http-equiv", "")


def test_plot_schedule(capsys):
    """Karras from 100 to 0.01 with rho -> many: four even decades, each 12 columns;
    linear's t = 1 is beyond the right edge."""
    m.plot_schedule(m.RectifiedFlow(), 5, sigma_min=0.01, sigma_max=100.0, rho=1e3)
    head, rule, linear, karras, _ = capsys.readouterr().out.splitlines()
    assert "5 steps" in head and rule.split() == ["0.001", "0.01", "0.1", "1", "10", "100"]
    assert [i for i, c in enumerate(karras[16:]) if c == "o"] == [12, 24, 36, 48, 60] and linear[-1] == "o"
    m.plot_schedule(m.RectifiedFlow(), 3, sigma_min=1.0, sigma_max=1.0, rho=1.0)
    assert capsys.readouterr().out.splitlines()[3][16 + 36] == "3"     # three steps at one level


def test_match_envelope():
    """A decoder that plays noise times 2: the envelope of a target of 0.8 is found, item by item;
    the loss falls fivefold."""
    target, decode = torch.full((1, 12), 0.8), lambda x: 2 * x.flatten(1)
    found = m.match_envelope(lambda z: z, (2, 1, 12), 5, decode, 3, target, steps=60)
    assert torch.allclose(m.envelope(decode(found), 3), torch.full((2, 4), 0.8), atol=0.1)


def test_sample_hands_on_what_was_asked(run, tmp_path, monkeypatch, capsys):
    """Every option at once, read back from the call of generate; keep 0.1 to 0.2 s is frames 7 to 12 of 16 ms."""
    seen = {}

    def generate(net, objective, shape, *how, **rest):
        seen.update(rest, net=net, how=how)
        return torch.zeros(shape)
    monkeypatch.setattr(m, "generate", generate)
    m.save_audio(tmp_path / "a.wav", torch.randn(6400, generator=seeded()) / 5, 16_000)
    line = ("sample --count 2 --pitch 60 64 --velocity 90 --source pluck --sampler dpmpp_3m_sde --steps 3 --seed 7 "
            "--eta 0.5 --cfg 3 --rescale 0.7 --cfg-interval 0.2 0.8 --negative-pitch 50 --init-noise 0.6 "
            f"--keep 0.1 0.2 --out {tmp_path}")
    argv = [*line.split(), "--init-audio", str(tmp_path / "a.wav")]
    assert m.main([*argv, "--run", str(run)]) == 0
    net = seen["net"]
    assert (net.scale, net.rescale, list(net.interval)) == (3, 0.7, [0.2, 0.8])
    assert net.negative["labels"].tolist() == [[50, -1, -1]] * 4
    assert seen["labels"].tolist() == [[60, 90, 0]] * 2 + [[64, 90, 0]] * 2
    assert (*seen["how"], seen["eta"], seen["init_noise"]) == ("dpmpp_3m_sde", 3, 7, 0.5, 0.6)
    flow = m.RectifiedFlow()
    assert torch.equal(seen["times"], m.schedule(flow, "polyexponential", 3, 0.6))      # what suits this sampler
    assert seen["init"].shape == (4, 16, 25) and seen["keep"].nonzero()[:, 0].tolist() == list(range(7, 13))
    shutil.copytree(run, tmp_path / "edm")
    state = m.load_checkpoint(run / "model.pt")
    state["settings"]["objective"] = "edm"
    m.save_checkpoint(tmp_path / "edm" / "model.pt", **state)
    shaped = ["--schedule", "karras", "--sigma-min", "0.1", "--sigma-max", "20", "--rho", "3", "--plot-schedule"]
    assert m.main([*argv, "--run", str(run), *shaped]) == 0 and "karras" in capsys.readouterr().out
    assert torch.equal(seen["times"], m.schedule(flow, "karras", 3, 0.6, 0.1, 20.0, 3.0))
    assert (m.main([*argv, "--run", str(run), "--schedule", "linear", "--rho", "3"]) == 2
            and "--rho" in capsys.readouterr().err)
    for more, words in ((["--seconds", "1"], "give one"), (["--match", "x", "--init-noise", "0"], "has none")):
        assert m.main([*argv, "--run", str(run), *more]) == 2 and words in capsys.readouterr().err
    seen.pop("how")
    with monkeypatch.context() as patch:
        patch.setattr(m, "match_envelope", lambda draw, *_: draw(torch.zeros(4, 16, 25)))
        patch.setattr(m.Run, "generate", lambda *_, **__: (torch.zeros(4, 16, 25), [(0.0, torch.eye(3))]))
        assert m.main([*argv, "--run", str(run), "--match", str(tmp_path / "a.wav")]) == 0
    assert seen["how"] == ("dpmpp_3m_sde", 3, 7)                    # sought with the seed that it will be played with
    assert m.main([*argv, "--run", str(tmp_path / "edm"), "--sigma-max", "60", "--init-noise", "60"]) == 0
    assert seen["times"][0] == 60                                  # there the network sees ln(t)/4
    assert seen["net"].interval == pytest.approx([math.log(0.2) / 4, math.log(0.8) / 4])


def test_evaluate(run):
    """The ceilings are there: real notes 1.0; the keys of DESIGN.md; N and seed; the page shows w."""
    assert m.main(["evaluate", "--run", str(run), "--count", "4", "--steps", "2", "--seed", "5"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert (set(result["pitch_accuracy"]) == set(result["frechet"]) == {"1", "2", "3"}
            and result["pitch_accuracy_real"] == 1)
    assert (result["count"], result["seed"], result["nfe"]) == (4, 5, 3) and 0 < result["network_share"] <= 1
    assert result["frechet_floor"] > 0 and result["nearest_ratio"] > 0 and result["seconds_per_item"] > 0
    assert (0 <= result["pitch_accuracy_codec"] <= 1
            and "guidance scale w" in (run / "samples" / "index.html").read_text())
    assert result["real_time_factor"] == pytest.approx(0.4 / result["seconds_per_item"])
    assert m.main(["evaluate", "--run", str(run), "--count", "2"]) == 0
    result = json.loads((run / "evaluation.json").read_text())      # Heun, 17 evaluations; fewer: 2 and 4 steps
    assert result["nfe"] == 17 and list(result["evaluations"]["frechet"]) == ["3 heun", "7 heun"]
    assert m.main(["evaluate", "--run", str(run), "--count", "2", "--sampler", "euler"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["nfe"] == 16 and list(result["evaluations"]["frechet"]) == ["4 euler", "8 euler"]


def test_evaluate_more(run, capsys):
    """4 samplers at 4 to 64 evaluations, beside the 1 of every `evaluate`; 7 levels of noise;
    at sigma/alpha = 1/8 t is 1/9; almost no noise leaves B as it was."""
    assert m.main(["evaluate", "--run", str(run), "--count", "2", "--steps", "1", "--more"]) == 0
    out, result = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    assert len(result["evaluations"]["pitch_accuracy"]) == 21 and " 7 heun" in out and "64 dpmpp_3m_sde, eta = 1" in out
    assert len(result["from_sound"]["frechet"]) == 7 and "0.125, --init-noise 0.11" in out


def test_evaluate_knows_its_oracles(run, tmp_path, monkeypatch):
    """w = 1 plays training notes: ratio 0; w = 2 plays A: Frechet 0; w = 3 plays B: the floors;
    notes 2 semitones off: 0.

    By a clock of our own 4 sounds take 4 s, 3 of them inside the network: a share of 3/4, 1 s a sound.
    """
    index = json.loads((run / "latents" / "index.json").read_text())
    for *_, figures, label in index["items"]:
        label[0] += 2
        figures and figures.update(pitch_accuracy=0.25)             # as measured when it was encoded
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "latents" / "index.json").write_text(json.dumps(index))
    opened = m.Run(tmp_path / "r")
    data = m.LatentDataset(tmp_path / "r" / "latents", 25, 16)
    every = torch.linspace(0, len(data.valid) - 1, 8).round().long()
    A, B = data.held_out(every[0::2])[0], data.held_out(every[1::2])[0]
    play = {1.0: data.window(data.train[:4], torch.zeros(4, dtype=torch.long))[0], 2.0: A, 3.0: B}
    now = [0.0]
    opened.net = lambda *_, **__: now.append(now.pop() + 3)

    def generate(net, *_, init=None, **__):
        now[0] += 1
        net.net(B, 1.0)
        return play[net.scale] if init is None else init
    monkeypatch.setattr(m, "generate", generate)
    monkeypatch.setattr(m.time, "perf_counter", lambda: now[0])
    result = m.evaluate(opened, count=4)
    assert (result["network_share"], result["seconds_per_item"]) == (0.75, 1)
    assert result["nearest_ratio"] == pytest.approx(0, abs=1e-3) and result["pitch_accuracy_real"] == 0.25
    assert (result["frechet"]["2"] == pytest.approx(0, abs=1e-6)
            and result["frechet"]["3"] == pytest.approx(result["frechet_floor"]))
    assert result["pitch_accuracy"]["3"] == result["pitch_accuracy_codec"]


@pytest.mark.parametrize("options", [["--objective", "edm", "--condition", "none"],
                                     ["--objective", "vp", "--net", "tutorial"],
                                     ["--data", "melodies", "--adversarial-from", "1"]], ids=" ".join)
def test_other_trainings(run, tmp_path, options, monkeypatch, capsys):
    """EDM, VP, the tutorial's network, curves and the discriminator run from the command to sounds."""
    monkeypatch.setattr(m.Melodies.__init__, "__defaults__", (24, 0, 0.5, 16_000, 0.6))
    monkeypatch.setattr(m.TutorialUNet.__init__, "__defaults__", (8, 2))
    where = ["--run", str(tmp_path / "r")]
    assert m.main(["train", *where, "--codec-steps", "2", "--steps", "2", "--batch-size", "4", *options]) == 0
    assert m.main(["sample", *where, "--steps", "2", "--seconds", "0.3"]) == 0
    assert m.main(["evaluate", *where, "--steps", "2"]) == 0
    result = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert ("melodies" in options) == ("envelope_correlation" in result)
    assert m.main(["sample", *where, "--pitch", "60"]) == 2          # none of the three takes a pitch
    # half a second of middle C; nothing
    for name, body in (("a", b"\x00\x90\x3c\x64\x64\x80\x3c\x00"), ("empty", b"")):
        (tmp_path / f"{name}.mid").write_bytes(midi_bytes(body))
    play = lambda name: m.main(["sample", *where, "--steps", "2", "--midi", str(tmp_path / name),
                                "--out", str(tmp_path / "o")])
    if "melodies" in options:
        assert play("a.mid") == 0 and "voiced_within_50_cents" in capsys.readouterr().out
        assert soundfile.info(next((tmp_path / "o").glob("*.wav"))).frames == math.ceil(1.5 * 16_000 / 256) * 256
    assert play("empty.mid") == 2 and ("0 notes" if "melodies" in options else "control") in capsys.readouterr().err


def test_options_of_training(run, tmp_path, monkeypatch, capsys):
    """Each reaches the piece that it speaks of; recordings get a discriminator half-way, strings none."""
    seen = {}
    monkeypatch.setattr(m, "train_diffusion", lambda net, objective, data, *a, **k: (_ for _ in ()).throw(
        ValueError(repr(seen.update(net=net, data=data, compiled=a[7], **k)))))
    for name in ("latents", "codec.pt"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, tmp_path / name)
    argv = ["train", "--run", str(tmp_path), "--minutes", "2.5", "--without", "ema", "attention", "--latents", "disk",
            "--compile"]
    assert m.main(argv) == 2
    assert (seen["minutes"], seen["without"], seen["compiled"]) == (2.5, ["ema", "attention"], True)
    new = tmp_path / "new"                                          # refused before anything is trained
    assert m.main(["train", "--run", str(new), "--net", "tutorial", "--without", "time"]) == 2 and not new.exists()
    assert "none anyway" in capsys.readouterr().err
    judges = {}
    monkeypatch.setattr(m, "train_codec", lambda codec, data, *a, adversarial_from, **k: (_ for _ in ()).throw(
        ValueError(judges.update({type(data).__name__: adversarial_from}))))
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", m.Plucks().audio(i).numpy(), 16_000)
    for data in (str(tmp_path), "plucks"):
        assert m.main(["codec", "--data", data, "--run", str(tmp_path / "new"), "--codec-steps", "10"]) == 2
    assert judges == {"AudioFolder": 5, "Plucks": None}


def test_what_does_not_fit_is_named(run, tmp_path, capsys):
    """Another format, a missing field, other labels, rate or codec, other data, no codec:
    one line with the field that differs."""
    def settings(**other):
        return lambda state: state["settings"].update(other)
    cases = [("model.pt", lambda state: state.update(format=99), "format 1, got 99"),
             ("model.pt", lambda state: state["settings"].pop("objective"), "'objective'"),
             ("model.pt", lambda state: state.pop("ema"), "'ema'"),
             ("model.pt", settings(sources=["pluck", "harp"]), "tables.2"),
             ("model.pt", settings(mean=None), "does not fit"),
             ("model.pt", settings(objective="text"), "'text'"),
             ("codec.pt", settings(sample_rate=8000), "8000 Hz; expected a finished codec at 16000 Hz"),
             ("codec.pt", lambda state: next(iter(state["ema"]["module"].values())).add_(1), "another codec"),
             ("codec.pt", lambda state: state["ema"]["module"].popitem(), "Missing key"),
             ("codec.pt", None, "codec.pt: ")]
    for k, (name, change, words) in enumerate(cases):
        shutil.copytree(run, tmp_path / str(k))
        state = torch.load(run / name)
        if change:
            change(state)
            torch.save(state, tmp_path / str(k) / name)
        else:
            (tmp_path / str(k) / name).unlink()
        for line in ["sample --steps 1"] + ["train --resume --steps 4"] * (
                words in ("tables.2", "another codec", "codec.pt: ")):
            status, error = m.main([*line.split(), "--run", str(tmp_path / str(k))]), capsys.readouterr().err
            words = "harp" if "train" in line and words == "tables.2" else words
            assert status == 2 and words in error and error.count("\n") == 1 and name in error, (line, error)


def test_mistakes_are_one_line_and_status_2(run, tmp_path, capsys):
    """What was got, what was expected, what to do; never a traceback."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.pt").write_text("junk")
    shutil.copytree(run, tmp_path / "other")
    state = m.load_checkpoint(run / "model.pt")
    state["settings"]["channels"] = 8
    m.save_checkpoint(tmp_path / "other" / "model.pt", **state)
    shutil.copytree(run, tmp_path / "half")
    m.save_checkpoint(tmp_path / "half" / "codec.pt", **dict(m.load_checkpoint(run / "codec.pt"), complete=False))
    cases = {"sample --pitch 200": "0", "sample --steps 0": "1", "train --stps 3": "--steps",
             "sample --run nowhere": "nowhere",
             f"sample --run {tmp_path / 'x'}": "checkpoint", f"sample --run {tmp_path / 'other'} --steps 1": "fit",
             f"sample --run {tmp_path / 'half'}": "finished codec", f"sample --run {run} --rescale 1.5": "0.0..1.0",
             f"sample --run {run} --source violin": "pluck", "train --data nowhere": "no such folder",
             "train --device abacus": "abacus",
             f"train --data {tmp_path / 'x'} --run {tmp_path / 'y'}": "audio files",
             f"sample --run {run} --keep 0 1": "--init-audio",
             f"sample --run {run} --init-audio {tmp_path / 'x' / 'model.pt'}": "audio", "dance": "dance",
             "train --lr nan": "nan"}
    for line, words in cases.items():
        try:
            status = m.main(line.split())
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status == 2 and words in error.splitlines()[-1] and error.count("\n") <= 2, (line, error)
    assert m.main([]) == 0 and "python minidiff.py train" in capsys.readouterr().out


def test_command_line_fuzz(tmp_path, monkeypatch, capsys):
    """300 argument lists out of the parser's own table, good and bad values:
    0 or 2, one line, nothing outside runs/."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no audio")
    m.save_audio(tmp_path / "note.wav", torch.randn(6400, generator=seeded()) / 5, 16_000)
    monkeypatch.chdir(tmp_path)
    for name, small in (("Plucks", (14, 0, 0.3, 16_000)), ("Melodies", (14, 0, 0.3, 16_000)), ("TutorialUNet", (8, 2)),
                        ("UNet1d", (8, (1,), (), 0, 1, 1)), ("SnakeVAE", (8, (4, 4, 4, 4), 4, (1,)))):
        monkeypatch.setattr(getattr(m, name).__init__, "__defaults__", small)
    monkeypatch.setattr(m.train_codec, "__defaults__", (0, "cpu", 1, 5e-4, 1024, 1e-3, None))
    assert m.main(["train", "--run", "run", "--codec-steps", "1", "--steps", "1", "--batch-size", "2"]) == 0
    state = m.load_checkpoint("run/codec.pt")                       # it takes 50 ms with all that goes on training
    m.save_checkpoint("run/codec.pt", **{k: state[k] for k in ("step", "complete", "settings", "ema")})
    for name in ("download", "Music2Latent.__init__"):
        monkeypatch.setattr(f"minidiff.{name}", lambda *_, **__: (_ for _ in ()).throw(ValueError("no network")))
    random = np.random.default_rng(0)
    draw = lambda *values: str(values[random.integers(len(values))])
    texts = {"--data": ("plucks", "melodies", "nsynth", "folder", "nowhere", "text", ""),
             "--device": ("cpu", "auto", "meta", "hpu", "cuda:99", ""), "--source": ("pluck", "violin", ""),
             **dict.fromkeys(("--init-audio", "--match", "--midi"), ("note.wav", "text", "folder", "nowhere", "a\0b")),
             "--out": ("runs/out", "text", "n" * 300),
             "--run": ("runs/r", "runs/r", "runs/new", "runs/r/codec.pt", "text/r", "runs/\u00e9 'x'")}
    rows = [row.split(maxsplit=4)[:4] for row in re.findall("^--.*", m.OPTIONS, re.M)]

    def values(name, word):
        if name in texts:
            return [draw(*texts[name])]
        if word == "FLAG":
            return []
        bad = random.random() < 0.4
        if "|" in word:
            return [draw("", "x", "-1", "\u00e9") if bad else draw(*word.split("|"))]
        low = float(word.split("..")[0])
        good = draw(0.1, 0.3, 0.5) if "." in word.split("..")[0] or low < 0 else draw(int(low), int(low) + 1)
        return ([draw("", "x", "nan", "inf", "-7", "1e999", "0x1", "9" * 40) if bad else good]
                * (2 if "x2" in word else 1))

    def listing():
        return {p: p.is_dir() or p.read_bytes() for top in (tmp_path, HERE) for p in top.iterdir()
                if p.name not in ("runs", "data", "__pycache__")}
    before, ended = listing(), []
    for k in range(300):
        if k % 50 == 0:
            shutil.rmtree("runs", ignore_errors=True)
            shutil.copytree("run", "runs/r")
        command = draw("codec", "train", "sample", "sample", "evaluate")
        argv = [command, "--run", "runs/r"] + ["--steps", "1", "--codec-steps", "1", "--batch-size", "2"][
            :{"train": 6, "codec": 0}.get(command, 2)]
        argv += ["--codec-steps", "1"] * (command == "codec")
        own = [row for row in rows if command[0] in row[1] or random.random() < 0.02]
        for i in random.permutation(len(own))[:random.integers(0, 5)]:
            argv += [own[i][0], *values(own[i][0], own[i][3])]
        try:
            status = m.main(argv)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(f"{argv} ended with {error!r}") from error
        said = capsys.readouterr().err.splitlines()
        assert status in (0, 2) and (status == 0 or said[-1].startswith("minidiff: ")), (argv, said)
        ended.append(status)
    assert listing() == before and 30 < ended.count(0) < 270


# A process that imports once and forks for each line of its input: Python to run first | arguments of main. It is as
# much a process as any, and 20 can be killed in the time in which 20 import torch. A minute between saves lasts 60 ms.
PROGRAM = """
import os, resource, shutil, signal, sys, time, torch._dynamo, minidiff as m      # the first optimiser wants _dynamo
m.Plucks.__init__.__defaults__ = (40, 0, 0.4, 16_000)
m.UNet1d.__init__.__defaults__ = (8, (1,), (), 0, 1, 1)
m.SnakeVAE.__init__.__defaults__ = (8, (4, 4, 4, 4), 4, (1,))
m.train_codec.__defaults__ = (0, "cpu", 1, 5e-4, 1024, 1e-3, None)
clock = time.monotonic
time.monotonic = lambda: 1000 * clock()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
for line in sys.stdin:
    before, argv = line.split("|")
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr
        exec(before)
        os._exit(m.main(argv.split()))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """call(arguments, before="", kill_after=None) -> (status, what it said); once: a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("program")
    with (root / "said").open("a") as said, subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=HERE, text=True, stderr=said, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE) as process:
        def call(arguments, before="", kill_after=None):
            # a limit on the size of files holds for this one, too
            os.truncate(root / "said", 0)
            print(before, arguments, sep="|", file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):       # it was quicker
                    os.kill(child, signal.SIGKILL)
            return int(process.stdout.readline()), (root / "said").read_text()
        call.once, began = root / "once", time.monotonic()
        assert call(f"train --run {call.once} {TINY}")[0] == 0
        call.seconds = time.monotonic() - began
        yield call
        process.kill()


TINY = "--codec-steps 120 --steps 150 --batch-size 2"
DIES_AT_SAVE = ("n = iter(range({})); "
                "os.fsync = lambda _: next(n, None) is None and os.kill(os.getpid(), signal.SIGKILL)")


def alike(a, b):
    """Two runs have the same weights, optimisers, random states, settings and latents, bit for bit."""
    return (all(same(m.load_checkpoint(a / name), m.load_checkpoint(b / name)) for name in ("codec.pt", "model.pt"))
            and (a / "latents" / "frames.bin").read_bytes() == (b / "latents" / "frames.bin").read_bytes())


def test_killed_at_any_moment(program, tmp_path):
    """SIGKILL between write and rename, or at any other moment: resumed, it ends as `once` did, log and all.
    ROUNDS=20 for more."""
    run, random, ended = tmp_path / "r", np.random.default_rng(0), []
    for k in range(int(os.environ.get("ROUNDS", 4))):
        how = ({"before": DIES_AT_SAVE.format(random.integers(1, 14) if k else 1)} if k % 2 == 0 else
               {"kill_after": random.uniform(0, program.seconds)})
        status, said = program(f"train --run {run} {TINY}" + " --resume" * bool(k), **how)
        assert status in (0, -9), said
        assert k or (run / "codec.pt.new").exists() and not (run / "codec.pt").exists()       # the first dies in a save
        ended.append(status)
    status, said = program(f"train --run {run} {TINY} --resume")
    assert status == 0 and -9 in ended, said
    assert alike(run, program.once) and (run / "log.csv").read_text() == (program.once / "log.csv").read_text()
    assert not list(run.rglob("*.new"))


def test_interrupted_and_resumed(program, tmp_path):
    """Ctrl-C in the codec's first step, SIGTERM in the first encoding, Ctrl-C in the model's first step:
    saved, said, 130."""
    run, line = tmp_path / "r", f"train --run {tmp_path / 'r'} {TINY} --resume"
    for number, where, words in ((2, "Recordings.crops", "codec: 1 steps are saved"),
                                 (15, "pitch_track", "recordings are saved"),
                                 (2, "drop_conditions", "diffusion: 1 steps are saved")):
        before = f"old = m.{where}; m.{where} = lambda *a, **k: os.kill(os.getpid(), {number}) or old(*a, **k)"
        status, said = program(line, before)
        assert status == 130 and words in said and "--resume" in said.splitlines()[-1], said
    assert program(line)[0] == 0 and alike(run, program.once)
    rows = [row.split(",")[:3] for row in (run / "log.csv").read_text().splitlines()]
    assert len(rows) == len(set(map(tuple, rows)))


@pytest.mark.parametrize("before, words", [
    ("resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))", "model.pt: cannot be written (File too large)"),
    ("os.chdir('{run}'); os.chmod('.', 0o555); os.getuid() or os.setuid(65534)",
     "log.csv: cannot be written (Permission denied)"),
    ("m.drop_conditions = lambda *a: shutil.rmtree('{run}', ignore_errors=True) or a[:2]",
     "log.csv: cannot be written (No such file"),
], ids=["disk full", "read-only", "gone"])
def test_what_cannot_be_written(program, tmp_path, before, words):
    """One line, status 2, and the checkpoint as it was;
    limits and users hold for root as well in a process of their own."""
    run = shutil.copytree(program.once, tmp_path / "r")
    good = (run / "model.pt").read_bytes()
    status, said = program(f"train --run {'.' if 'chdir' in before else run} {TINY} --resume --steps 200",
                           before.format(run=run))
    assert status == 2 and words in said.splitlines()[-1] and "Traceback" not in said
    assert not run.exists() or (run / "model.pt").read_bytes() == good and not list(run.rglob("*.new"))


def test_encoding_on_a_full_disk_or_below_a_file(program, tmp_path):
    """frames.bin outgrows its limit: the run is named; a folder below a file is none."""
    run = shutil.copytree(program.once, tmp_path / "r", ignore=lambda *_: ["model.pt", "latents", "log.csv"])
    before = "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    status, said = program(f"train --run {run} {TINY} --resume", before)
    assert status == 2 and f"{run}: [Errno 27] File too large" in said.splitlines()[-1]
    (tmp_path / "file").touch()
    status, said = program(f"train --run {tmp_path / 'file' / 'r'} {TINY}")
    assert status == 2 and "file" in said.splitlines()[-1] and said.count("\n") == 1


# ---- The text does not lie ----

# How each piece is used once it is lifted out: true when it works. z is [2, 1, 8], t is [2], path a file name.
USES = {
    "RectifiedFlow": "RectifiedFlow().loss(lambda x, t: 0 * x, z).item() > 0.2",
    "VPDiffusion": "VPDiffusion().velocity(lambda x, t: x, z + 1, t).mean() > 1.5",
    "EDM": "EDM().times(4)[0] == 80 and EDM().loss(lambda x, t: 0 * x, z).item() > 0",
    "karras_times": "karras_times(4, 0.1, 9.0)[-1] == 0",
    "polyexponential_times": "len(polyexponential_times(4, 0.1, 9.0)) == 5",
    "guide": "guide(z + 3, z + 1, 2.0)[0, 0, 0] == 5",
    "GuidedNet": "GuidedNet(lambda x, t, labels: x + labels[:, :, None], 2.0)"
                 "(z, t, labels=torch.ones(2, 1)).isnan().all()",
    "classifier_guidance": "callable(classifier_guidance(None, None, None))",
    "euler": "torch.allclose(euler(lambda x, t: x, z + 1, torch.tensor([1.0, 0.5, 0.0])), z + 0.25)",
    "heun": "torch.allclose(heun(lambda x, t: x, z + 1, torch.tensor([1.0, 0.5, 0.0])), z + 0.3125)",
    "dpmpp_3m_sde": "torch.equal(dpmpp_3m_sde(lambda x, t: z + 7, z, torch.tensor([2.0, 1.0, 0.0])), z + 7)",
    "optimise_noise": "optimise_noise(lambda n: n, z, lambda x: (x - 1).square().sum(), 5, 0.1).mean() > 0.3",
    "TutorialUNet": "TutorialUNet(1, 4, 2)(z, t).shape == z.shape",
    "time_embedding": "time_embedding(t, 6).shape == (2, 6)",
    "UNet1d": "UNet1d(1, 8, (1, 2), heads=2)(z, t).shape == z.shape",
    "save_audio": "save_audio(path + '.wav', z[0, 0] + 0.5, 8000) == 0.5",
    "resample": "resample(z, 2, 3).shape == (2, 1, 12)",
    "pluck": "pluck(torch.tensor([60]), torch.tensor([90]), 0.1, 8000).abs().max() > 0.1",
    "envelope": "envelope(z[0], 3).shape == (1, 3)",
    "pitch_track": "pitch_track(torch.sin(torch.arange(4000.)[None] / 5), 8000, 100)[0, 20] > 55",
    "Snake": "torch.equal(Snake(1)(z), z)",
    "SnakeVAE": "SnakeVAE(8000, width=4).decode(z.expand(2, 16, 8)).shape == (2, 2048)",
    "kl_divergence": "kl_divergence(z + 1, z) == 0.5", "stft_loss": "stft_loss(z[0], z[0]) == 0",
    "STFTDiscriminator": "len(STFTDiscriminator(width=4)(z[0])[1]) == 4",
    "feature_matching_loss": "feature_matching_loss([t], [t]) == 0",
    "hinge_discriminator_loss": "hinge_discriminator_loss(t, t) == 2",
    "hinge_generator_loss": "hinge_generator_loss(t) == -0.5",
    "LossBalancer": "LossBalancer({'a': 1}).shares == {}", "Plucks": "len(Plucks(37, seconds=0.1).audio(3)) == 1600",
    "Melodies": "Melodies(2, seconds=1.0).audio(0).abs().max() > 0",
    "EMA": "EMA(nn.Linear(1, 1)).update(nn.Linear(1, 1)) is None",
    "side_by_side": "side_by_side(nn.Linear(2, 3)).shape == (9,)",
    "save_checkpoint": "save_checkpoint(path, a=1) is None and os.path.exists(path)",
    "frechet_distance": "abs(frechet_distance(torch.eye(3), torch.eye(3) + 1) - 3) < 1e-6",
    "schedule": "schedule(type('Flow', (), dict(t_max=1.0))(), 'linear', 4).tolist() == [1, 0.75, 0.5, 0.25, 0]",
    "midi_curves": "midi_curves([(0, 1, 72, 127)], 2, 1.0, 0.5, 1.0).tolist() == [[0.5, 0], [1, -5]]",
    "generate": "generate(lambda x, t: x, type('Flow', (), dict(t_max=1, add_noise=lambda s, x, n, t: n, "
                "times=lambda s, n, top: torch.tensor([1.0, 0]), "
                "velocity=lambda s, net, x, t: net(x, t)))(), (2, 1, 8), device='cpu').abs().max() < 1e-6",
}


def lifts(node):
    """The names after "Lifts out with:" in a docstring; None where that is missing: the program's own."""
    text = " ".join(ast.get_docstring(node).split()).partition("Lifts out with: ")[2].rstrip(".")
    return None if not text else set() if text == "nothing" else set(re.split(r",\s*", text))


def uses_names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(DEFINITIONS)


def uses(node):
    return uses_names(node) - {node.name}


@pytest.mark.parametrize("name", [n for n in DEFINITIONS if lifts(DEFINITIONS[n]) is not None])
def test_every_piece_lifts_out(name, tmp_path):
    """Its list is exactly what it needs, transitively; with the imports and that list alone it works."""
    needed, found = set(), uses(DEFINITIONS[name])
    while found - needed:
        needed |= found
        found = set().union(*[uses(DEFINITIONS[n]) for n in needed])
    assert lifts(DEFINITIONS[name]) == needed - {name}
    kept = [n for n in TREE.body if isinstance(n, (ast.Import, ast.ImportFrom))
            or getattr(n, "name", None) in needed | {name}
            or isinstance(n, ast.Assign) and not uses_names(n)]     # constants need not be listed
    space = {}
    exec(compile(ast.Module(kept, []), "piece", "exec"), space)
    space |= {"z": torch.zeros(2, 1, 8), "t": torch.full((2,), 0.5), "path": str(tmp_path / "file")}
    assert eval(USES.get(name, f"callable({name})"), space)


def test_every_definition_is_documented_and_nothing_refers_down():
    """A docstring; 90 or more say with what they lift out; no definition uses a name that stands below it."""
    lines = {name: node.lineno for name, node in DEFINITIONS.items()}
    for name, node in DEFINITIONS.items():
        assert ast.get_docstring(node), name
        assert all(lines[other] < node.lineno for other in uses(node)), name
    assert sum(lifts(node) is not None for node in DEFINITIONS.values()) >= 90


def test_formulas_have_sources_and_tensors_have_axes():
    """Each formula names its paper or seed; each piece that takes tensors names their axes."""
    formulas = """RectifiedFlow VPDiffusion EDM karras_times polyexponential_times guide classifier_guidance heun
        dpmpp_3m_sde optimise_noise time_embedding SelfAttention UNet1d TutorialUNet envelope pitch_track Snake
        SnakeVAE kl_divergence stft_loss STFTDiscriminator hinge_discriminator_loss hinge_generator_loss
        feature_matching_loss LossBalancer EMA learning_rate drop_conditions frechet_distance"""
    tensors = """expand standard_normal guide GuidedNet euler heun dpmpp_3m_sde optimise_noise time_embedding
        ResidualBlock SelfAttention UNet1d load_audio save_audio resample pluck envelope pitch_track note_pitch
        Snake ResidualUnit Recurrent SnakeVAE stft_loss STFTDiscriminator LossBalancer LatentDataset
        drop_conditions reference_losses frechet_distance generate measure portrait"""
    for names, pattern in ((formulas, r"\[\d+\]|seeds/|Boersma"), (tensors, r"\[(B|N|T|C|n|\.\.\.)")):
        assert not [n for n in names.split() if not re.search(pattern, ast.get_docstring(DEFINITIONS[n]))]


def test_every_argument_is_read():
    """By ast: no function has a parameter that its body never names (self and _ aside)."""
    for f in [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]:
        every = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *filter(None, (f.args.vararg, f.args.kwarg))]
        read = {n.id for statement in f.body for n in ast.walk(statement) if isinstance(n, ast.Name)}
        assert not {a.arg for a in every} - read - {"self", "_"}, f.name


def test_chapters_and_imports():
    """The map on the title page is the list of banners; only four packages and the standard library."""
    banner = re.findall(r"^# -{98}\n# (\d+\. .+)\n# -{98}$", SOURCE, re.M)
    chapters = re.findall(r"^    (\d+\. .+)$", m.__doc__, re.M)
    assert banner == chapters and len(banner) == 11
    modules = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
               for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert modules - set(sys.stdlib_module_names) == {"torch", "numpy", "soundfile", "music2latent"}
    assert max(map(len, SOURCE.splitlines())) <= 100


def test_every_option_is_read(capsys):
    """Each row of the table is in --help of the commands that its letters name, under its heading,
    with range and default; and it is read."""
    rows = [row.split()[:2] for row in re.findall("^--.*", m.OPTIONS, re.M)]
    assert len(rows) == len({name for name, _ in rows}) > 25
    for command in m.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            m.main([command, "--help"])
        text = capsys.readouterr().out
        shown = set(re.findall(r"(?<![\w-])--[a-z-]+", text)) - {"--help"}
        assert stop.value.code == 0 and shown >= {name for name, users in rows if command[0] in users}
        assert not shown & {name for name, users in rows if command[0] not in users}
        heads = {"c": ["data and run", "training"], "t": ["data and run", "model", "training"]}.get(
            command[0], ["data and run", "sampling"])
        assert re.findall(r"^(\w.*):$", text, re.M)[1:] == heads
        entries, _, example = text.rpartition("\n\n")
        for entry in re.split(r"\n  (?=--)", entries)[1:]:
            assert re.match(r"--(resume|more|plot-schedule|compile) |--\S+ [A-Z\d{-].*\(.+\)$",
                            " ".join(entry.split("\n\n")[0].split())), entry
        m.parse(example.removeprefix("example: python minidiff.py ").split())
    read = (set(re.findall(r"options\.(\w+)", SOURCE))
            | set(re.findall(r"'(\w+)'", ast.unparse(DEFINITIONS["run_settings"]))))
    assert not {name[2:].replace("-", "_") for name, _ in rows} - read


def test_readme():
    """Every command in README.md parses; every name in its table exists; every `make` target too."""
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"^(?:\.venv/bin/)?python minidiff\.py (.+?)(?:  +#.*)?$", text, re.M)
    assert len(commands) >= 6
    for line in commands:
        m.parse(line.split())
    for name in re.findall(r"^\| `(\w+)` \|", text, re.M):
        assert name in DEFINITIONS, name
    targets = re.findall(r"^(\w+):", (HERE / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", text)) <= set(targets)
