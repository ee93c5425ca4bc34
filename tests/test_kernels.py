"""The Triton kernels against PyTorch: values and gradients, on a GPU or, with TRITON_INTERPRET=1, without one. Skipped where Triton is not installed."""
import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')
import triton.language as tl
from captcha_hrnet import kernels
from captcha_hrnet.model import CaptchaKeypointNet, Context, LiteHRNet, Stem, channel_shuffle, create_lite_hrnet_18_fpn, transition

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def random(*shape): return torch.randn(*shape, device=DEVICE).requires_grad_()
def sums(y): return torch.stack([y.sum((2, 3)).t(), (y*y).sum((2, 3)).t()])   # [2, C, N]


def activated(x, scale, shift, relu):
    if scale is not None: x = x*scale[:, None, None] + shift[:, None, None]
    return F.relu(x) if relu else x


def assert_same(mine, theirs, inputs):
    "Outputs, and the gradients of a random combination of them."
    mine, theirs, inputs = [list(t) if isinstance(t, (tuple, list)) else [t] for t in (mine, theirs, [t for t in inputs if t is not None])]
    weights = [torch.randn_like(t) for t in theirs]
    slopes = [torch.autograd.grad(sum((t*w).sum() for t, w in zip(found, weights)), inputs) for found in (mine, theirs)]
    for a, b in zip([*mine, *slopes[0]], [*theirs, *slopes[1]]): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5*b.abs().max().item())


@pytest.mark.parametrize('stride, up, affine, relu, shape', [
    (1, 0, False, False, (2, 3, 8, 16)), (1, 0, True, True, (9, 2, 18, 128)), (1, 0, True, False, (3, 2, 5, 24)), (1, 0, True, True, (2, 2, 1, 2)),
    (1, 1, False, False, (65, 2, 8, 16)), (1, 2, False, False, (2, 3, 16, 32)), (1, 4, False, False, (17, 1, 32, 64)), (1, 8, False, False, (2, 3, 24, 128)),
    (1, 8, False, False, (2, 1, 8, 8)), (2, 0, True, True, (5, 2, 20, 256)), (2, 0, True, True, (2, 3, 34, 64)), (2, 0, False, False, (3, 2, 8, 16)),
    (2, 0, True, False, (2, 2, 7, 13)), (2, 2, True, True, (2, 2, 36, 32))])   # a program takes 1024/width pictures, at least 8 rows
