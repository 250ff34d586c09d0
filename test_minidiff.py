"""The proof of minidiff.py, in the order of its chapters. Each docstring states what must come out.
On Gaussian data N(mu, s^2) the flow's path, alpha mu + sqrt(alpha^2 s^2 + sigma^2) z, is known."""
import ast
import csv
import hashlib
import http.server
import json
import math
import os
import pathlib
import re
import shutil
import sys
import threading
import zipfile
from functools import partial
import numpy as np
import pytest
import soundfile
import torch
from torch import nn
import minidiff as m
FLOW = m.RectifiedFlow()
VP = m.VPDiffusion()
EDM = m.EDM()
RATE = 16_000
each_objective = pytest.mark.parametrize("objective", [FLOW, VP, EDM], ids=["RF", "VP", "EDM"])
each_sampler = pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_3m_sde"])

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)
normal32 = partial(normal, dtype=torch.float32)

def near(found, wanted, tolerance=1e-5):
    """Numbers, lists or tensors agree within the tolerance, absolute, and to six digits."""
    found, wanted = (torch.as_tensor(x).double() for x in (found, wanted))
    return torch.allclose(found, wanted, atol=tolerance, rtol=1e-6)

def same(a, b):
    if isinstance(a, (dict, list, tuple)):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def network(objective, denoiser):
    """The network that answers like denoiser(sigma/alpha, x_t/alpha), solved for by hand."""
    def net(x, t, **_):
        t = m.expand(t, x)
        if objective is EDM:                               # it is shown c_in x and ln(sigma)/4
            t = (4 * t).exp()
            root = (t ** 2 + 1).sqrt()
            return (denoiser(t, root * x) - x / root) * root / t
        alpha = objective.alpha(t).clamp_min(1e-9)
        sigma = objective.sigma(t)
        x_0 = denoiser(sigma / alpha, x / alpha)
        noise = (x - alpha * x_0) / sigma
        return x_0 - noise if objective is FLOW else alpha * noise - sigma * x_0
    return net
def ideal_net(objective, mu=0.0, s=1.0):
    return network(objective, lambda r, z: (s ** 2 * z + r ** 2 * mu) / (s ** 2 + r ** 2))

def test_toy():
    """Of the data 0.954 lie within two of their deviations of a moon; 300 steps find the way."""
    untrained, _ = m.toy(steps=1)
    samples, data = m.toy(steps=300)
    assert near(data, 0.954, 0.02)
    assert samples > untrained + 0.2

def test_times():
    """EDM's 18 noise levels, Stable Audio's 8 (published); VP's sin(pi/2 (t + s)/(1 + s))."""
    edm = [80, 57.585985, 40.785574, 28.374585, 19.352453, 12.910082, 8.400935, 5.315195, 3.256822,
           1.923340, 1.088171, 0.585348, 0.296442, 0.139516, 0.059947, 0.022935, 0.007528, 0.002, 0]
    stable = [500, 173.263, 60.0402, 20.8055, 7.2096, 2.4983, 0.8657, 0.3, 0]
    assert m.linear_times(4, 2.0).tolist() == [2, 1.5, 1, 0.5, 0]
    assert near(m.karras_times(18, 0.002, 80), edm)
    assert near(m.polyexponential_times(8, 0.3, 500), stable, 5e-4)
    assert near(m.polyexponential_times(3, 1, 16, rho=2), [16, 2, 1, 0])
    assert near(VP.sigma(torch.tensor([0, 0.3, 1])), [0.0124665, 0.4617486, 1])

@each_objective
def test_denoise_and_velocity(objective):
    """The true answer gives x_0 back; the velocity is d/dt of the exact path, mu = 1.5, s = 0.7."""
    x, noise = normal(2, 3, 7)
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    target = objective.target(x, noise, t)
    assert near(objective.denoise(lambda *_: target, objective.add_noise(x, noise, t), t), x)
    assert near(objective.loss_at(lambda *_: target, x, noise, t), 0)
    def path(t):
        spread = (objective.alpha(t) ** 2 * 0.49 + objective.sigma(t) ** 2).sqrt()
        return (objective.alpha(t) * 1.5 + spread * x[:, 0])[:, None]
    velocity = objective.velocity(ideal_net(objective, 1.5, 0.7), path(t), t)
    assert near(velocity, (path(t + 1e-6) - path(t - 1e-6)) / 2e-6)

@each_objective
def test_loss(objective):
    """Zero network on N(0, I): 2 (x_0, noise), 1, 1; ideal: 1.741264 (pi/2 at uniform t), 1, 1."""
    x = normal(40_000, 4)
    net = ideal_net(objective)
    t = torch.rand(40_000, generator=seeded(1))
    zero = objective.loss(lambda x, t: 0 * x, x, seeded(1))
    losses = [zero, objective.loss(net, x, seeded(1)),
              objective.loss_at(net, x, normal(40_000, 4, seed=2), t)]
    assert near(losses, [2, 1.741264, math.pi / 2] if objective is FLOW else [1, 1, 1], 0.02)
    assert near(objective.loss(lambda x, t: 0 * x, x, seeded(1), reduce=False).mean(), zero)

def test_edm_preconditioning():
    """c_skip, c_out, c_in, c_noise for sigma_data = 0.5 (published)."""
    table = {0.5: (0.5, 0.35355339, 1.41421356, -0.17328680), 1.0: (0.2, 0.44721360, 0.89442719, 0),
             80.0: (3.90610e-5, 0.49999023, 0.01249976, 1.09550666),
             0.002: (0.99998400, 0.00199998, 1.99998400, -1.55365202)}
    for sigma, row in table.items():
        sigma = torch.tensor(sigma, dtype=torch.float64)
        assert near(m.EDM(sigma_data=0.5).preconditioning(sigma), row, 1e-8)

def test_training_times():
    """EDM's quantiles; logit-normal: deviation 0.20828, P(0.3 < t < 0.7) = 0.60317 (published)."""
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    sigma = EDM.sample_times(400_000, seeded()).quantile(levels)
    assert near(sigma / torch.tensor([0.04184, 0.13407, 0.30119, 0.67664, 2.16804]), 1, 0.02)
    t = FLOW.sample_times(400_000, seeded())
    assert near([t.std(), ((t > 0.3) & (t < 0.7)).float().mean()], [0.20828, 0.60317], 3e-3)
    assert near(VP.sample_times(400_000, seeded()).quantile(levels), levels, 5e-3)

@each_objective
def test_t_is_a_float_or_one_per_item(objective):
    """0.5 and [0.5, 0.5, 0.5] do the same; the network is handed [B]; time_at(sigma/alpha) is t."""
    shapes = []
    x, noise = normal(2, 3, 2, 4)
    def net(x, t):
        shapes.append(t.shape)
        return ideal_net(objective, 1.0, 0.5)(x, t)
    for method in (partial(objective.add_noise, x, noise), partial(objective.target, x, noise),
                   partial(objective.loss_at, net, x, noise), partial(objective.denoise, net, x),
                   partial(objective.velocity, net, x)):
        assert torch.equal(method(0.5), method(torch.full((3,), 0.5)))
    assert shapes == [(3,)] * 6
    t = objective.time_at(torch.tensor([0.05, 1, 7], dtype=torch.float64))
    assert near(objective.sigma(t) / objective.alpha(t), [0.05, 1, 7])

