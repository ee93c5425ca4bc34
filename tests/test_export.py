"Exported files: the same points in every form, opset and runtime, or no file."
import json
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captcha_hrnet import export as module
from captcha_hrnet.config import Config, UserError, run_command
from captcha_hrnet.engine import save_checkpoint
from captcha_hrnet.export import (RUNTIMES, Exported, check, check_pictures, letterbox_graph, points_of, price,
                                  runner, settled, to_onnx)
from captcha_hrnet.geometry import Letterbox, letterbox_image
from captcha_hrnet.model import CaptchaKeypointNet, Context, LiteHRNet, create_lite_hrnet_18_fpn
from captcha_hrnet.predict import Predictor, letterboxed
from captcha_hrnet.synth import CaptchaSynth
from captcha_hrnet.twin import RepHRNet, folded

H, W = 64, 128
CONFIG = Config(data=dict(input_height=H, input_width=W), model=dict(name='naive_lite_hrnet_18', neck_channels=16, head_channels=16))
pytestmark = pytest.mark.usefixtures('one_thread')


def lived_in(model):
    "Statistics that fit some pictures, and heads that are sure of something: maps depend on the picture, and peaks stand out."
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms: norm.momentum = 1.; norm.weight.data.uniform_(.7, 1.3); norm.bias.data.uniform_(-.3, .3)
    for name in ('gap_heatmap', 'slider_heatmap'): model.heads[name].out.weight.data.normal_()
    if isinstance(model.context, Context): model.context.leave.weight.data.normal_(std=.3)
    with torch.no_grad(): model.train()(letterboxed(check_pictures(6), (H, W), model.in_channels)[0])
    model.config = CONFIG.to_dict()
    return model.eval()


def network(seed=0, naive=False, modules=(1, 1, 1), in_channels=4, **options):
    "A narrow network."
    torch.manual_seed(seed)
    return lived_in(CaptchaKeypointNet(LiteHRNet(modules, (16, 32, 64, 128), naive, in_channels), 16, head_channels=16, **options))


@pytest.fixture(scope='module')
def model(): return network()


@pytest.fixture(scope='module')
def points(model): return to_onnx(model)


@settings(max_examples=4)
@given(seed=st.integers(0, 99), naive=st.booleans(), modules=st.tuples(*[st.integers(1, 2)]*3), in_channels=st.sampled_from([3, 4]))
def test_folded_and_settled_networks_are_the_same_function(seed, naive, modules, in_channels):
    model = network(seed, naive, modules, in_channels).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(2, in_channels, 32, 64, dtype=torch.float64)
    with torch.no_grad(): maps = [net(image) for net in (model, folded(model), settled(folded(model)))]
    for other in maps[1:]:
        for name in ('gap_heatmap', 'slider_heatmap', 'offsets'): torch.testing.assert_close(other[name], maps[0][name], rtol=1e-7, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())   # copies were changed, the network was not


@settings(max_examples=40)
@given(width=st.integers(16, 4096), height=st.integers(16, 400), turn=st.booleans())
def test_the_graphs_letterbox_has_the_librarys_frame(width, height, turn):
    if turn: width, height = height, width
    image, params = letterbox_graph(torch.zeros(height, width, 3, dtype=torch.uint8), (H, W))
    box = Letterbox(width, height, W, H)
    torch.testing.assert_close(params[0].double(), torch.from_numpy(box.params), rtol=1e-6, atol=1e-6)
    assert torch.equal(image[0], torch.from_numpy(letterbox_image(np.zeros((height, width, 3), np.uint8), box)).float())


@settings(max_examples=40)
@given(width=st.integers(16, 400), height=st.integers(16, 400), seed=st.integers(0, 99))
def test_the_graphs_letterbox_looks_like_the_librarys(width, height, seed):
    "On noise, the worst picture for a resize; OpenCV rounds to whole levels, and its cubic weights to 1/2048."
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = letterbox_graph(torch.from_numpy(picture), (H, W))[0][0].numpy()
    assert np.abs(ours - letterbox_image(picture, Letterbox(width, height, W, H))).max() < 1.5


@pytest.mark.parametrize('form, opset, options', [('maps', 13, dict(in_channels=3)), ('whole', 20, dict(decode='soft_argmax', angle_head=True)), ('points', 17, dict(decode='dark', same_row=True)), ('points', 14, dict(context='stride16')), ('whole', 18, dict(context='stride32'))])
def test_every_form_and_decoding_runs_in_both_runtimes(form, opset, options):
    model = network(1, **options)
    content = to_onnx(model, form, opset)
    assert max(check(content, model, form, check_pictures(12)).values()) < 1e-2
    assert onnx.load_from_string(content).opset_import[0].version == opset


def test_attention_needs_a_later_opset():
    with pytest.raises(UserError, match='opset: value 13: must be 14 to 20'): to_onnx(network(context='stride32'), opset=13)