def test_depthwise(stride, up, affine, relu, shape):
    N, C, H, W = shape
    whole, weight = random(N, C + 1, H, W), random(C, 1, 3, 3)
    x = whole[:, 1:]
    scale, shift = (random(C), random(C)) if affine else (None, None)
    gate, gate_scale, gate_shift = (random(N, C + 1, H//up, W//up)[:, :C], random(C), random(C)) if up else (None,)*3
    value = activated(x, scale, shift, relu)*(F.interpolate(torch.sigmoid(activated(gate, gate_scale, gate_shift, False)), scale_factor=up) if up else 1)
    y = F.conv2d(value, weight, stride=stride, padding=1, groups=C)
    mine, stats = kernels.Depthwise.apply(x, scale, shift, gate, gate_scale, gate_shift, weight, relu, stride)
    assert_same((mine, stats.sum(-1)), (y, sums(y)), [x, scale, shift, gate, gate_scale, gate_shift, weight])


@pytest.mark.parametrize('stride', [1, 2])
def test_sums_of_slopes_are_those_of_what_memory_keeps(stride):
    "A normalisation's gradient takes out the mean of the input's gradient as it was rounded, so scale and shift have to get the sums of that."
    x, weight, scale, shift = random(2, 2, 8, 16).detach().bfloat16().requires_grad_(), random(2, 1, 3, 3), random(2), random(2)
    y, stats = kernels.Depthwise.apply(x, scale, shift, None, None, None, weight, False, stride)
    gx, gscale, gshift = torch.autograd.grad(y, (x, scale, shift), 1 + .01*torch.randn_like(y))   # slopes alike
    slope = gx.double()/scale.double()[:, None, None]
    assert gx.dtype == torch.bfloat16
    torch.testing.assert_close(gshift.double(), slope.sum((0, 2, 3)), rtol=1e-4, atol=1e-4*slope.abs().sum().item())
    torch.testing.assert_close(gscale.double(), (slope*x.double()).sum((0, 2, 3)), rtol=1e-4, atol=1e-4*slope.abs().sum().item())


@pytest.mark.parametrize('inputs, outputs, affine', [(5, 7, False), (20, 40, True), (300, 37, False), (37, 300, True)])
def test_pointwise(inputs, outputs, affine):
    x, weight = random(2, inputs, 8, 12), random(outputs, inputs, 1, 1)
    scale, shift = (random(inputs), random(inputs)) if affine else (None, None)
    mine, parts = kernels.Pointwise.apply(x, scale, shift, weight, affine)
    y = F.conv2d(activated(x, scale, shift, affine), weight)
    assert_same((mine, parts.sum(-1)), (y, sums(y).sum(-1)), [x, scale, shift, weight])


@pytest.mark.parametrize('outputs, affine', [(1, True), (4, True), (2, False)])
def test_head(outputs, affine):
    x, weight, bias = random(3, 20, 8, 12), random(outputs, 20, 1, 1), random(outputs)
    scale, shift = (random(20), random(20)) if affine else (None, None)
    assert_same(kernels.Head.apply(x, scale, shift, weight, bias, affine), F.conv2d(activated(x, scale, shift, affine), weight, bias), [x, scale, shift, weight, bias])


def test_readers_of_one_map():
    "Each kernel adds the next reader's gradient to its own."
    conv = lambda *size, **options: torch.nn.Conv2d(*size, bias=False, **options).to(DEVICE)
    chains, x = [[conv(6, 5, 1)], [conv(6, 6, 3, stride=2, padding=1, groups=6)], [torch.nn.Identity()], [conv(6, 6, 3, padding=1, groups=6), conv(6, 3, 1)]], random(2, 6, 8, 16)
    *mine, last = *(found := kernels.readers(chains, x, more=True))[0], found[1]
    weights = [p for chain in chains for layer in chain for p in layer.parameters()]
    assert_same([*[y.raw for y in mine], last], [*[torch.nn.Sequential(*chain)(x) for chain in chains], x], [x, *weights])


@pytest.mark.parametrize('stride, height, width', [(2, 16, 24), (2, 7, 9), (1, 5, 8)])
def test_dense(stride, height, width):
    x, weight = random(3, 4, height, width).detach(), random(20, 4, 3, 3)
    mine, stats = kernels.Dense.apply(x, weight, stride)
    y = F.conv2d(x, weight, stride=stride, padding=1)
    assert_same((mine, stats.sum(-1)), (y, sums(y).sum(-1)), [weight])


def test_normalise():
    x, gamma, beta = random(3, 5, 8, 8), random(5), random(5)
    ours, theirs = (torch.nn.BatchNorm2d(5).to(DEVICE) for _ in range(2))
    raw, stats = kernels.Sums.apply(x)
    mine = activated(raw, *kernels.Normalise.apply(stats, gamma, beta, ours, 3*64), False)
    assert_same(mine, F.batch_norm(x, theirs.running_mean, theirs.running_var, gamma, beta, True, .1, 1e-5), [x, gamma, beta])
    for name in ('running_mean', 'running_var'): torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_halves_pooled_and_dealt_out():
    maps = [random(2, 4, 16, 32), random(2, 6, 8, 16), random(2, 8, 4, 8)]
    halves = [x[:, :x.shape[1]//2] for x in maps] + [x[:, x.shape[1]//2:] for x in maps]
    assert_same(kernels.Entry.apply(*maps), (*halves, torch.cat([F.adaptive_avg_pool2d(x, (4, 8)) for x in halves[3:]], 1)), maps)
    x, y, a, b = random(2, 6, 8, 8), random(2, 3, 8, 8), random(2, 3), random(2, 3)
    assert_same(kernels.Assemble.apply(x[:, :3], y, a, b), channel_shuffle(torch.cat([x[:, :3], y*a[..., None, None] + b[..., None, None]], 1)), [x, y, a, b])


def test_excite():
    y, scale, shift, w1, b1, w2, b2 = random(3, 6, 4, 8), random(6), random(6), random(2, 6, 1, 1), random(2), random(6, 2, 1, 1), random(6)
    means = y.mean((2, 3), keepdim=True)*scale[:, None, None] + shift[:, None, None]
    s = torch.sigmoid(F.conv2d(F.relu(F.conv2d(means, w1, b1)), w2, b2)).flatten(1)
    stats = torch.stack([y.sum(3).transpose(0, 1), (y*y).sum(3).transpose(0, 1)])   # a part for each row
    assert_same(kernels.Excite.apply(stats, scale, shift, w1, b1, w2, b2, 32), (s*scale, s*shift), [y, scale, shift, w1, b1, w2, b2])


def test_sums_of_maps():
    same, half, quarter, other = random(2, 3, 16, 16), random(2, 3, 8, 8), random(2, 3, 4, 4), random(2, 3, 16, 16)
    p = [random(3) for _ in range(6)]
    large = lambda x, by: F.interpolate(x, scale_factor=by)
    total = 2*same + large(activated(half, *p[:2], False), 2) + large(activated(quarter, *p[2:4], False), 4) + activated(other, *p[4:], False)
    mine = kernels.Add.apply((1, 2, 4, 1), False, True, True, True, same, None, None, half, *p[:2], quarter, *p[2:4], other, *p[4:])
    assert_same(mine, (total, F.relu(total)), [same, half, quarter, other, *p])
    assert_same(kernels.Add.apply((1,), True, False, False, False, other, *p[:2]), activated(other, *p[:2], True), [other, *p[:2]])


@pytest.mark.parametrize('height, width', [(4, 8), (1, 1)])
def test_blend(height, width):
    fine, coarse, share = random(2, 3, 2*height, 2*width), random(2, 3, height, width), random(2)
    assert_same(kernels.Blend.apply(fine, coarse, share), share[0]*fine + share[1]*F.interpolate(coarse, scale_factor=2, mode='bilinear'), [fine, coarse, share])


def test_order_of_memory(monkeypatch):
    "cuDNN answers weights in channels-last order with such maps; the kernels read NCHW."
    monkeypatch.setattr(kernels, 'BIG', 0)   # all 1×1 convolutions are a library's, as the widest are
    layers = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 1, bias=False), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), torch.nn.BatchNorm2d(6),
                                 torch.nn.Conv2d(6, 5, 1, bias=False), torch.nn.BatchNorm2d(5)).to(DEVICE)
    x, found, slope = random(2, 4, 8, 16), [], random(2, 5, 8, 16).detach()
    for memory in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(layers).to(memory_format=memory)
        y = kernels.ready(kernels.run(model, x))
        found.append([y, *torch.autograd.grad(y, [x, *model.parameters()], slope), *[b for b in model.buffers() if b.is_floating_point()]])
    truth = layers(x)
    found.append([truth, *torch.autograd.grad(truth, [x, *layers.parameters()], slope), *[b for b in layers.buffers() if b.is_floating_point()]])
    for first, *others in zip(*found):
        for other in others: torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def narrow_network():
    "A narrow stem, one block and one fusion of two branches, neck and heads: Triton's interpreter is slow."
    backbone = LiteHRNet((1,), (8, 8))
    backbone.stem, backbone.transition0 = Stem(4, 8), transition([8], [8, 8])
    backbone.stage0[0].layers = backbone.stage0[0].layers[:1]
    for i in (1, 2):
        backbone.add_module(f'transition{i}', torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()]))
        backbone.add_module(f'stage{i}', torch.nn.Sequential())
    model = CaptchaKeypointNet(backbone, neck_channels=4, head_channels=2)
    model.context = Context([8, 8], 1, width=16, layers=1)
    return model