def test_one_denoiser_serves_all():
    """x_t / alpha is EDM's x_t at sigma/alpha: one denoiser, three objectives, the same sample."""
    def sample(objective):
        net = network(objective, lambda ratio, z: torch.tanh(z) / (1 + ratio))
        times = objective.time_at(m.karras_times(300, 0.02, 20)[:-1])
        x = 20 * objective.alpha(times[0]) * normal(6, 2)
        return m.heun(partial(objective.velocity, net), x, times) / objective.alpha(times[-1])
    assert near(sample(FLOW), sample(EDM), 1e-3)
    assert near(sample(VP), sample(EDM), 1e-3)

def test_guide():
    """u + w (c - u): c = 3, u = 1 give 1, 3, 6 at w = 0, 1, 2.5; rescale 1 has c's deviation."""
    one = torch.ones(1, 2)
    assert [m.guide(3 * one, one, w)[0, 0].item() for w in (0, 1, 2.5)] == [1, 3, 6]
    c, u = normal(2, 3, 4, 50)
    full = m.guide(c, u, 5.0, rescale=1.0)
    assert near(full.std((1, 2)), c.std((1, 2)))
    assert near(m.guide(c, u, 5.0, rescale=0.5), (m.guide(c, u, 5.0) + full) / 2)

def test_guided_net():
    """c = x + label, u = x - 1: -1 + 3 (6, 8) from one pass of 2B rows; w = 1 takes B."""
    rows = []
    def net(x, t, labels=None):
        rows.append(len(x))
        return x if labels is None else x + labels[:, :1, None]
    def ask(scale, negative=None, **cond):
        guided = m.GuidedNet(net, scale, negative=negative)
        return guided(torch.zeros(2, 1, 3), torch.ones(2), **cond)[:, 0, 0].tolist()
    labels = torch.tensor([[5], [7]])
    assert [ask(w, labels=labels) for w in (3.0, 1.0, 0.0)] == [[17, 23], [5, 7], [-1, -1]]
    assert rows == [4, 2, 4]
    assert ask(2.0, {"labels": 0 * labels + 4}, labels=labels) == [6, 10]      # 4 + 2 (1, 3)
    assert ask(3.0) == [0, 0]                              # no condition: the plain network
    curves = m.GuidedNet(lambda x, t, controls: controls.nan_to_num(nan=-2.0), 2.0)
    assert curves(labels, labels[:, 0], controls=torch.ones(2, 1)).tolist() == [[4], [4]]

def dpmpp(x, sigmas, eta):
    return m.dpmpp_3m_sde(lambda x, t: x / (1 + 4 * m.expand(t, x) ** 2), x, sigmas, eta, seeded(5))