def test_batches_of_any_size_in_both_runtimes(model, points):
    image = np.random.default_rng(0).integers(0, 256, (7, 4, H, W), dtype=np.uint8)
    for runtime in RUNTIMES:
        run = runner(points, runtime, 1)
        whole = points_of(model, 'points', run(image))
        assert whole.shape == (7, 4)
        for part in (slice(0, 1), slice(2, 5)): np.testing.assert_allclose(points_of(model, 'points', run(image[part])), whole[part], atol=1e-3)
    fixed = runner(points, 'openvino', 1, [7, 4, H, W])
    np.testing.assert_allclose(points_of(model, 'points', fixed(image)), whole, atol=1e-3)


def test_the_twin_is_exported_as_it_is_used():
    torch.manual_seed(5)
    twin = lived_in(CaptchaKeypointNet(RepHRNet((1, 1, 1), (16, 32, 64, 128)), 16, head_channels=16))
    content = to_onnx(twin)
    kinds = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert kinds.count('BatchNormalization') == 0 and kinds.count('Transpose') == 2   # both of them of the decoding
    assert max(check(content, twin, 'points', check_pictures(8)).values()) < .01


def test_openvino_has_one_core_that_stays(points, monkeypatch):
    package, made = module.needed('openvino'), []
    monkeypatch.delattr(package, 'kept_core', raising=False)
    core = package.Core
    monkeypatch.setattr(package, 'Core', lambda: made.append(1) or core())
    for _ in range(2): runner(points, 'openvino', 1)(np.zeros((1, 4, H, W), np.uint8))
    assert made == [1] and hasattr(package, 'kept_core')


def test_whole_answers_as_the_predictor_where_nothing_is_resized(model):
    picture = np.random.default_rng(0).integers(0, 256, (H, W - 20, 3), dtype=np.uint8)
    with torch.no_grad(): found = dict(zip(Exported(model, 'whole', (H, W)).names, Exported(model, 'whole', (H, W))(torch.from_numpy(picture))))
    answer = Predictor(model, 'cpu', 0.)(picture)
    assert found['gap_coords'].tolist() == pytest.approx(answer.gap, abs=1e-3) and found['slider_coords'].tolist() == pytest.approx(answer.slider, abs=1e-3)
    assert found['gap_candidates'].shape == (5, 2) and found['gap_score'].item() == pytest.approx(answer.gap_score, abs=1e-5)


@pytest.mark.parametrize('form', module.FORMS)
def test_a_calibration_is_exported(form):
    model, pictures = network(same_row=True), check_pictures(6)
    inputs = list(module.inputs_for(model, form, pictures))
    plain = module.reference_answers(model, form, inputs)
    model.calibration.copy_(torch.tensor([[.6, -1.1], [1.7, .4]]))
    expected, content = module.reference_answers(model, form, inputs), to_onnx(model, form)
    assert (expected[:, :4] == plain[:, :4]).all() and (np.abs(expected[:, 4:] - plain[:, 4:]).max(0) > .1).all()
    for runtime in RUNTIMES:
        found = np.concatenate([module.answers_of(model, form, runner(content, runtime, 1)(image)) for image in inputs])
        np.testing.assert_allclose(found[:, 4:], expected[:, 4:], atol=1e-4)
        assert not np.isnan(found).any()
    said = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    np.testing.assert_allclose(json.loads(said['calibration']), [[.6, -1.1], [1.7, .4]], rtol=1e-6)


def test_the_file_says_what_it_is(model, points):
    said = {entry.key: entry.value for entry in onnx.load_from_string(points).metadata_props}
    assert set(said) == {'captcha_hrnet', 'form', 'precision', 'input_size', 'config', 'calibration', 'frame'}
    assert said['input_size'] == f'[{H}, {W}]' and said['precision'] == 'float32' and Config.from_dict(json.loads(said['config'])) == CONFIG


def test_another_network_and_numbers_that_are_not_finite_are_noticed(model, points):
    with pytest.raises(UserError, match='onnxruntime and PyTorch differ on 8 of 8'): check(points, network(5), 'points', check_pictures(8))
    broken = network()
    broken.heads['offsets'].out.bias.data[:] = float('nan')
    with pytest.raises(UserError, match='differ'): check(points, broken, 'points', check_pictures(2))


@pytest.mark.parametrize('moved, score, passes', [(1, 0., True), (2, 0., False), (1, 1e-3, False)])
def test_a_few_ties_are_let_pass(model, points, monkeypatch, moved, score, passes):
    "Another point with the same score is the network's answer as well; many such, or with another score, are a fault."
    real = module.reference_answers
    def elsewhere(*arguments):
        found = real(*arguments)
        found[:moved, 0] += 3
        found[:moved, 4] += score
        return found
    monkeypatch.setattr(module, 'reference_answers', elsewhere)
    if passes: assert max(check(points, model, 'points', check_pictures(40)).values()) < .01
    else:
        with pytest.raises(UserError, match=f'differ on {moved} of 40'): check(points, model, 'points', check_pictures(40))


def test_a_file_that_differs_is_not_written(model, points, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'to_onnx', lambda *_: points)
    monkeypatch.setattr(module, 'TOLERANCE_PX', -1.)
    (tmp_path/'old.onnx').write_text('old')
    for name in ('new.onnx', 'old.onnx'):
        with pytest.raises(UserError, match='differ'): module.export(model, tmp_path/name, count=2)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('old.onnx', 'old')]


