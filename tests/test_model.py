"""What the model's notebook can't hold: parity on the stored references, damaged files, random shapes and maps."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from captcha_hrnet import model as model_module
from captcha_hrnet.config import Config, UserError, load_config
from captcha_hrnet.geometry import HeatmapCodec
from captcha_hrnet.model import (BACKBONES, CLIP, SHIPPED, SURER, TILES, UNCALIBRATED, UNSURE, CaptchaKeypointNet, Context, ContextLayer, CrossResolutionWeighting, LiteFPN, backbone_tensors,
                                 best_pair, candidate_pairs, channel_shuffle, create_backbone, create_lite_hrnet_18_fpn, dark_offset, load_model, model_table,
                                 place_codes, raised_contrast, save_weights, shipped_weights, surer_answers)
from captcha_hrnet.predict import Predictor
from captcha_hrnet.synth import CaptchaSynth, find_preset

REFERENCE = Path(__file__).parent/'data'/'reference'
PARAMETERS = {'lite_hrnet_18': 1_054_032, 'lite_hrnet_30': 1_686_980, 'naive_lite_hrnet_18': 715_708, 'rep_hrnet_18': 777_464}
DECODERS = ('offset', 'soft_argmax', 'dark')

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def weights() -> dict:
    with np.load(REFERENCE/'lite_hrnet_18.npz') as data:
        return {key.removeprefix('weights/'): torch.from_numpy(data[key]) for key in data.files if key.startswith('weights/')}


@pytest.fixture(scope='module')
def net() -> CaptchaKeypointNet:
    torch.manual_seed(0)
    return create_lite_hrnet_18_fpn({'name': 'naive_lite_hrnet_18'}).eval()


def pictures(batch=2, height=64, width=96) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 4, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def relative_error(a, b) -> float: return ((a - b).abs().max() / b.abs().max()).item()


# the backbone

@pytest.mark.parametrize('in_channels', [3, 4])
@pytest.mark.parametrize('name', ['lite_hrnet_18', 'naive_lite_hrnet_18'])
@torch.no_grad()
def test_parity_with_the_reference(name, in_channels):
    data = np.load(REFERENCE/f'{name}.npz')
    backbone = create_backbone(name, in_channels, REFERENCE/f'{name}.npz').eval()
    image = torch.from_numpy(data['input'])
    if in_channels == 4: image = torch.cat([image, torch.rand(len(image), 1, *image.shape[2:])], dim=1)
    maps = backbone(image)
    assert len(maps) == 4
    for i, found in enumerate(maps): assert relative_error(found, torch.from_numpy(data[f'branch{i}'])) <= 1e-4


@torch.no_grad()
def test_parity_in_channels_last():
    data = np.load(REFERENCE/'lite_hrnet_18.npz')
    backbone = create_backbone('lite_hrnet_18', 3, REFERENCE/'lite_hrnet_18.npz').eval().to(memory_format=torch.channels_last)
    maps = backbone(torch.from_numpy(data['input']).contiguous(memory_format=torch.channels_last))
    for i, found in enumerate(maps):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(found, torch.from_numpy(data[f'branch{i}'])) <= 1e-4


@pytest.mark.parametrize('name', BACKBONES)
def test_parameter_counts(name):
    backbone = create_backbone(name, in_channels=3)
    assert sum(p.numel() for p in backbone.parameters()) == PARAMETERS[name]
    assert sum(p.numel() for p in create_backbone(name).parameters()) == PARAMETERS[name] + (16 if name == 'rep_hrnet_18' else 32)*9


def test_batch_norms_are_the_references():
    norms = [m for m in create_backbone('lite_hrnet_18').modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 4), channels=st.lists(st.integers(8, 20), min_size=2, max_size=4))
@torch.no_grad()
def test_fixed_ratio_pools_equal_adaptive_ones(rows, columns, channels):
    weighting, last = CrossResolutionWeighting(channels, ratio=4).eval(), len(channels) - 1
    maps = [torch.randn(2, c, rows*2**(last - i), columns*2**(last - i)) for i, c in enumerate(channels)]
    pooled = torch.cat([F.adaptive_avg_pool2d(m, (rows, columns)) for m in maps], dim=1)
    slow = weighting.conv2(weighting.conv1(pooled)).split(channels, dim=1)
    for found, m, w in zip(weighting(maps), maps, slow):
        torch.testing.assert_close(found, m * F.interpolate(w, size=m.shape[2:], mode='nearest'), atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 5), each=st.integers(1, 5), height=st.integers(1, 5), width=st.integers(1, 5), last=st.booleans())
def test_channel_shuffle(groups, each, height, width, last):
    x = torch.randn(2, groups*each, height, width)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(channel_shuffle(x, groups), F.channel_shuffle(x, groups))


# weights

def test_formats_and_prefixes(weights, tmp_path):
    expected = create_backbone('lite_hrnet_18', 3, weights).state_dict()
    save_file(weights, tmp_path/'w.safetensors')
    torch.save(weights, tmp_path/'bare.pth')
    torch.save({'meta': {'epoch': 210}, 'state_dict': {f'module.backbone.{key}': value for key, value in weights.items()}
                | {'module.keypoint_head.final_layer.weight': torch.zeros(3)}}, tmp_path/'estimator.pth')
    torch.save({'state_dict': {f'_orig_mod.{key}': value for key, value in weights.items()} | {'head.final_layer.bias': torch.zeros(1)}},
               tmp_path/'compiled.pth')
    for path in sorted(tmp_path.iterdir()):
        found = create_backbone('lite_hrnet_18', 3, str(path)).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected), path


def test_own_checkpoints_fill_the_backbone(net, tmp_path):
    torch.save({'model_state_dict': net.state_dict(), 'epoch': 0}, tmp_path/'own.pth')
    backbone = create_backbone('naive_lite_hrnet_18', 4, tmp_path/'own.pth')
    assert all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), net.backbone.state_dict().values()))


def test_heads_of_the_reference_are_ignored(weights):
    assert any(key.startswith('head_layer.') for key in weights)
    assert not any(key.startswith('head') for key in backbone_tensors(weights))


def test_wrong_weights_are_refused_whole(weights):
    first = 'stem.conv1.conv.weight'
    missing = {key: value for key, value in weights.items() if key != first}
    with pytest.raises(UserError, match=f'1 missing \\({first}\\)') as error: create_backbone('lite_hrnet_18', 3, missing)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r'1 unexpected \(stem\.extra\)'):
        create_backbone('lite_hrnet_18', 3, weights | {'stem.extra': torch.zeros(1)})
    with pytest.raises(UserError, match=f'1 mis-shaped \\({first}\\)'):
        create_backbone('lite_hrnet_18', 3, weights | {first: torch.zeros(32, 5, 3, 3)})
    with pytest.raises(UserError, match='942 missing .*, …\\)'): create_backbone('lite_hrnet_30', 3, weights)


@pytest.mark.parametrize('source', [{}, {'state_dict': {}}, {'state_dict': [1, 2]}, [1, 2], 7])
def test_what_is_no_state_dict_is_refused(source):
    with pytest.raises(UserError): create_backbone('lite_hrnet_18', 3, source)


@pytest.mark.parametrize('suffix', ['.npz', '.pth', '.safetensors'])
@settings(max_examples=15, deadline=None)
@given(data=st.binary(max_size=300))
def test_rubbish_files_are_one_line(suffix, data, tmp_path_factory):
    path = tmp_path_factory.mktemp('rubbish')/f'file{suffix}'
    path.write_bytes(data)
    with pytest.raises(UserError) as error: create_backbone('naive_lite_hrnet_18', 3, path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


@settings(max_examples=15, deadline=None)
@given(keep=st.floats(0, .999))
def test_torn_checkpoints_are_one_line(net, tmp_path_factory, keep):
    folder = tmp_path_factory.mktemp('torn')
    torch.save({'model_state_dict': net.state_dict(), 'config': {'model': Config().model.to_dict()}}, folder/'whole.pth')
    data = (folder/'whole.pth').read_bytes()
    (folder/'torn.pth').write_bytes(data[:int(keep*len(data))])
    with pytest.raises(UserError, match='torn.pth'): load_model(folder/'torn.pth')


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_find_what_they_never_saw(name):
    "On captchas of the default generator, of a seed that training never drew from: a net that has lost its weights finds none of them."
    predictor, synth = Predictor(name, 'cpu'), CaptchaSynth(load_config(find_preset('default')).synth, seed=2**31)
    assert predictor.model.contrast
    drawn = [synth.draw(i) for i in range(40)]
    misses = [abs(answer.distance - (sample.gap[0] - sample.slider[0])) if answer.distance is not None else np.inf for answer, sample in zip(predictor([d.image for d in drawn]), drawn)]
    assert np.mean(np.array(misses) <= 5) >= .6 and np.median(misses) < 2, sorted(misses)


def test_shipped_weights_are_guarded(tmp_path, monkeypatch):
    content = shipped_weights('pretrained-fast').read_bytes()
    assert len(content) < 5e6
    monkeypatch.setattr('captcha_hrnet.model.resources.files', lambda _: tmp_path)
    with pytest.raises(UserError, match='No such file.*install the library again'): load_model('pretrained-fast')
    (tmp_path/'weights').mkdir()
    for damaged in (content[:-1], content[:9999] + bytes([content[9999] ^ 1]) + content[10000:]):
        (tmp_path/'weights/pretrained-fast.safetensors').write_bytes(damaged)
        with pytest.raises(UserError, match='damaged.*install the library again'): load_model('pretrained-fast')


def test_load_model(net, tmp_path):
    config = Config().to_dict()
    config['model'] |= {'name': 'naive_lite_hrnet_18', 'weights': 'long/gone.pth'}  # the backbone's file is not needed any more
    wrapped = {f'module.{key}': value for key, value in net.state_dict().items()}
    torch.save({'model_state_dict': wrapped, 'config': config, 'epoch': 1}, tmp_path/'best.pth')
    loaded = load_model(tmp_path/'best.pth')
    assert not loaded.training and loaded.config == config
    with torch.no_grad(): assert torch.equal(loaded(pictures())['gap_heatmap'], net(pictures())['gap_heatmap'])
    config['model']['neck_channels'] = 32
    torch.save({'model_state_dict': net.state_dict(), 'config': config}, tmp_path/'other.pth')
    with pytest.raises(UserError, match='other.pth') as error: load_model(tmp_path/'other.pth')
    assert len(str(error.value).splitlines()) == 1
    for broken in ({'model_state_dict': {}, 'config': 3}, {'model_state_dict': {}, 'config': {}},
                   {'model_state_dict': 3, 'config': config}, [1]):
        torch.save(broken, tmp_path/'broken.pth')
        with pytest.raises(UserError, match='broken.pth'): load_model(tmp_path/'broken.pth')


# neck, heads and the whole

def test_fusion_weights_stay_non_negative():
    neck = LiteFPN([8, 16], 8)
    neck.fusion_weights[0].data = torch.tensor([-1., -2.])
    assert torch.equal(neck.shares()[0], torch.zeros(2))
    assert torch.isfinite(neck([torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)])).all()


@pytest.mark.parametrize('overrides', [{}, {'neck_separable': False}, {'angle_head': True},
                                       {'name': 'naive_lite_hrnet_18', 'neck_channels': 16}, {'head_channels': 16}, {'head_channels': 0},
                                       {'name': 'lite_hrnet_30'}, {'in_channels': 3}, {'context': 'stride16'}, {'name': 'rep_hrnet_18', 'context': 'stride32'}])
def test_every_parameter_learns(overrides):
    model = create_lite_hrnet_18_fpn(overrides).train()
    outputs = model(pictures()[:, :model.in_channels])
    assert set(outputs) == {'gap_heatmap', 'slider_heatmap', 'offsets', 'valid'} | ({'angle'} if overrides.get('angle_head') else set())
    sum(value.square().mean() for name, value in outputs.items() if name != 'valid').backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


def test_attention_by_hand():
    "A layer against nn.MultiheadAttention with the same weights; places count, and nothing else tells them apart."
    layer, reference = ContextLayer(16).double(), torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    reference.in_proj_weight.data = torch.cat([layer.query_key.weight, layer.value.weight])
    reference.in_proj_bias.data = torch.cat([layer.query_key.bias, layer.value.bias])
    reference.out_proj.load_state_dict(layer.mix.state_dict())
    x, place = torch.randn(2, 15, 16).double(), place_codes(3, 5, 16, torch.zeros(1).double())
    seen = layer.norm1(x)
    middle = x + reference(seen + place, seen + place, seen)[0]
    torch.testing.assert_close(layer(x, place), middle + layer.out(F.gelu(layer.hidden(layer.norm2(middle)))))
    order = torch.randperm(15)
    torch.testing.assert_close(layer(x[:, order], place[order]), layer(x, place)[:, order])
    assert len(place.unique(dim=0)) == 15 and place.abs().max() <= 1


@pytest.mark.parametrize('branch', [2, 3])
def test_context_begins_with_nothing_and_reaches_everywhere(branch):
    context, maps = Context([8, 16, 24, 32], branch), [torch.randn(2, c, 32//2**i, 64//2**i) for i, c in enumerate((8, 16, 24, 32))]
    assert all(torch.equal(a, b) for a, b in zip(context(maps), maps))
    torch.nn.init.normal_(context.leave.weight)
    before, changed = context(maps), [x.clone() for x in maps]
    changed[branch][0, :, -1, -1] += 1
    after = context(changed)
    assert all(torch.equal(after[i], maps[i]) for i in range(4) if i != branch)
    difference = (after[branch] - before[branch]).detach().abs().sum(1)
    assert difference[0].min() > 0 and not difference[1].any()


def test_plain_dict_and_section_are_the_same():
    a, b = create_lite_hrnet_18_fpn(Config().model), create_lite_hrnet_18_fpn(Config().to_dict()['model'])
    assert {key: value.shape for key, value in a.state_dict().items()} == {key: value.shape for key, value in b.state_dict().items()}
    for wrong in ({'name': 'resnet'}, {'decode': 'magic'}, {'neck_chanels': 3}, {'top_k': 0}):
        with pytest.raises(UserError): create_lite_hrnet_18_fpn(wrong)


def test_weights_from_the_configuration():
    model = create_lite_hrnet_18_fpn({'weights': str(REFERENCE/'lite_hrnet_18.npz')})
    expected = create_backbone('lite_hrnet_18', 4, REFERENCE/'lite_hrnet_18.npz').state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 4), batch=st.integers(1, 2))
@torch.no_grad()
def test_shapes_and_bytes(net, rows, columns, batch):
    image = pictures(batch, 32*rows, 32*columns)
    outputs = net(image)
    for name, channels in {'gap_heatmap': 1, 'slider_heatmap': 1, 'offsets': 4, 'valid': 1}.items():
        assert outputs[name].shape == (batch, channels, 8*rows, 8*columns)
    as_float = net(image.float()/255)
    assert all(torch.equal(outputs[name], as_float[name]) for name in outputs)


@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (1, 4, 60, 64), (1, 4, 64, 65), (4, 64, 64), (1, 5, 64, 64)])
def test_wrong_shapes_are_refused(net, shape):
    with pytest.raises(UserError, match='expected \\[B, 4, H, W\\]'): net(torch.zeros(shape, dtype=torch.uint8))


@settings(max_examples=20, deadline=None)
@given(left=st.integers(0, 60), top=st.integers(0, 40), right=st.integers(64, 96), bottom=st.integers(44, 64))
def test_valid_cells_hold_a_picture_pixel(net, left, top, right, bottom):
    image = torch.zeros(1, 4, 64, 96)
    image[:, 3, top:bottom, left:right] = 1
    slow = torch.tensor([[bool(image[0, 3, 4*r:4*r + 4, 4*c:4*c + 4].any()) for c in range(24)] for r in range(16)])
    assert torch.equal(net.valid_cells(image)[0, 0], slow)


@torch.no_grad()
def test_amp_outputs_are_float32(net):
    with torch.autocast('cpu', torch.bfloat16):
        outputs = net(pictures())
        found = net.decode_predictions(outputs, decode='dark', same_row=True)
    assert all(value.dtype == torch.float32 for name, value in outputs.items() if name != 'valid')
    assert all(value.dtype == torch.float32 for value in found.values())
    again = net.decode_predictions(outputs, decode='dark', same_row=True)
    assert all(torch.equal(found[name], again[name]) for name in found)  # decoding does not feel autocast


@torch.no_grad()
def test_half_precision_weights(net):
    half = create_lite_hrnet_18_fpn({'name': 'naive_lite_hrnet_18'}).bfloat16().eval()
    found = half.decode_predictions(half(pictures()))
    assert all(value.dtype == torch.float32 for value in found.values())


class NoHostRead(TorchDispatchMode):
    "Fails where a value would travel from the device to Python."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('decode', DECODERS)
def test_no_host_synchronisation(net, decode):
    with NoHostRead(): net.decode_predictions(net(pictures()), decode=decode, same_row=True)


# decoding

def outputs_of(gap, slider, offsets=None, valid=None) -> dict:
    return {'gap_heatmap': gap, 'slider_heatmap': slider,
            'offsets': torch.zeros(len(gap), 4, *gap.shape[2:]) if offsets is None else offsets,
            'valid': torch.ones_like(gap, dtype=torch.bool) if valid is None else valid}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), decode=st.sampled_from(DECODERS), same_row=st.booleans(), top=st.integers(0, 7), left=st.integers(0, 15),
       height=st.integers(1, 8), width=st.integers(1, 16))
def test_padding_never_wins(net, seed, decode, same_row, top, left, height, width):
    generator = torch.Generator().manual_seed(seed)
    heats = [3*torch.randn(2, 1, 8, 16, generator=generator) for _ in range(2)]
    valid = torch.zeros(2, 1, 8, 16, dtype=torch.bool)
    valid[:, :, top:top + height, left:left + width] = True
    for heat in heats: heat[~valid] += 100
    found = net.decode_predictions(outputs_of(*heats, valid=valid), decode=decode, same_row=same_row, top_k=3)
    for point in (found['gap_coords'], found['slider_coords']):
        cell = (point / 4).clamp(torch.zeros(2), torch.tensor([15.999, 7.999]))
        low, high = torch.tensor([left, top]), torch.tensor([min(16, left + width), min(8, top + height)])
        reach = 3 if decode == 'soft_argmax' else 1  # cells that a refinement may add
        assert (cell >= low - reach).all() and (cell <= high + reach).all()
    logits, cell = net.codec.peaks(heats[0], valid, 1)
    assert valid[torch.arange(2), 0, cell[:, 0, 1], cell[:, 0, 0]].all()
    assert torch.equal(found['gap_candidate_scores'][:, 0], logits[:, 0].sigmoid())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), decode=st.sampled_from(DECODERS), same_row=st.booleans())
def test_a_slider_that_is_left_is_found_left(net, seed, decode, same_row):
    "An answer that says so already stays, to the bit; with a second look, no other pair is looked at, and none of those is lost."
    generator = torch.Generator().manual_seed(seed)
    outputs = outputs_of(*[3*torch.randn(32, 1, 8, 16, generator=generator) for _ in range(2)])
    free, told = (net.decode_predictions(outputs, decode=decode, same_row=same_row, top_k=40, slider_left=left) for left in (False, True))
    already = free['slider_coords'][:, 0] < free['gap_coords'][:, 0]
    assert (told['slider_coords'][:, 0] < told['gap_coords'][:, 0]).all() and already.any() and not already.all()
    assert all(torch.equal(told[name][already], free[name][already]) for name in told)
    (free_gaps, free_sliders, free_logits, _), (gaps, sliders, logits, _) = (
        candidate_pairs(outputs, net.codec, decode, 5, same_row, left, count=100) for left in (False, True))
    assert (sliders[..., 0] < gaps[..., 0])[logits.isfinite()].all()
    left = (free_sliders[..., 0] < free_gaps[..., 0]) & free_logits.isfinite()
    assert torch.equal(logits[logits.isfinite()], free_logits[left])


@settings(max_examples=40, deadline=None)
@given(x=st.floats(0, 127.99), y=st.floats(0, 63.99))
def test_offset_decoding_inverts_the_codec(net, x, y):
    gap, slider = torch.tensor([[x, y]]), torch.tensor([[(x + 64) % 128, y]])
    (gap_heat, _, gap_offset), (slider_heat, _, slider_offset) = (HeatmapCodec(4).encode(point, (16, 32)) for point in (gap, slider))
    offsets = torch.cat([gap_offset, slider_offset], 1)[:, :, None, None].expand(1, 4, 16, 32)
    found = net.decode_predictions(outputs_of(gap_heat, slider_heat, offsets), decode='offset')
    assert (found['gap_coords'] - gap).abs().max() < 1e-3 and (found['slider_coords'] - slider).abs().max() < 1e-3


@settings(max_examples=40, deadline=None)
@given(x=st.floats(20, 108), y=st.floats(20, 44), decode=st.sampled_from(['soft_argmax', 'dark']))
def test_heat_map_decoders_find_a_clean_gaussian(net, x, y, decode):
    point = torch.tensor([[x, y]])
    heat = HeatmapCodec(4).encode(point, (16, 32))[0].clamp(1e-6, 1 - 1e-6).logit()
    found = net.decode_predictions(outputs_of(heat, heat), decode=decode)
    assert (found['gap_coords'] - point).abs().max() < .25  # the true cell is drawn as 1, which bends the Gaussian


def slow_dark(heat: np.ndarray, column: int, row: int, sigma: float) -> np.ndarray:
    "Blur, log, differences and the solution of a 2×2 system, one number at a time."
    radius, (rows, columns) = max(1, round(3*sigma)), heat.shape
    def blurred(r, c):
        total = weight = 0.
        for dr in range(-radius, radius + 1):
            for dc in range(-radius, radius + 1):
                g = np.exp(-(dr**2 + dc**2)/(2*sigma**2))
                weight += g
                if 0 <= r + dr < rows and 0 <= c + dc < columns: total += g*heat[r + dr, c + dc]
        return np.log(max(total/weight, 1e-10))
    def at(dc, dr): return blurred(min(max(row + dr, 0), rows - 1), min(max(column + dc, 0), columns - 1))
    gradient = np.array([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)])/2
    dxx, dyy = ((at(*two) - 2*at(0, 0) + at(*minus))/4 for two, minus in [((2, 0), (-2, 0)), ((0, 2), (0, -2))])
    dxy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))/4
    hessian = np.array([[dxx, dxy], [dxy, dyy]])
    if np.linalg.det(hessian) <= 1e-10 or dxx >= 0: return np.zeros(2)
    return np.clip(-np.linalg.solve(hessian, gradient), -1, 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), column=st.integers(0, 15), row=st.integers(0, 7), sigma=st.sampled_from([.7, 1., 1.5]))
def test_dark_equals_its_slow_twin(seed, column, row, sigma):
    generator = torch.Generator().manual_seed(seed)
    point = (torch.tensor([[column, row]]) + torch.rand(1, 2, generator=generator)) * 4
    heat = HeatmapCodec(4).encode(point, (8, 16), sigma)[0].clamp(.01, .95)
    logits = heat.logit() + .3*torch.randn(heat.shape, generator=generator)
    found = dark_offset(logits, torch.ones_like(logits, dtype=torch.bool), torch.tensor([[[column, row]]]), sigma)[0, 0]
    slow = slow_dark(logits.double().sigmoid().numpy()[0, 0], column, row, sigma)
    np.testing.assert_allclose(found.numpy(), slow, atol=2e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), apart=st.sampled_from([0., 8., 40.]))
def test_best_pair_is_the_best(seed, k, apart):
    generator = torch.Generator().manual_seed(seed)
    (gs, ss), (gp, sp) = torch.rand(2, 2, k, generator=generator), 64*torch.rand(2, 2, k, 2, generator=generator)
    gap, slider = best_pair(gs, gp, ss, sp, apart, row_sigma_px=8.)
    for b in range(2):
        scores = {(i, j): gs[b, i].item()*ss[b, j].item()*np.exp(-(gp[b, i, 1] - sp[b, j, 1]).item()**2/128)
                  for i in range(k) for j in range(k) if (gp[b, i] - sp[b, j]).norm() >= apart} or {(0, 0): 0.}
        assert scores[gap[b].item(), slider[b].item()] == pytest.approx(max(scores.values()), rel=1e-4)


# calibration

IDENTITY = torch.tensor([[1., 0.], [1., 0.]])


@pytest.fixture
def other(net):
    "The network for as long as a test lasts, then as it was."
    yield net
    net.calibration.copy_(IDENTITY)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), numbers=st.tuples(*[st.floats(.05, 20), st.floats(-10, 10)]*2), decode=st.sampled_from(DECODERS), same_row=st.booleans())
def test_a_calibration_changes_scores_and_no_answer(net, seed, numbers, decode, same_row):
    generator = torch.Generator().manual_seed(seed)
    outputs = outputs_of(*[torch.randn(2, 1, 8, 16, generator=generator) for _ in range(2)])   # larger logits cannot be read back from float32 scores
    how = dict(decode=decode, same_row=same_row, top_k=40)     # more than there are peaks
    before = net.decode_predictions(outputs, **how)
    net.calibration.copy_(torch.tensor(numbers).view(2, 2))
    try: after = net.decode_predictions(outputs, **how)
    finally: net.calibration.copy_(IDENTITY)
    for name, slope, intercept in (('gap', *numbers[:2]), ('slider', *numbers[2:])):
        for key in ('coords', 'candidates'): assert torch.equal(before[f'{name}_{key}'], after[f'{name}_{key}'])
        for key in ('score', 'candidate_scores'):
            expected = (slope*before[f'{name}_{key}'].double().logit() + intercept).sigmoid()
            torch.testing.assert_close(after[f'{name}_{key}'].double(), expected, atol=1e-4, rtol=0)
        assert (after[f'{name}_candidate_scores'].diff(dim=1) <= 0).all() and (after[f'{name}_candidate_scores'][:, -1] == 0).all()


def test_a_calibration_goes_where_the_weights_go(other, tmp_path):
    other.calibration.copy_(torch.tensor([[.7312345, -1.2345678], [1.1, 1/3]]))
    other.config = {'model': Config(model=dict(name='naive_lite_hrnet_18')).model.to_dict()}
    torch.save(dict(model_state_dict=other.state_dict(), config=other.config), tmp_path/'net.pth')
    save_weights(other, tmp_path/'net.safetensors', licence='mine')
    for name in ('net.pth', 'net.safetensors'): assert torch.equal(load_model(tmp_path/name).calibration, other.calibration)     # to the last bit
    assert load_model(tmp_path/'net.safetensors').facts == dict(licence='mine') and load_model(tmp_path/'net.pth').facts == {}
    fresh = create_lite_hrnet_18_fpn(dict(other.config['model'], start_from=str(tmp_path/'net.pth')))
    assert torch.equal(fresh.calibration, IDENTITY)      # what is trained on has to be calibrated anew
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in fresh.state_dict().items() if name != 'calibration')


def test_files_from_before_calibration_are_read(other, tmp_path):
    other.config = {'model': Config(model=dict(name='naive_lite_hrnet_18')).model.to_dict()}
    old = {name: value for name, value in other.state_dict().items() if name != 'calibration'}
    torch.save(dict(model_state_dict=old, config=other.config), tmp_path/'old.pth')
    other.calibration.copy_(torch.tensor([[2., 1.], [2., 1.]]))
    assert torch.equal(load_model(tmp_path/'old.pth').calibration, IDENTITY)
    other.load_state_dict(old)
    assert torch.equal(other.calibration, IDENTITY) and 'calibration' not in old
    assert not any(torch.equal(load_model(name).calibration, IDENTITY) for name in SHIPPED)


def test_more_candidates_than_cells(net):
    heat = torch.randn(1, 1, 2, 2)
    assert net.decode_predictions(outputs_of(heat, heat), top_k=100)['gap_candidates'].shape == (1, 4, 2)
    with pytest.raises(UserError, match='allowed: offset'): net.decode_predictions(outputs_of(heat, heat), decode='magic')


def test_top_k_falls(net):
    with torch.no_grad(): found = net.decode_predictions(net(pictures()), top_k=4)
    for name in ('gap', 'slider'):
        scores = found[f'{name}_candidate_scores']
        assert scores.shape == (2, 4) and (scores.diff(dim=1) <= 0).all() and ((0 <= scores) & (scores <= 1)).all()
        assert torch.equal(found[f'{name}_coords'], found[f'{name}_candidates'][:, 0])


# costs

def test_model_table_leaves_no_trace(net):
    rows = model_table(net, (64, 96))
    assert [row['part'] for row in rows] == ['stem', 'stage 2', 'stage 3', 'stage 4', 'neck', 'heads', 'total']
    assert rows[-1]['parameters'] == sum(p.numel() for p in net.parameters())
    assert all(row['kernels'] > 0 and row['macs'] > 0 for row in rows)
    assert not any(module._forward_pre_hooks for module in net.modules()) and not net.training


def test_exports_as_one_graph(net):
    "Nothing in the forward pass depends on values: torch.export traces it whole, and the trace computes the same."
    program = torch.export.export(net, (pictures(),)).module()
    with torch.no_grad(): assert relative_error(program(pictures())['gap_heatmap'], net(pictures())['gap_heatmap']) < 1e-5


def test_public_names():
    promised = {'create_backbone', 'LiteFPN', 'create_lite_hrnet_18_fpn', 'load_model', 'CaptchaKeypointNet', 'model_table'}
    assert promised <= set(model_module.__all__)


@given(seed=st.integers(0, 10**6), channels=st.sampled_from([3, 4]))
@settings(max_examples=20, deadline=None)
def test_raised_contrast_against_opencv(seed, channels):
    "Inside of the mask what OpenCV makes of that part alone; all else, and the picture that was given, as it was."
    rng = np.random.default_rng(seed)
    (top, bottom), (left, right) = (np.sort(rng.choice(33, 2, replace=False)*2) for _ in range(2))
    image = torch.from_numpy(rng.integers(90, 120, (2, channels, 64, 64), dtype=np.uint8))/255
    if channels == 4: image[:, 3] = 0; image[:, 3, top:bottom, left:right] = 1
    else: top, bottom, left, right = 0, 64, 0, 64
    before, raised = image.clone(), raised_contrast(image)
    assert torch.equal(image, before)
    for picture, one in zip(image, raised):
        inside = np.ascontiguousarray((picture[:3, top:bottom, left:right]*255).round().byte().permute(1, 2, 0).numpy())
        light, *colours = cv2.split(cv2.cvtColor(inside, cv2.COLOR_RGB2LAB))
        expected = cv2.cvtColor(cv2.merge([cv2.createCLAHE(CLIP, (TILES, TILES)).apply(light), *colours]), cv2.COLOR_LAB2RGB)
        assert ((one[:3, top:bottom, left:right]*255).round().byte().permute(1, 2, 0).numpy() == expected).all()
        one[:3, top:bottom, left:right] = picture[:3, top:bottom, left:right]
    assert torch.equal(raised, before)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_surer_answers_against_a_slow_twin(seed):
    generator = torch.Generator().manual_seed(seed)
    def answers(count): return {name: torch.rand(count, *more, generator=generator) for name, more in dict(gap_coords=[2], slider_coords=[2], gap_score=[], slider_score=[], gap_candidates=[3, 2]).items()}
    found = answers(6)
    unsure = torch.minimum(found['gap_score'], found['slider_score']) < UNSURE
    other, expected, k = answers(int(unsure.sum())), {name: value.clone() for name, value in found.items()}, 0
    for i in unsure.nonzero()[:, 0].tolist():
        if min(other['gap_score'][k], other['slider_score'][k]) > min(found['gap_score'][i], found['slider_score'][i]) + SURER:
            for name in expected: expected[name][i] = other[name][k]
        k += 1
    surer_answers(found, unsure, other)
    for name in found: assert torch.equal(found[name], expected[name]), name


class Shades(torch.nn.Module):
    "Takes the brightest part of a picture for the gap and the darkest for the slider piece, the surer the more they differ from the rest."
    def __init__(self, contrast=False, image=True):
        super().__init__()
        self.codec, self.pair_net, self.contrast, self.image = HeatmapCodec(), None, contrast, image
        self.decode_options = dict(decode='offset', top_k=3, same_row=False, slider_left=False, registration=False)
        self.register_buffer('calibration', UNCALIBRATED.clone())

    decode_predictions = CaptchaKeypointNet.decode_predictions

    def forward(self, image):
        light = F.avg_pool2d(image[:, :3].mean(1, keepdim=True), 4)*40 - 20
        found = dict(gap_heatmap=light, slider_heatmap=-light, offsets=torch.full((len(image), 4, *light.shape[2:]), .5), valid=torch.ones_like(light, dtype=torch.bool))
        return found | dict(image=image) if self.image else found


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_unsure_answers_are_asked_for_again(seed):
    "As the network or a call says, with the contrast raised; nothing changes where it is sure, or hardly surer then."
    generator = torch.Generator().manual_seed(seed)
    grey = F.interpolate(torch.rand(48, 1, 8, 16, generator=generator), (64, 128))
    grey = .5 + (grey - .5)*torch.linspace(.01, .1, 48)[:, None, None, None]
    image = torch.cat([grey.expand(-1, 3, -1, -1), torch.ones_like(grey)], 1)
    net, asking = Shades(), Shades(contrast=True)
    plain, asked, other = net.decode_predictions(net(image)), asking.decode_predictions(asking(image)), net.decode_predictions(net(raised_contrast(image)))
    least = [torch.minimum(each['gap_score'], each['slider_score']) for each in (plain, other)]
    taken = (least[0] < UNSURE) & (least[1] > least[0] + SURER)
    assert taken.any() and not taken.all()
    for name in plain: assert torch.equal(asked[name], torch.where(taken.view(-1, *[1]*(plain[name].ndim - 1)), other[name], plain[name])), name
    for name, value in net.decode_predictions(net(image), contrast=True).items(): assert torch.equal(value, asked[name])
    for name, value in asking.decode_predictions(asking(image), contrast=False).items(): assert torch.equal(value, plain[name])
    with pytest.raises(UserError, match='contrast: the outputs hold no image'): Shades(True, image=False).decode_predictions(Shades(image=False)(image))