def test_orders():
    """On N(0, 0.5^2) twice the steps leave 1/2 (Euler), 1/4 (Heun), 1/8 (DPM++) of the error."""
    z = normal(8, 4)
    errors = []
    for n in (64, 128):
        velocity = partial(FLOW.velocity, ideal_net(FLOW, 0.0, 0.5))
        x = [sampler(velocity, z, m.linear_times(n)) * 2 for sampler in (m.euler, m.heun)]
        grid = torch.logspace(math.log10(20), 0, n // 2 + 1, dtype=torch.float64)
        x += [dpmpp(z * 400.25 ** 0.5, grid, 0.0) / 1.25 ** 0.5]       # sqrt(0.25 + sigma^2) z
        errors.append(torch.stack([(a - z).abs().max() for a in x]))
    assert near((errors[0] / errors[1])[:2] / torch.tensor([2, 4]), 1, 0.15)
    assert (errors[0] / errors[1])[2] > 6                  # half of the x_0'' term gives 4

def test_dpmpp_3m_sde():
    """eta = 1 ends at N(0, 0.5^2) and forgets its start; eta = 0 is the map to z/2."""
    z = normal(20_000, 1)
    times = m.polyexponential_times(60, 0.002, 80)
    x = dpmpp(80 * z, times, 1.0)
    assert near([x.mean(), x.std(), (x * z).mean()], [0, 0.5, 0], 0.02)
    assert near(dpmpp(80 * z, times, 0.0), z / 2, 0.01)

@pytest.mark.parametrize("sampler, cost", [(m.euler, 6), (m.heun, 11), (m.dpmpp_3m_sde, 6)])
def test_samplers_count_and_leave_their_input(sampler, cost):
    """n evaluations, 2n - 1 for Heun; t is [B] in x's dtype."""
    seen = []
    x = torch.ones(2, 3)
    def look(x, t):
        seen.append((t.shape, t.dtype))
        return 0.1 * x
    sampler(look, x, m.karras_times(6, 0.002, 80))
    assert seen.count(((2,), torch.float32)) == cost
    assert torch.equal(x, torch.ones(2, 3))

def test_optimise_noise():
    """Through a sampler that maps z to 1 + z/2 the noise for the sample 3 is 4."""
    start = torch.zeros(1, 1, 3)
    make = partial(m.generate, ideal_net(FLOW, 1.0, 0.5), FLOW, start.shape, "heun", 8)
    found = m.optimise_noise(lambda z: make(noise=z), start, lambda x: (x - 3).square().mean(),
                             steps=150, lr=0.1)
    assert near(found, 4, 0.3)

@each_objective
@each_sampler
@pytest.mark.parametrize("schedule", [None, m.karras_times(50, 0.002, 80)], ids=["even", "karras"])
def test_generate(objective, sampler, schedule):
    """N(2, 1) in 50 steps by each sampler on each grid; item 2 of seed 5 is item 0 of seed 7."""
    before = torch.get_rng_state()
    net = ideal_net(objective, 2.0)
    x = m.generate(net, objective, (3, 16, 32), sampler, 50, 5, schedule)
    assert near(x.mean(), 2, 0.1)
    assert near(x.std(), 1, 0.25)
    assert near(m.generate(net, objective, (1, 16, 32), sampler, 50, 7, schedule), x[2:], 1e-4)
    assert torch.equal(before, torch.get_rng_state())      # no chance but the seed's
    with pytest.raises(ValueError, match="eular.*heun"):
        m.generate(net, objective, (1, 1, 3), "eular")

@each_objective
@each_sampler
def test_generate_from_a_sound(objective, sampler):
    """init_noise 0 returns it, the largest ignores it, None is where sigma = alpha; keep keeps."""
    init = 3 * normal32(2, 2, 8)
    make = partial(m.generate, ideal_net(objective), objective, init.shape, sampler, 40, eta=0.0)
    assert torch.equal(make(init=init, init_noise=0), init)
    assert torch.equal(make(init=init, init_noise=objective.t_max), make())
    noise = torch.stack([normal32(2, 8, seed=i) for i in (0, 1)])
    middle = make(init=init)
    assert near(middle, (init + noise) / 2 ** 0.5, 0.4)    # N(0, 1)'s exact map
    with pytest.raises(ValueError, match="init_noise"):
        make(init=init, init_noise=99)
    kept = make(init=init, keep=torch.arange(8) < 3)
    assert torch.equal(kept[..., :3], init[..., :3])
    assert near(kept[..., 3:], middle[..., 3:], 1e-4)

def small_unet(**given):
    torch.manual_seed(0)
    return m.UNet1d(4, width=16, label_sizes=(10, 3), controls=2, heads=2, **given)

def test_tutorial_unet():
    """35,207,296 parameters on 64 channels (published); any L; it sees the time."""
    torch.manual_seed(0)
    assert sum(p.numel() for p in m.TutorialUNet(64).parameters()) == 35_207_296
    net = m.TutorialUNet(4, width=32)
    x = normal32(1, 4, 41)
    assert not near(net(x, torch.zeros(1)), net(x, torch.ones(1)))

def test_time_embedding():
    """sin and cos of 1000 t / 10,000^(k/2), k = 0, 1, at t = 0.1."""
    wanted = [math.sin(100), math.sin(1), math.cos(100), math.cos(1)]
    assert near(m.time_embedding(torch.tensor([0.1]), 4)[0], wanted, 1e-4)

def test_residual_block_and_self_attention():
    """By hand: 24 silu(2) from scale -1, shift 2; softmax(q k / 2) v, two heads of 4 features."""
    block = m.ResidualBlock(8, 8, 3)
    x = normal32(2, 8, 5)
    nn.init.zeros_(block.modulate.weight)
    block.modulate.bias.data = torch.tensor([-1.0, 2.0]).repeat_interleave(8)
    nn.init.ones_(block.exit.weight)
    nn.init.zeros_(block.exit.bias)
    assert near((block(x, torch.ones(2, 3)) - x)[:, :, 1:4], 24 * 1.761594, 1e-3)
    attention = m.SelfAttention(8, heads=2)
    q, k, v = attention.qkv(x).reshape(2, 3, 2, 4, 5).unbind(1)
    weights = (torch.einsum("bhdi,bhdj->bhij", q, k) / 2).softmax(3)
    mixed = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(2, 8, 5)
    assert near(attention(x), x + attention.out(mixed))

def test_unet_conditions():
    """None is -1, or NaN; label 0, a curve of 0 and another t differ; frames have numbers."""
    net = small_unet(window=5)
    numbers = []
    net.position.register_forward_pre_hook(lambda _, inputs: numbers.append(inputs[0]))
    x = normal32(2, 4, 8)
    t = torch.tensor([0.1, 0.1])
    plain = net(x, t)
    assert near(net(x, t, torch.full((2, 2), -1), torch.full((2, 2, 8), math.nan)), plain)
    for other in (net(x, t, torch.zeros(2, 2).long()), net(x, t, controls=torch.zeros(2, 2, 8)),
                  net(x, t + 0.1)):
        assert not near(other, plain, 1e-3)
    assert near(numbers[0][:, 0], torch.tensor([0, 1, 2, 3, 4, 4, 4, 4.0]).sin())

def test_unet_keeps_items_apart_and_trains_everything():
    """Item 1 does not touch item 0; every parameter gets a gradient; L = 1 to 40 come back."""
    net = small_unet()
    for L in range(1, 41):
        assert net(torch.ones(1, 4, L), torch.ones(1)).shape == (1, 4, L)
    x = normal32(2, 4, 21)
    cond = {"labels": torch.tensor([[1, 2], [3, 0]]), "controls": normal32(2, 2, 21, seed=1)}
    out = net(x, torch.tensor([0.3, 0.6]), **cond)
    other = net(x + torch.tensor([[[0]], [[1]]]), torch.tensor([0.3, 0.9]), **cond)
    assert near(out[0], other[0])
    assert not near(out[1], other[1], 1e-2)
    out.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())

def hertz(pitch):
    return 440 * 2 ** ((pitch - 69) / 12)
def sine(frequency, T=8000, rate=RATE):
    return torch.sin(2 * math.pi * frequency * torch.arange(T).double() / rate).float()
def heard(sound):
    return m.note_pitch(m.pitch_track(sound[None], RATE, 256)).item()
def bad_files(root):
    (root / "text.wav").write_text("no audio")
    (root / "empty.mp3").write_bytes(b"")
    (root / "song.m4a").write_bytes(b"not decoded here")
    soundfile.write(root / "nan.wav", np.full(9000, np.nan, np.float32), RATE, "FLOAT")
    return ["text.wav", "empty.mp3", "song.m4a", "nan.wav"]

