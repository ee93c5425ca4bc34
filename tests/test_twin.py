"""What the twin's notebook can't hold: folding for random shapes, statistics and networks, and the whole line from a checkpoint to points."""
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from captcha_hrnet.config import UserError, load_config
from captcha_hrnet.engine import TrainingEngine
from captcha_hrnet.model import BACKBONES, create_backbone, create_lite_hrnet_18_fpn, load_model
from captcha_hrnet.twin import RepConv, RepHRNet, RepModule, folded, rep_separable
from toys import batch_of

ROOT = Path(__file__).parents[1]
FAST = {'name': 'rep_hrnet_18', 'neck_channels': 16, 'head_channels': 16}

torch.set_num_threads(1)


def some_training(module, seed=0, quiet=False):
    "Every norm with random weights and statistics; `quiet`: one channel of each with a variance as small as eps."
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if not isinstance(norm, nn.BatchNorm2d): continue
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(.1, 3, generator=generator)
        if quiet: norm.running_var[0] = 1e-5
        norm.weight.data.normal_(1, .5, generator=generator)
        norm.bias.data.normal_(generator=generator)
    return module.eval()


def pictures(batch=2, height=64, width=96):
    return torch.randint(0, 256, (batch, 4, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def relative_error(a, b): return ((a - b).abs().max()/b.abs().max().clamp_min(1e-12)).item()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.sampled_from([(1,), (3,), (3, 1), (5, 3), (7, 3, 1)]), groups=st.sampled_from([1, 2, 4]), each=st.integers(1, 4),
       widens=st.booleans(), stride=st.integers(1, 2), relu=st.booleans(), height=st.integers(1, 9), width=st.integers(1, 9))
@torch.no_grad()
def test_branches_fold_into_one_convolution(seed, sizes, groups, each, widens, stride, relu, height, width):
    torch.manual_seed(seed)
    rep = some_training(RepConv(groups*each, groups*each*(1 + widens), sizes[:1] if stride > 1 else sizes, stride, groups, relu), seed, quiet=True)
    x = torch.randn(2, groups*each, height, width)
    one = rep.fold()
    assert sum(isinstance(module, nn.Conv2d) for module in one.modules()) == 1
    assert relative_error(one(x), rep(x)) < 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.sampled_from([(1,), (3, 1), (5, 3)]), groups=st.sampled_from([1, 3]))