def errors_of_a_step(kind: torch.dtype, seed: int) -> dict[str, tuple[float, float, float]]:
    "Outputs, gradients and running statistics of a training step: how far the kernels' and PyTorch's are from float64's, relative to their norm; that norm."
    torch.manual_seed(seed)
    exact = (create_lite_hrnet_18_fpn({'context': 'stride16'}) if torch.cuda.is_available() else narrow_network()).double().train().to(DEVICE)
    for layer in exact.heads['offsets'].out, exact.context.leave: torch.nn.init.normal_(layer.weight, std=.3)
    eager, mine = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    image, found = torch.rand(2, 4, *((64, 64) if torch.cuda.is_available() else (32, 32)), device=DEVICE), []
    for model, forward in (exact, exact), (mine, lambda image: kernels.forward(mine, image, kind)), (eager, eager):
        with torch.autocast(DEVICE, kind, enabled=model is eager and kind != torch.float32): outputs = forward(image.to(next(model.parameters()).dtype))
        torch.manual_seed(1)
        sum((outputs[name]*torch.randn(outputs[name].shape).to(outputs[name])).sum() for name in model.heads).backward()
        found.append({**{name: outputs[name] for name in model.heads}, **{f'gradient of {name}': p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())})
    distance = lambda a, b: ((a.double() - b).norm()/(b.double().norm() + 1e-3)).item()   # a shift before a normalisation has no gradient but noise
    return {name: (*(distance(other[name], value) for other in found[1:]), value.norm().item()) for name, value in found[0].items() if value.is_floating_point()}