def test_resample_load_and_save(tmp_path):
    """To 16 bits, or -20 dB if compressed; stereo is averaged; 1.5 is scaled to 1; bad is named."""
    for ending, error in (("wav", 4e-5), ("flac", 4e-5), ("mp3", 0.05), ("ogg", 0.05)):
        path = tmp_path / f"a.{ending}"
        assert near(m.save_audio(path, 0.5 * sine(440), RATE), 0.5, 1e-3)
        assert near(m.load_audio(path, RATE)[2000:6000], 0.5 * sine(440)[2000:6000], error)
    assert near(m.save_audio(path, 1.5 * sine(440), RATE), 1.5, 1e-3)
    soundfile.write(tmp_path / "b.wav", np.stack([sine(440), 0 * sine(440)], 1), RATE, "FLOAT")
    assert near(m.load_audio(tmp_path / "b.wav", RATE, 0.1, 0.2), sine(440)[1600:4800] / 2)
    with pytest.raises(ValueError, match="c.wav.*finite"):
        m.save_audio(tmp_path / "c.wav", sine(440) / 0, RATE)
    for a, b in ((8000, 16_000), (44_100, 16_000), (22_050, 48_000)):
        out = m.resample(0.5 * sine(440, a // 2, a), a, b)
        assert near((out - 0.5 * sine(440, b // 2, b))[b // 8:3 * b // 8], 0, 5e-3)
    for name in [*bad_files(tmp_path), "missing.wav"]:
        with pytest.raises(ValueError, match=name):
            m.load_audio(tmp_path / name, RATE)

def test_pluck():
    """The first harmonic's line lies within a cent of the pitch; harder is louder."""
    for pitch in range(40, 77, 4):
        note = m.pluck(pitch, 100, 4.0, RATE, seeded(pitch))
        lines = torch.fft.rfft(note * torch.hann_window(len(note)), n=2 ** 20).abs()
        first = lines[:round(1.5 * hertz(pitch) * 2 ** 20 / RATE)].argmax() * RATE / 2 ** 20
        assert near(1200 * math.log2(first / hertz(pitch)), 0, 1)
    hard, soft = (m.pluck(60, velocity, 0.5, RATE, seeded()) for velocity in (127, 30))
    assert near([soft.abs().max(), hard.abs().max()], [0.1 + 0.8 * 30 / 127, 0.9], 0.05)
    assert hard[[0, -1]].abs().max() < 0.01                # no click

def test_pitch_track():
    """Within 10 cents of harmonics 1 to 8, 2 to 8, a sine; 0: silence, noise, 5 Hz, -53 dB."""
    for pitch in range(36, 89, 4):
        parts = [sine(k * hertz(pitch)) / k for k in range(1, 9) if k * hertz(pitch) < 7500]
        for sound in (sum(parts), sum(parts[1:]), parts[0]):
            assert near(heard(0.3 * sound), pitch, 0.1)
    hard = torch.stack([torch.zeros(8000), sine(440), 0.3 * normal32(8000), sine(5), sine(440)])
    hard[[1, 4], 2048:] *= 10 ** (torch.tensor([[-53], [-47]]) / 20)
    assert m.pitch_track(hard, RATE, 256)[:, 12:28].count_nonzero(1).tolist() == [0, 0, 0, 0, 16]
    assert near(heard(0.4 * sine(hertz(48)) + sine(hertz(60))), 48, 0.1)   # r = 0.72 at 60
    assert near(heard(sine(440) + 0.45 * normal32(8000)), 69, 0.3)         # r = 0.71
    assert m.envelope(torch.tensor([[1, -3, 2, 0.5, 4]]), 2).tolist() == [[3, 2, 4]]
    track = torch.tensor([[0, 60.0, 60, 75], [0] * 4])
    assert m.note_pitch(track).nan_to_num(-1).tolist() == [60, -1]

@pytest.mark.parametrize("decibels", [0, 10, 20])
def test_periodicity_is_the_harmonic_share(decibels):
    """10 log10(r / (1 - r)) of a sine in white noise is the ratio of their powers, within 1 dB."""
    noise = normal32(4 * RATE) * math.sqrt(0.5 / 10 ** (decibels / 10))
    _, r = m.periodicity((sine(220, 4 * RATE) + noise)[None], RATE, 256, low=45)
    share = r[0, 20:-20].mean()
    assert near(10 * (share / (1 - share)).log10(), decibels, 1)

def test_snake():
    """a = 1: f(-1, 0.5, 1, 2) (published); the slope is 1 + sin(2 a x), here for a = 0.7."""
    snake = m.Snake(1)
    x = torch.tensor([[[-1.0, 0.5, 1.0, 2.0]]], requires_grad=True)
    assert near(snake(x), [-0.291927, 0.729849, 1.708073, 2.826822])
    nn.init.constant_(snake.log_omega, math.log(0.7))
    snake(x).sum().backward()
    assert near(x.grad, 1 + torch.sin(1.4 * x))

def small_vae(**given):
    torch.manual_seed(0)
    return m.SnakeVAE(8000, channels=4, width=8, **given)

@pytest.mark.parametrize("strides, hop", [((16, 4, 4), 256), ((2, 3, 5), 30)])
def test_snake_vae(strides, hop):
    """ceil(T / hop) frames of 4 channels for any T; silence is finite."""
    vae = small_vae(strides=strides)
    for T in (1, hop - 1, hop, hop + 1, 1000):
        mean, log_variance = vae.posterior(torch.zeros(2, T))
        assert mean.shape == log_variance.shape == (2, 4, math.ceil(T / hop))
        latents = vae.encode(torch.zeros(2, T))
        assert vae.decode(latents).shape == (2, hop * mean.shape[2])
        assert vae.decode(latents).isfinite().all()

def test_snake_vae_level_and_gradients():
    """20 dB down: the last channel falls by ln 10, the output by 20 dB. Fading is levelled."""
    vae = small_vae()
    audio = normal32(1, 1000).requires_grad_()
    latents = vae.encode(audio)
    out = vae.decode(latents)
    (out.abs().mean() + vae.posterior(audio)[1].square().mean()).backward()
    assert all(p.grad.abs().sum() > 0 for p in [audio, *vae.parameters()])
    soft = vae.encode(audio / 10)
    assert near(soft[:, :-1], latents[:, :-1])
    assert near(soft[:, -1], latents[:, -1] - math.log(10))
    assert near(vae.decode(soft), out / 10)
    fade = 10 ** -torch.linspace(0, 1, 20_000)
    sound = fade * normal32(1, 20_000)
    flat, level = vae.levelled(sound)
    assert near(level[0, 40], sound[0, 33 * 256:48 * 256].square().mean().sqrt())  # of 15 hops
    assert near(flat.unflatten(1, (5, -1)).square().mean(2), 1, 0.2)
    assert near((level[0, 70] / level[0, 10]).log(), -60 / 78 * math.log(10), 0.2)
    assert near(vae.levelled(vae.decode(vae.encode(flat * fade)))[1] / level, 1, 0.3)
    latents = vae.encode(sound).repeat(2, 1, 1)
    latents[1, -1, 40] += 1                                # one frame's error: a fifth in five
    assert near((vae.decode(latents)[1] / vae.decode(latents)[0])[10_400].log(), 0.2, 1e-3)

def test_kl_divergence():
    """The mean of N(1, 1): 0.5 nats, and of N(0, e^2): (e^2 - 3) / 2."""
    found = m.kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert near(found, (0.5 + (math.e ** 2 - 3) / 2) / 2)

def test_stft_loss():
    """0 for equals; half as loud: 1/2 + ln 2; items do not touch; finite at any length."""
    sound = 100 * normal32(1, 8000)
    batch = torch.cat([sound, 0.1 * sound, 0 * sound])
    each = [m.stft_loss(item / 2, item) for item in batch[:, None]]
    assert m.stft_loss(sound, sound) == 0
    assert near(each[0], 0.5 + math.log(2), 0.02)
    assert near(m.stft_loss(batch / 2, batch), sum(each) / 3)
    r = m.stft(sound, 512).abs() / 0.01                    # to silence: the floor stands for it
    wanted = r.square().mean() ** 0.5 + r.log1p().mean()
    assert near(m.stft_loss(sound, 0 * sound, (512,)), wanted, 1e-3)
    for odd in (0 * sound, torch.zeros(1, 10), torch.ones(2, 1)):
        estimate = odd.clone().requires_grad_()
        m.stft_loss(estimate, odd).backward()
        assert estimate.grad.isfinite().all()
    assert near(m.stft(sine(1000)[None], 1024)[0, 64, 15].abs(), 1, 1e-3)      # line 64 of 15.6 Hz

def test_adversarial_losses():
    """1/2 + 1/2; -mean(-2, 0) = 1; (|4 - 3|/4 + |2 - 3|/2)/2 = 0.375, and real maps are targets."""
    real = torch.tensor([2.0, 0.0])
    assert m.hinge_discriminator_loss(real, -real) == m.hinge_generator_loss(-real) == 1
    four, two, three = (torch.full((2, 2), v, requires_grad=v != 3) for v in (4.0, 2.0, 3.0))
    loss = m.feature_matching_loss([four, two], [three, three])
    assert near(loss, 0.375)
    assert not loss.requires_grad
    judge = m.STFTDiscriminator()
    seen = []
    judge.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].norm()))
    assert not near(judge(-sine(440)[None])[0], judge(sine(440)[None])[0], 1e-4)       # phases
    judge(16 * sine(440)[None])
    assert near(seen[2] / seen[0], 4, 0.04)                # the root of the level

def test_loss_balancer():
    """|x - 1| and 100 |x + 1| pull at 0 with 99, balanced with 0; 1 : 3 are shares 1/4, 3/4."""
    latent = torch.zeros(1, 1, requires_grad=True)
    x = 2 * latent
    losses = {"a": (x - 1).abs().sum(), "b": 100 * (x + 1).abs().sum()}
    balancer = m.LossBalancer({"a": 1, "b": 1})
    balancer.backward(losses, x, free={"kl": 7 * latent.sum()})
    assert near(latent.grad, 7)
    x = torch.zeros(2, 3, requires_grad=True)
    balancer = m.LossBalancer({"a": 1, "b": 3}, total_norm=2.0)
    balancer.backward({"a": x.sum(), "b": (torch.tensor([[1.0], [1000.0]]) * x).sum()}, x)
    assert near([balancer.shares["a"], balancer.shares["b"]], [0.25, 0.75])
    a = 2 * 0.25 / 3 ** 0.5
    b = 2 * 0.75 / (500.5 * 3 ** 0.5)                      # over the mean of the items' norms
    assert near(x.grad[:, 0], [a + b, a + 1000 * b])

def test_loss_balancer_running_mean():
    """Slopes 1, 3, 3 with decay 1/2: bias-corrected means 1, 7/3, 19/7; a state goes on."""
    state = m.LossBalancer({"a": 1}).state_dict()
    for slope, mean in ((1, 1), (3, 7 / 3), (3, 19 / 7)):
        x = torch.zeros(1, 1, requires_grad=True)
        balancer = m.LossBalancer({"a": 1}, ema_decay=0.5)
        balancer.load_state_dict(state)
        balancer.backward({"a": slope * x.sum()}, x)
        state = balancer.state_dict()
        assert near(x.grad, slope / mean)

def test_built_in_data():
    """A seed repeats; the last sixth, 4 of 24, is held out; notes are on semitones, as labelled."""
    for kind in (m.Plucks, m.Melodies):
        data, again, other = (kind(24, seed, seconds=1.0) for seed in (0, 0, 1))
        assert torch.equal(data[5], again[5])
        assert not torch.equal(data[5], other[5])
        assert data.valid.tolist() == [False] * 20 + [True] * 4
        track = torch.cat([m.pitch_track(data[i][None], RATE, 256)[0] for i in range(8)])
        off = (track - track.round())[track > 0].abs()
        assert (off < 0.1).float().mean() > 0.85           # but between notes
    assert near(heard(m.Plucks(24)[23]), 40 + 23, 0.05)
    assert m.Plucks(60, seconds=0.1).labels[:, 1].unique().tolist() == [25, 50, 75, 100, 125]

def write_note(path, seconds=0.3, pitch=60, rate=RATE):
    path.parent.mkdir(exist_ok=True, parents=True)
    m.save_audio(path, m.pluck(pitch, 100, seconds, rate, seeded(pitch)), rate)

def test_audio_folder_takes_what_is_sound(tmp_path, capsys):
    """wav, aiff, opus; nothing hidden; links to folders and what is bad are named."""
    root = tmp_path / "data"
    for name in ("a.wav", "b.aiff", "c.mp3", "in/d.WAV", "._e.wav", ".hidden/f.wav"):
        write_note(root / name)
    write_note(tmp_path / "else" / "i.wav")
    soundfile.write(root / "h.opus", np.zeros(16_000), RATE, "OPUS", format="OGG")
    for name, target in (("link", "else"), ("loop", "data")):
        (root / name).symlink_to(tmp_path / target)
    (root / "take.mid").write_bytes(b"MThd")
    bad = bad_files(root)
    os.truncate(root / "c.mp3", 1100)                      # its header goes on to claim 0.3 s
    data = m.AudioFolder(root, seconds=0.1)
    assert {p.name for p, _ in data.pieces} == {"a.wav", "b.aiff", "c.mp3", "d.WAV", "h.opus"}
    assert all(len(data[i]) == 1600 for i in range(len(data)))
    said = capsys.readouterr().out
    assert all(name in said for name in [*bad, "link", "loop", "take.mid"])

def test_audio_folder_cuts_sounds_of_one_length(tmp_path):
    """1 s in sounds of 0.4 s: from 0, 0.2, 0.4, 0.6 s; 0.3 s is padded with silence."""
    ramp = torch.arange(16_000) / 16_000
    soundfile.write(tmp_path / "long.wav", ramp.numpy(), RATE, "FLOAT")
    write_note(tmp_path / "note.wav", 0.3)
    data = m.AudioFolder(tmp_path, seconds=0.4)
    *cuts, padded = (data[i] for i in range(len(data)))
    assert near(torch.stack(cuts), ramp.unfold(0, 6400, 3200), 1e-4)
    assert padded[4800:].tolist() == [0] * 1600
    assert m.AudioFolder(tmp_path, 8000)[1].shape == (8000,)

def test_audio_folder_labels_and_holds_out(tmp_path):
    """NSynth's names give labels; folders -valid are held out, else 5 of 82 at random."""
    for name in ("n-train/guitar_acoustic_004-071-025", "n-train/bass_000-030-127",
                 "n-valid/guitar_acoustic_009-050-100"):
        write_note(tmp_path / f"{name}.wav")
    data = m.AudioFolder(tmp_path)
    assert data.sources == ["bass", "guitar_acoustic"]
    assert data.labels.tolist() == [[30, 127, 0], [71, 25, 1], [50, 100, 1]]
    assert data.valid.tolist() == [False, False, True]
    for i in range(80):
        shutil.copy(data.pieces[0][0], tmp_path / "n-train" / f"{i}.wav")
    held = m.AudioFolder(tmp_path / "n-train").valid
    assert held.sum() == 5
    assert held.nonzero().diff(dim=0).max() > 5            # not neighbours

def test_download_nsynth(tmp_path):
    """The right checksum unpacks, once, and not out of its folder; a wrong one leaves nothing."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("nsynth-guitar-train/a.mp3", "note")
        bundle.writestr("../../evil.txt", "evil")
    digest = hashlib.sha256((tmp_path / "a.zip").read_bytes()).hexdigest()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}/a.zip"
        with pytest.raises(ValueError, match="a.zip"):
            m.download_nsynth(tmp_path / "bad", url, f"{0:064}")
        notes = m.download_nsynth(tmp_path / "in" / "data", url, digest)
        web.shutdown()
    assert m.download_nsynth(tmp_path / "in" / "data", url, digest) == notes           # no server
    assert list((tmp_path / "bad").iterdir()) == []
    assert (notes / "nsynth-guitar-train" / "a.mp3").read_text() == "note"
    assert list(tmp_path.rglob("evil.txt")) == [notes / "evil.txt"]

def test_music2latent(tmp_path, monkeypatch):
    """The real package, random weights: 4096 L + 1536 samples are L frames, fewer are less."""
    import music2latent.models
    package = tmp_path / "music2latent"
    shutil.copytree(pathlib.Path(music2latent.__file__).parent, package,
                    ignore=shutil.ignore_patterns("models"))
    (package / "models").mkdir()
    weights = package / "models" / "music2latent.pt"
    torch.save({"gen_state_dict": music2latent.models.UNet().state_dict()}, weights)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("music2latent")]:
        monkeypatch.delitem(sys.modules, name)
    codec = m.Music2Latent()
    sound = 0.1 * normal32(2, 3 * 4096 + 1536)
    z = codec.encode(sound)
    assert near(codec.encode(sound[1:]), z[1:], 1e-4)      # a batch equals single sounds
    shapes = [codec.encode(x).shape for x in (sound, sound[:, :9], sound[:, 1:])]
    assert shapes == [(2, 64, 3), (2, 64, 1), (2, 64, 2)]
    both = codec.decode(z[:, :, :1])
    assert both.shape == (2, 4096 + 1536)
    torch.manual_seed(1)                                   # the decoder's noise is its own
    assert near(codec.decode(z[1:, :, :1]), both[1:])
    weights.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="does not load.*put.*music2latent/models"):
        m.Music2Latent()

def test_curves():
    """MIDI 72 at 0.25; notes of 2.5 frames; 40 of 60 frames as asked; half as loud: 6.02 dB."""
    two = torch.stack([0.25 * sine(hertz(72)), torch.zeros(8000)])
    curves = m.measure_curves(two, RATE, 100)[:, :, 20:60].mean(2)
    assert near(curves, [[0.25, 1], [0, -5]], 0.01)
    played = torch.tensor([[[0.8, 0.4, 0.2, 0.1, 9, 9], [0.0] * 4 + [-5.0] * 2]])  # halves
    curves = m.melody_curves([72, None, 60], 2.5, played)
    assert near(curves[0], [0.56, 0.28, 0, 0, 0, 0.56, 0.28, 0.14])
    assert curves[1].tolist() == [1, 1, -5, -5, -5, 0, 0, 0]
    codec = m.SnakeVAE(RATE, strides=(4, 5, 5), width=1)
    asked = torch.tensor([1, 0.9, -5]).repeat_interleave(torch.tensor([40, 20, 20]))
    cond = {"controls": torch.stack([torch.arange(80) / 80, asked])[None]}
    found = m.describe(sine(hertz(72))[None] * torch.linspace(0, 1, 8000), codec, cond)
    assert near(found["envelope_correlation"], 1, 0.01)
    assert near(found["voiced_within_50_cents"], 2 / 3, 0.03)
    noise = normal32(1, 8000)
    assert near(m.describe(noise / 2, codec, {}, noise)["spectral_distance_db"], 6.02, 0.05)

class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)
def test_checkpoints(tmp_path, monkeypatch):
    """What goes in comes out; code in a file is refused, not run; what is bad is named."""
    monkeypatch.chdir(tmp_path)
    m.save_checkpoint("a.pt", step=3, weights=torch.arange(3))
    assert same(m.load_checkpoint("a.pt"), {"step": 3, "weights": torch.arange(3)})
    torch.save({"step": Evil()}, "evil.pt")
    pathlib.Path("junk.pt").write_text("junk")
    for name in ("evil.pt", "junk.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name):
            m.load_checkpoint(name)
    assert not os.path.exists("ran")

def test_encode_all(tmp_path):
    """Standardised by mean and std of the training part; pairs of held-out sounds travel along."""
    data = m.Plucks(24, seconds=0.25)
    data.audio[data.valid] += 100                          # would spoil the statistics
    codec = small_vae(strides=(4, 5, 5))                   # frames of 100 samples
    codec.sample_rate = RATE
    state = m.encode_all(codec, data, tmp_path / "a.pt", "control", batch=5)
    latents = codec.encode(data.audio)
    mean = latents[:20].mean((0, 2))[:, None]
    std = latents[:20].std((0, 2))[:, None].clamp_min(0.01)
    assert near(state["facts"]["mean"], mean)
    assert near(state["facts"]["std"], std)
    assert near(state["x"][:20], (latents[:20] - mean) / std, 1e-3)
    curves = m.measure_curves(data.audio, RATE, 100)
    curves[:, 0] /= curves[:20, 0].max()                   # the loudest frame is 1
    assert near(state["cond"]["controls"], curves)
    assert sorted(state["a"].tolist() + state["b"].tolist()) == [20, 21, 22, 23]
    assert torch.equal(state["real"], data.audio[state["b"]])
    assert same(m.load_checkpoint(tmp_path / "a.pt"), state)

def test_learning_rate_and_warm_average():
    """1/60 of the peak, 1/2, 1, 1/2, 0. Averages: 1 - 2/6, 1 - 2/6 3/7; at most 0.998."""
    rates = [m.learning_rate(step, 1000, 1.0) for step in (0, 29, 500, 750, 1000)]
    assert near(rates, [1 / 60, 0.5, 1, 0.5, 0])
    average = [torch.zeros(1)]
    for value, count, mean in ((1, 1, 2 / 3), (1, 2, 6 / 7), (0, 10 ** 6, 0.998 * 6 / 7)):
        m.warm_average(average, [torch.full((1,), float(value))], torch.tensor(count))
        assert near(average[0], mean)

def read_log(folder):
    return {row[2]: float(row[3]) for row in csv.reader((folder / "log.csv").open())}

@pytest.mark.parametrize("rows, columns", [(4, 3), (3, 4)])
def test_muon(rows, columns):
    """A kernel of 4 x 3 moves by 0.2 sqrt(4) lr times the gradient with its singular values put
    through two polynomials; then by 0.045 of this gradient + 0.0975 of the next. A bias: by lr."""
    left, right = (torch.linalg.qr(normal32(n, 3)).Q for n in (rows, columns))
    first, second = torch.tensor([[1.0, 2, 3], [3, 1, 1]])
    net = nn.Conv1d(1, rows, columns)
    muon = m.Muon(net, 0.01)
    for gradient, values in ((first, first), (second, 0.045125 * first + 0.0975 * second)):
        values = values / values.norm()
        for a, b, c in ((8.287, -23.60, 17.30), (4.107, -2.948, 0.5448)):
            values = a * values + b * values ** 3 + c * values ** 5
        wanted = [net.weight[:, 0] - 0.004 * left * values @ right.T, net.bias - 0.01]
        net.weight.grad = (left * gradient @ right.T)[:, None]
        net.bias.grad = torch.ones(rows)
        muon.step()
        assert near(net.weight[:, 0], wanted[0])
        assert near(net.bias, wanted[1])

def test_muon_takes_96_rows_at_a_time():
    """What follows the 96th row steps as it would alone: a block of 96 and one of 3."""
    nets = [nn.Conv1d(1, n, 4, bias=False) for n in (195, 99)]
    for net in nets:
        nn.init.zeros_(net.weight)
        net.weight.grad = normal32(195, 1, 4)[-len(net.weight):]
        m.Muon(net, 0.01).step()
    assert near(nets[0].weight[96:], nets[1].weight)

def test_fit(tmp_path):
    """A slope of 1000 is clipped to 1: Adam's moment is 0.1, the first step -rate/60. No NaN."""
    net = nn.Embedding(1, 1)
    nn.init.zeros_(net.weight)
    def learn(step, slope=1000.0):
        (slope * net.weight.sum()).backward()
        return {"loss": torch.tensor(slope)}
    given = (1e-3, seeded(), None)
    average = m.fit("it", net, learn, 1, tmp_path / "a.pt", *given)
    assert near(net.weight * 1e3, -1 / 60)
    assert torch.equal(average.weight, net.weight)
    moment = m.load_checkpoint(tmp_path / "a.pt")["optimiser"]["state"][0]["exp_avg"]
    assert near(moment, 0.1, 1e-4)
    assert read_log(tmp_path) == {"loss": 1000, "gradient norm": 1000}
    with pytest.raises(ValueError, match="not finite at step 1.*--lr"):
        m.fit("it", net, partial(learn, slope=math.nan), 1, tmp_path / "b.pt", *given)
    assert not (tmp_path / "b.pt").exists()

def test_drop_conditions():
    """Each of 2 stays with 0.9^2 = 0.81; all go with 0.1 + 0.9 0.1^2 = 0.109; curves go whole."""
    cond = {"labels": torch.ones(40_000, 2).long(), "controls": torch.ones(40_000, 2, 3)}
    kept = m.drop_conditions(cond, seeded())
    assert near((kept["labels"] == 1).float().mean(), 0.81, 0.01)
    assert near((kept["labels"] < 0).all(1).float().mean(), 0.109, 0.005)
    gone = kept["controls"].isnan()
    assert near(gone.float().mean(), 0.19, 0.01)
    assert torch.equal(gone.all(2), gone.any(2))

class Watched(m.RectifiedFlow):
    """Rectified flow that notes what it is given."""
    def loss(self, net, x, generator=None, reduce=True, **cond):
        self.seen = [*getattr(self, "seen", []), (x, cond["labels"])]
        return super().loss(net, x, generator, reduce, **cond)
def learn_latents(path, steps, flow):
    torch.manual_seed(0)
    x = normal32(20, 2, 4)
    cond = {"labels": torch.arange(40).reshape(20, 2), "controls": normal32(20, 1, 4, seed=1)}
    net = m.UNet1d(2, 8, (1,), (40, 40), 1, heads=1)
    m.train_diffusion(net, flow, x, cond, torch.arange(20) >= 15, steps, path, batch_size=4)
    return x

def test_train_diffusion(tmp_path):
    """Trained on 15 of 20, 0.19 of the labels withheld."""
    flow = Watched()
    x = learn_latents(tmp_path / "model.pt", 100, flow)
    trained, labels = map(torch.cat, zip(*flow.seen))
    assert len(trained) == 400
    assert all((item == x[:15]).all((1, 2)).any() for item in trained)
    assert near((labels == -1).float().mean(), 0.19, 0.06)

def test_resume_is_never_having_stopped(tmp_path, monkeypatch):
    """2 steps and 2 more equal 4 at a constant rate, bit for bit: model and codec."""
    monkeypatch.setattr(m, "learning_rate", lambda step, steps, peak: peak)
    audio = m.Plucks(12, seconds=0.25).audio
    for name, steps in (("one", 4), ("two", 2), ("two", 4)):
        learn_latents(tmp_path / f"{name}.pt", steps, Watched())
        m.train_codec(small_vae(), audio, steps, tmp_path / name, blur=0, adversarial_from=1)
    for one, two in (("one", "two"), ("one.pt", "two.pt")):
        assert same(m.load_checkpoint(tmp_path / one), m.load_checkpoint(tmp_path / two))

def test_train_codec_blurs_and_balances(tmp_path):
    """Blur 3: ten times the variance; half-way 1 + 1.5^2. After silent halves, a batch without: its
    shares are about the weights."""
    audio = m.Plucks(12, seconds=0.5).audio
    seen = []
    for blur in (0.0, 3.0):
        codec = small_vae()
        codec.decoder.register_forward_pre_hook(lambda _, z: seen.append(z[0].var((0, 2)).sum()))
        m.train_codec(codec, audio, 2, tmp_path / f"{blur}.pt", crop=2048, blur=blur)
    assert near([(seen[2] / seen[0]).item(), (seen[3] / seen[1]).item()], [10, 3.25], 1.0)
    for sounds, steps in ((audio * (torch.arange(8000) > 4000), 12), (audio, 13)):
        m.train_codec(small_vae(), sounds, steps, tmp_path / "codec.pt", crop=2048)
    shares = [read_log(tmp_path)[f"{name} share"] for name in ("l1", "l2", "stft")]
    assert shares == pytest.approx([0.25, 0.25, 0.5], rel=0.33)        # of step 13

def test_frechet_distance():
    """N(0,1) to N(1,1): 1; to N(0,4): 1; to itself: 0; 2-D: by the eigenvalues of C1 C2."""
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    assert near([m.frechet_distance(x, y) for y in (x + 1, 2 * x, x)], [1, 1, 0])
    with pytest.raises(ValueError, match="2 rows"):
        m.frechet_distance(x, x[:1])
    a, b = normal(2, 1000, 2) @ torch.tensor([[1.2, 1.6], [-2.4, 0.6]], dtype=torch.float64)
    b = b * torch.tensor([1.0, 3.0])
    root = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    spread = a.var(0).sum() + b.var(0).sum() - 2 * root
    assert near(m.frechet_distance(a, b), (a.mean(0) - b.mean(0)).square().sum() + spread)

def wavs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.wav")}
def ask(line):
    """The exit status of a command line."""
    try:
        m.main(line.split())
        return 0
    except SystemExit as stop:
        return stop.code

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`train` on a folder of 13 notes of 0.3 s, one without labels: command to sounds."""
    top = tmp_path_factory.mktemp("work")
    for i in range(12):
        part = "notes-valid" if i % 3 == 0 else "notes"
        write_note(top / "data" / part / f"guitar_{i:03d}-{60 + i:03d}-100.wav", 0.3, 60 + i)
    write_note(top / "data" / "notes" / "unlabelled.wav")
    assert not ask(f"train --data {top}/data --run {top}/r&d --codec vae --codec-steps 4 --steps 6")
    return top / "r&d"

def test_evaluate(run):
    """Real notes are in tune; level and Frechet distance as computed here; w = 1 and 3."""
    assert ask(f"evaluate --run {run} --steps 2 --cfg 1 3 --seed 5") == 0
    found = json.loads((run / "evaluation.json").read_text())
    data = m.load_checkpoint(run / "latents.pt")
    level = 10 * data["real"].square().mean(1).log10().mean()
    a, b = (torch.cat(torch.std_mean(data["x"][data[half]], 2), 1) for half in "ab")
    assert found["pitch_accuracy_real"] == 1
    assert near(found["level_db"]["real"], level, 0.01)
    assert found["harmonics_db"]["real"] > 20
    assert near(found["frechet_floor"], m.frechet_distance(a, b), 1e-3)
    assert set(found["frechet"]) == set(found["pitch_accuracy"]) == {"1", "3"}
    assert [found[key] for key in ("count", "seed", "nfe")] == [2, 5, 3]

def test_sample(run, tmp_path):
    """A seed gives the same bytes, both --pitch are played, nothing is overwritten; defaults."""
    base = f"sample --run {run} --steps 2 --pitch 60 --pitch 64 --seed 3 --out {tmp_path}"
    assert ask(f"{base}/a") == ask(f"{base}/r&d") == 0
    before = wavs(tmp_path / "a")
    assert set(before) == {"sample_3_pitch_60.wav", "sample_4_pitch_64.wav"}
    assert before == wavs(tmp_path / "r&d")
    assert ask(f"{base}/r&d --cfg 2") == 0
    assert before.items() < wavs(tmp_path / "r&d").items()
    page = (tmp_path / "r&d" / "index.html").read_text()
    assert page.count("<audio") == page.count("<img") == 4
    assert "r&d" not in page
    assert ask(f"{base}/c --count 2 --seconds 0.5 --cfg 3 --sampler dpmpp_3m_sde") == 0
    assert len(wavs(tmp_path / "c")) == 4
    assert soundfile.info(tmp_path / "c" / "sample_3_pitch_60.wav").frames == 32 * 256
    assert m.build_parser().parse_args(["sample"]).run == "runs/plucks"

def test_sample_from_a_sound(run, tmp_path):
    """Noise 0 is the codec's round trip; 1 ignores the sound; the default does not."""
    base = f"sample --run {run} --steps 2 --out {tmp_path}"
    for name, more in (("zero", "--init-noise 0"), ("one", "--init-noise 1"), ("half", "")):
        assert ask(f"{base}/{name} --init-audio {run}/samples/real_0.wav {more}") == 0
    assert ask(f"{base}/fresh") == 0
    codec = m.Run(run).codec
    trip = codec.decode(codec.encode(m.load_audio(run / "samples/real_0.wav", RATE)[None]))[0]
    found = m.load_audio(next((tmp_path / "zero").glob("*.wav")), RATE)
    assert near(found, trip / trip.abs().max().clamp_min(1), 1e-3)
    assert wavs(tmp_path / "one") == wavs(tmp_path / "fresh") != wavs(tmp_path / "half")

def test_resume(run, tmp_path):
    """6 steps become 8, with the data named anew; 8 stay 8. A codec that has its steps is kept."""
    copy = shutil.copytree(run, tmp_path / "run")
    assert ask(f"train --run {copy} --resume --steps 8 --data {run.parent}/data/.") == 0
    assert m.load_checkpoint(copy / "model.pt")["step"] == 8
    before = [(copy / name).read_bytes() for name in ("model.pt", "log.csv")]
    assert ask(f"train --run {copy} --resume --steps 8") == 0
    assert before == [(copy / name).read_bytes() for name in ("model.pt", "log.csv")]
    codec = (copy / "codec.pt").read_bytes()
    (copy / "model.pt").unlink()
    (copy / "latents.pt").unlink()
    assert ask(f"train --run {copy} --resume --codec-steps 4 --steps 3") == 0
    assert m.load_checkpoint(copy / "model.pt")["step"] == 3
    assert (copy / "codec.pt").read_bytes() == codec

@pytest.mark.parametrize("line, word", [
    ("sample --steps 1 --out TMP --pitch 20", "note: the training had no pitch [20]"),
    ("sample --steps 1 --out TMP --seconds 3", "note: the model has learnt sounds of 0.3 s"),
    ("sample --run nowhere", "nowhere"), ("sample --run TMP", "model.pt"), ("dance", "dance"),
    ("sample --pitch 200", "0 to 127"), ("sample --pitch sixty", "sixty"), ("", "command"),
    ("sample --melody 60 r", "--condition"), ("train --lr nan", "nan"), ("train", "--resume"),
    ("sample --init-noise 0.1", "--init-audio"), ("sample --init-audio TMP/model.pt", "model.pt"),
    ("sample --melody 60 --init-audio SOUND", "without"), ("sample --steps 0", "1 to"),
    ("sample --init-audio SOUND --init-noise 7", "init_noise"), ("train --stps 3", "--stps"),
    ("train --resume --objective edm", "objective"), ("train --device mps", "mps"),
    ("train --run TMP/new --data nowhere", "expected a folder"),
    ("train --device abacus", "abacus"), ("train --run TMP/new --data TMP", "2 usable")])
def test_mistakes_are_one_line(run, tmp_path, capsys, line, word):
    """Status 2, never a traceback; the run stays as it is. What is odd but can be done is noted."""
    (tmp_path / "model.pt").write_text("junk")
    before = (run / "model.pt").read_bytes()
    line = line.replace("TMP", str(tmp_path)).replace("SOUND", f"{run}/samples/real_0.wav")
    if line[:5] in ("sampl", "train") and "--run" not in line:
        line += f" --run {run}"
    status = ask(line)
    said = capsys.readouterr()
    assert status == (0 if word.startswith("note") else 2)
    assert word in (said.err or said.out)
    assert said.err.count("\n") == status // 2
    assert (run / "model.pt").read_bytes() == before

TREE = ast.parse(pathlib.Path(m.__file__).read_text())
PIECES = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(PIECES)
LIFTS = {name: re.findall("Lifts out with: ([^.]+)", " ".join(str(ast.get_docstring(node)).split()))
         for name, node in PIECES.items()}
LIFTS |= {type(o).__name__: ["Objective, " + LIFTS["Objective"][0]] for o in (FLOW, VP, EDM)}

@pytest.mark.parametrize("name", [name for name in LIFTS if LIFTS[name]])
def test_every_piece_lifts_out(name):
    """The list is what the piece uses, and what that uses, and no more; together they run."""
    needed = {name}
    for _ in PIECES:
        needed |= set().union(*[names_in(PIECES[piece]) for piece in needed])
    assert set(LIFTS[name][0].split(", ")) - {"nothing"} == needed - {name}
    kept = [node for node in TREE.body if isinstance(node, ast.Import | ast.ImportFrom)
            or getattr(node, "name", None) in needed
            or isinstance(node, ast.Assign) and not names_in(node)]
    exec(compile(ast.Module(kept, []), name, "exec"), {"__name__": "lifted"})