def test_int8(model, points, tmp_path, monkeypatch):
    "Calibrated with pictures of one's own: it runs, says its price, and has scales by channel; the last layers stay in float."
    monkeypatch.setattr(module, 'int8_time', partial(module.int8_time, seconds=.02))
    cv2.imwrite(str(tmp_path/'a.png'), np.random.default_rng(0).integers(0, 256, (80, 160, 3), dtype=np.uint8))
    said = module.export(model, tmp_path/'m.onnx', int8=True, data=str(tmp_path), count=6)
    assert 'int8: points move by' in said and 'on 6 drawn captchas' in said and '× float32 in openvino' in said and 'float32 was the same as PyTorch' in said
    graph = onnx.load(tmp_path/'m.onnx')
    assert {entry.key: entry.value for entry in graph.metadata_props}['precision'] == 'int8'
    assert any(tensor.dims and tensor.dims[0] > 1 for tensor in graph.graph.initializer if tensor.name.endswith('_scale'))
    used = {name for node in graph.graph.node if node.op_type == 'Conv' and '/out/' in node.name for name in node.input}
    assert used and not any('DequantizeLinear' in name for name in used)
    samples = [CaptchaSynth(Config().synth, 0, 'val').draw(number) for number in range(4)]
    cost = price(model, 'points', dict(float32=points, int8=(tmp_path/'m.onnx').read_bytes()), samples)
    assert cost['moved_median_px'] > 0 and set(cost['metrics']) == {'float32', 'int8'}
    assert price(model, 'points', dict(float32=points, int8=points), samples)['moved_p95_px'] == 0


def test_int8_of_a_network_with_an_angle():
    model = lived_in(create_lite_hrnet_18_fpn(dict(CONFIG.model, angle_head=True)))
    model.config = CONFIG.to_dict()
    assert module.quantised(model, 'points', 17, [np.zeros((80, 160, 3), np.uint8)])


def test_captchas_are_drawn_where_the_runs_photographs_are_not(caplog):
    "Networks that ship were trained on photographs that do not, and on captchas that lack a point."
    run = CONFIG.override('synth.background_dir=nowhere', 'synth.backgrounds={photo: 1}', 'synth.no_gap=0.9', 'synth.no_slider=0.9')
    samples = module.drawn(SimpleNamespace(config=run.to_dict()), 6, 1)
    assert all(sample.gap and sample.slider for sample in samples)
    assert 'nowhere' in caplog.text and 'photographs of the package' in caplog.text


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model, path = lived_in(create_lite_hrnet_18_fpn(CONFIG.model)), tmp_path_factory.mktemp('weights')/'best_model.pth'
    save_checkpoint(path, dict(config=CONFIG.to_dict(), model_state_dict=model.state_dict()))
    return path


def command(capsys, *arguments):
    code = run_command(module.main.__wrapped__, [str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert 'Traceback' not in said.err
    return code, said.out, [line for line in said.err.splitlines() if line.startswith('error: ')]


def test_the_command(checkpoint, tmp_path, capsys):
    code, out, wrong = command(capsys, '--weights', checkpoint, '--out', tmp_path/'new'/'m.onnx')
    assert (code, wrong) == (0, []) and out.count('\n') == 1 and 'the same as PyTorch on 100 pictures' in out
    assert [path.name for path in (tmp_path/'new').iterdir()] == ['m.onnx']
    assert runner((tmp_path/'new'/'m.onnx').read_bytes(), 'onnxruntime', 1)(np.zeros((1, 4, H, W), np.uint8))['gap_coords'].shape == (1, 2)


def test_mistakes(checkpoint, tmp_path, capsys):
    (tmp_path/'file').touch()
    torch.save(dict(config=CONFIG.to_dict() | dict(model=dict(name='lite_hrnet_99')), model_state_dict={}), tmp_path/'newer.pth')
    weights, out = ['--weights', checkpoint], ['--out', tmp_path/'m.onnx']
    for arguments, says in ((['--weights', 'pretrain'], 'pretrain: no such weights file'), (['--weights', tmp_path/'file'], 'not a readable weights file'), (['--weights', tmp_path/'newer.pth'], 'lite_hrnet_99'),
                            ([*weights, '--opset', 9], '13 to 20'), ([*weights, '--out', tmp_path/'file'/'m.onnx'], '--out'),
                            ([*weights, '--data', tmp_path], 'only with --int8'), ([*weights, *out, '--int8', '--data', tmp_path/'no'/'*.png'], 'nothing matches'),
                            ([*weights, *out, '--int8', '--data', tmp_path], 'no picture in it'), ([*weights, *out, '--int8', '--data', tmp_path/'file'], 'not a readable picture')):
        code, _, wrong = command(capsys, *arguments)
        assert code == 1 and len(wrong) == 1 and says in wrong[0], (arguments, wrong)
    for arguments in (['--form', 'round'], ['--opset', 'x']):
        with pytest.raises(SystemExit) as stop: command(capsys, *arguments)
        assert stop.value.code == 2
    assert not (tmp_path/'m.onnx').exists()