def test_branches_are_what_the_formula_says(seed, sizes, groups):
    "The slow twin in training mode: each convolution, normalised by its own batch, and the input, written out."
    torch.manual_seed(seed)
    rep, x = RepConv(6, 6, sizes, groups=groups, relu=False), torch.randn(3, 6, 5, 7)
    slow = x.clone()
    for size, (conv, norm) in zip(sizes, rep.convs):
        y = F.conv2d(x, conv.weight, padding=size//2, groups=groups)
        slow += (y - y.mean((0, 2, 3), keepdim=True))/torch.sqrt(y.var((0, 2, 3), correction=0, keepdim=True) + norm.eps)
    torch.testing.assert_close(rep(x), slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('name', ['lite_hrnet_18', 'naive_lite_hrnet_18', 'rep_hrnet_18'])
@torch.no_grad()
def test_networks_fold(name):
    "Statistics that fit nothing make values of 10^9, so in float64: here the algebra counts. What training leaves is tested in float32 further down."
    torch.manual_seed(0)
    model = some_training(create_lite_hrnet_18_fpn(FAST | {'name': name, 'angle_head': True}).double())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    use = folded(model.train())
    model.eval()
    truth, found = model(pictures()), use(pictures())
    assert all(relative_error(found[key], truth[key]) < 1e-8 for key in truth if key != 'valid')
    points, expected = use.decode_predictions(found), model.decode_predictions(truth)
    assert all((points[key] - expected[key]).abs().max() < 1e-3 for key in expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # the original is as it was
    kinds = {type(module) for module in use.modules()}
    assert not kinds & {nn.BatchNorm2d, RepConv} and not any(p.requires_grad for p in use.parameters())


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 2), columns=st.integers(1, 3), seed=st.integers(0, 100))
@torch.no_grad()
def test_the_backbone_folds_at_any_size(backbone, rows, columns, seed):
    some_training(backbone, seed)
    x = torch.rand(1, 4, 32*rows, 32*columns)
    maps = backbone(x)
    assert [m.shape for m in maps] == [(1, c, 8*rows*4//s, 8*columns*4//s) for c, s in zip((40, 80, 160, 320), (4, 8, 16, 32))]
    for found, truth in zip(folded(backbone)(x), maps): assert relative_error(found, truth) < 1e-5


@pytest.fixture(scope='module')
def backbone() -> RepHRNet: return create_backbone('rep_hrnet_18')


def test_a_fold_that_forgets_is_seen():
    "The tests above can fail: folded without eps, or with a batch's statistics, the same comparison is far off."
    rep = some_training(RepConv(6, 6, (3, 1)), quiet=True)
    x = torch.randn(2, 6, 8, 8)
    careless = copy.deepcopy(rep)
    for _, norm in careless.convs: norm.eps = 0.
    with torch.no_grad():
        assert relative_error(careless.fold()(x), rep(x)) > .01
        assert relative_error(copy.deepcopy(rep).train()(x), rep(x)) > .01
    with pytest.raises(AssertionError, match='eval'): rep.train().fold()


def test_a_norm_that_stands_alone_is_refused():
    with pytest.raises(AssertionError, match='norm without a convolution'): folded(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)))


def test_modules_pass_one_way():
    maps = [torch.rand(1, c, 16//2**i, 16//2**i) for i, c in enumerate((4, 8, 16))]
    for to_coarse in (True, False):
        module = RepModule([4, 8, 16], [(3,)]*3, to_coarse).eval()
        for changed in range(3):
            others = [m + (i == changed) for i, m in enumerate(maps)]
            with torch.no_grad(): differs = [not torch.equal(a, b) for a, b in zip(module(others), module(maps))]
            assert differs == [(i >= changed) if to_coarse else (i <= changed) for i in range(3)]


def test_separable_layers_do_not_mix_what_they_should_not():
    depthwise, pointwise = rep_separable(6, 8, (5, 3))
    assert all(conv.groups == 6 for conv, _ in depthwise.convs) and [conv.kernel_size for conv, _ in depthwise.convs] == [(5, 5), (3, 3)]
    assert [conv.kernel_size for conv, _ in pointwise.convs] == [(1, 1)] and depthwise.passes and not pointwise.passes


def test_every_parameter_learns_in_a_training_step():
    config = load_config(ROOT/'configs'/'fast.yaml', ['train.amp=off', 'hardware.device=cpu', 'train.batch_size=2', 'data.input_height=64', 'data.input_width=64'])
    assert (config.model.name, config.model.neck_channels, config.optimizer.lr) == ('rep_hrnet_18', 32, load_config(ROOT/'configs'/'training_config.yaml').optimizer.lr)
    model = create_lite_hrnet_18_fpn(config.model).train()
    sum(value.square().mean() for name, value in model(pictures()).items() if name != 'valid').backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


def test_weights_of_its_own_and_of_others(tmp_path):
    for own in (create_lite_hrnet_18_fpn(FAST), create_lite_hrnet_18_fpn(FAST | {'in_channels': 3})):
        torch.save({'model_state_dict': own.state_dict(), 'config': {'model': FAST | {'in_channels': own.in_channels}}}, tmp_path/'own.pth')
        heir = create_backbone('rep_hrnet_18', 4, tmp_path/'own.pth')  # three channels grow a fourth that starts at zero
        image = torch.rand(1, 4, 64, 64)
        image[:, 3] = 1
        with torch.no_grad():
            for a, b in zip(heir.eval()(image), own.eval().backbone(image[:, :own.in_channels])): assert relative_error(a, b) < 1e-5
    assert isinstance(load_model(tmp_path/'own.pth').backbone, RepHRNet)
    with pytest.raises(UserError, match='published weights fit Lite-HRNet alone') as error:
        create_backbone('rep_hrnet_18', 3, ROOT/'tests'/'data'/'reference'/'lite_hrnet_18.npz')
    assert len(str(error.value).splitlines()) == 1


@torch.no_grad()
def test_a_trained_twin_answers_the_same_when_folded():
    "Not random statistics but those of some steps: the engine's averaged model, then its fold."
    config = load_config(ROOT/'configs'/'fast.yaml', ['train.amp=off', 'hardware.device=cpu', 'train.batch_size=4', 'model.neck_channels=16', 'model.head_channels=16'])
    torch.manual_seed(0)
    engine = TrainingEngine(create_lite_hrnet_18_fpn(config.model), config, torch.device('cpu'))
    engine.model.train()
    with torch.enable_grad():
        for seed in range(3): engine._train_window([batch_of(4, seed)])
    model = engine.model.eval()
    image = batch_of(2, 9)['image']
    truth, found = model(image), folded(model)(image)
    assert all(relative_error(found[key], truth[key]) < 1e-5 for key in truth if key != 'valid')


def test_exports_as_one_graph():
    use = folded(create_lite_hrnet_18_fpn(FAST))
    program = torch.export.export(use, (pictures(),)).module()
    with torch.no_grad(): assert relative_error(program(pictures())['gap_heatmap'], use(pictures())['gap_heatmap']) < 1e-5
    assert 'rep_hrnet_18' in BACKBONES