def test_network():
    "As close to float64 as PyTorch's own float32 comes."
    errors = errors_of_a_step(torch.float32, 0)
    allowed = 1e-2 if torch.cuda.is_available() else 1e-3   # of the larger network there, one value next to 0 that a ReLU lets pass, or not, is 0.6 % of a gradient
    assert not {name: each for name, each in errors.items() if each[0] > allowed + 10*each[1]}


@pytest.fixture
def bfloat16_as_on_a_gpu(monkeypatch):
    "Triton's interpreter cuts float32 off to bfloat16 instead of rounding it, and multiplies matrices of bfloat16 by their bits, as if they were integers."
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    def rounded(self, x, kind):
        if (x.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16): return cast(self, x, kind)
        return TensorHandle(torch.from_numpy(x.data.copy()).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
    def exact(x): return TensorHandle((x.data.astype('uint32') << 16).view('float32'), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
    monkeypatch.setattr(InterpreterBuilder, 'cast_impl', rounded)
    monkeypatch.setattr(InterpreterBuilder, 'create_dot', lambda self, a, b, *rest: dot(self, exact(a), exact(b), *rest))


def test_network_in_bfloat16(bfloat16_as_on_a_gpu):
    "As close to float64 as PyTorch's autocast comes, up to half as far again: each output, and gradients and running statistics on the average of two networks."
    steps = [errors_of_a_step(torch.bfloat16, seed) for seed in (1, 2)]
    average = lambda kind, part: sum(errors[kind] for step in steps for name, errors in step.items() if part in name and errors[2] > 1e-2)
    for step in steps: assert not {name: step[name] for name in ('gap_heatmap', 'slider_heatmap', 'offsets') if step[name][0] > 1e-3 + 1.5*step[name][1]}
    for part in 'gradient', 'running': assert 0 < average(0, part) <= 1.5*average(1, part)


AHEAD = '''
import torch, triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class H100:
    "What Triton asks a GPU for; it can launch nothing."
    def get_current_target(self): return GPUTarget('cuda', 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(H100())
from captcha_hrnet import kernels

layers, x = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()), torch.zeros(2, 16, 8, 16)
def step(): kernels.ready(kernels.run(layers, x)).sum().backward()
found = kernels.compile_ahead(step)
lying = {(name, key) for name, kernel in vars(kernels).items() if isinstance(kernel, triton.JITFunction) for cache in kernel.device_caches.values() for key in cache[0]}
assert triton.knobs.runtime.jit_cache_hook is None
print(found, len(lying), *sorted({name for name, _ in lying}))
'''


def test_what_a_step_launches_is_compiled_ahead(tmp_path):
    "For a GPU that is not there: everything that the step asks for lies ready, compiled, and nothing was launched."
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'} | dict(TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', AHEAD], capture_output=True, text=True, env=environment, timeout=240)
    assert not done.returncode, done.stderr
    compiled, lying, *names = done.stdout.split()
    assert compiled == lying and {'_pointwise_forward', '_pointwise_backward', '_normalise_forward', '_normalise_backward'} <= set(names), done.stdout
    assert len([*tmp_path.rglob('*.cubin')]) == int(compiled)
