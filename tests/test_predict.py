"Predictions: any picture in any company, typed answers in its own pixels, and a command that loses nothing."
import io, json, os, subprocess, sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captcha_hrnet.config import Config, UserError
from captcha_hrnet.engine import save_checkpoint
from captcha_hrnet.geometry import Letterbox, letterbox_image, unletterbox
from captcha_hrnet.model import create_lite_hrnet_18_fpn
from captcha_hrnet.predict import Prediction, Predictor, as_pixels, find_images, letterboxed, turned
from toys import Toy

H, W = 64, 128
CONFIG = Config(data=dict(input_height=H, input_width=W), model=dict(name='naive_lite_hrnet_18', neck_channels=16, head_channels=16))
pytestmark = pytest.mark.usefixtures('one_thread')


class Network(Toy):
    "The toy with what a loaded network has."
    def __init__(self):
        super().__init__(norm=True)
        self.in_channels, self.config = 4, CONFIG.to_dict()


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(3)
    return Network().eval()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights')/'best_model.pth'
    save_checkpoint(path, dict(config=CONFIG.to_dict(), model_state_dict=create_lite_hrnet_18_fpn(CONFIG.model).state_dict()))
    return path


def noise(width, height, seed=0): return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


sizes = st.tuples(st.integers(16, 300), st.integers(16, 300))


@settings(max_examples=25)
@given(company=st.lists(sizes, min_size=1, max_size=9), place=st.integers(0, 8), batch_size=st.integers(1, 9))
def test_an_answer_does_not_depend_on_its_company(model, company, place, batch_size):
    pictures = [noise(*size, seed) for seed, size in enumerate(company)]
    place %= len(pictures)
    alone = Predictor(model, 'cpu', 0.)(pictures[place])
    among = Predictor(model, 'cpu', 0., batch_size)(pictures)[place]
    assert among.gap == pytest.approx(alone.gap, abs=1e-3) and among.slider == pytest.approx(alone.slider, abs=1e-3)


@settings(max_examples=25)
@given(size=sizes, seed=st.integers(0, 99))
def test_an_answer_is_what_the_network_decodes_taken_home(model, size, seed):
    "By the longest way: one picture, letterbox, network, decoding, and back."
    picture = noise(*size, seed)
    box = Letterbox(*size, W, H)
    with torch.no_grad(): found = model.decode_predictions(model(torch.from_numpy(letterbox_image(picture, box))[None]))
    answer = Predictor(model, 'cpu', 0.)(picture)
    for name in ('gap', 'slider'):
        assert getattr(answer, name) == pytest.approx(unletterbox(found[f'{name}_coords'], box.params)[0].tolist(), abs=1e-3)
        assert [c[2] for c in answer.candidates[name]] == sorted((c[2] for c in answer.candidates[name]), reverse=True)
        assert any(c[:2] == pytest.approx(getattr(answer, name), abs=1e-3) for c in answer.candidates[name])   # the first, unless both points would be one place
    assert answer.distance == answer.gap[0] - answer.slider[0]


@settings(max_examples=25)
@given(size=sizes, seed=st.integers(0, 99), share=st.floats(.01, .99))
def test_a_lone_point_owes_nothing_to_the_other(model, size, seed, share):
    "Two points are those of the pair, wherever that puts them; where one alone reaches the threshold, it is the best of its own map."
    class Moved:
        "Decodes as the network does, and moves what it takes for a pair."
        def __getattr__(self, name): return getattr(model, name)
        def __call__(self, image): return model(image)
        def decode_predictions(self, outputs):
            found = model.decode_predictions(outputs)
            return found | {name: found[name] + 7 for name in ('gap_coords', 'slider_coords')}
    predictor, picture = Predictor(model, 'cpu', 0.), noise(*size, seed)
    predictor.model = Moved()
    both = predictor(picture)
    low, high = sorted((both.gap_score, both.slider_score))
    predictor.threshold = low + share*(high - low)
    lone = predictor(picture)
    for name in ('gap', 'slider'):
        first = both.candidates[name][0]
        if getattr(both, f'{name}_score') < predictor.threshold: assert getattr(lone, name) is None
        elif low < predictor.threshold: assert getattr(lone, name) == first[:2] != getattr(both, name)
        else: assert getattr(lone, name) == getattr(both, name)


def test_a_real_checkpoint_alone_and_in_a_batch(checkpoint):
    predictor, pictures = Predictor(checkpoint, 'cpu', 0.), [noise(100 + 30*k, 80, k) for k in range(3)]
    for one, other in zip(predictor(pictures), map(predictor, pictures)):
        assert one.gap == pytest.approx(other.gap, rel=1e-4, abs=1e-3) and one.slider == pytest.approx(other.slider, rel=1e-4, abs=1e-3)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_turning_maps_mirrors_points(seed, rows, columns):
    "Decoded after turning, the points are those of before, mirrored; turned twice, the maps are the same."
    model, generator = Network(), torch.Generator().manual_seed(seed)
    draw = lambda channels: torch.randn(1, channels, 8*rows, 8*columns, generator=generator)
    maps = dict(gap_heatmap=draw(1), slider_heatmap=draw(1), offsets=draw(4), valid=torch.ones(1, 1, 8*rows, 8*columns, dtype=torch.bool))
    before, after = model.decode_predictions(maps), model.decode_predictions(maps | turned(maps))
    for name in ('gap', 'slider'):
        mirrored = before[f'{name}_coords']*torch.tensor([1., -1]) + torch.tensor([0., 32*rows])
        torch.testing.assert_close(after[f'{name}_coords'], mirrored)
    again = turned(turned(maps))
    assert all(torch.equal(again[name], maps[name]) for name in again)


def test_flip_averaging_is_equivariant(model):
    "With flip, the answer for a picture upside down is the answer mirrored: what the plain network can't promise."
    picture = noise(W, H, 5)
    predictor = Predictor(model, 'cpu', 0., flip=True)
    upright, other = predictor(picture), predictor(np.ascontiguousarray(picture[::-1]))
    assert other.gap == pytest.approx((upright.gap[0], H - upright.gap[1]), abs=1e-3)
    plain = Predictor(model, 'cpu', 0.)
    assert plain(np.ascontiguousarray(picture[::-1])).gap != pytest.approx((plain(picture).gap[0], H - plain(picture).gap[1]), abs=1e-3)


def test_a_slider_that_is_known_to_be_left(model):
    pictures = [noise(W, H, seed) for seed in range(24)]
    free, told = (Predictor(model, 'cpu', 0., slider_left=left)(pictures) for left in (False, True))
    assert all(answer.slider[0] < answer.gap[0] for answer in told) and not all(answer.slider[0] < answer.gap[0] for answer in free)
    assert all(b.gap == a.gap and b.slider == a.slider for a, b in zip(free, told) if a.slider[0] < a.gap[0])


@given(threshold=st.floats(0, 1))
@settings(max_examples=20)
def test_below_the_threshold_is_none(model, threshold):
    answer = Predictor(model, 'cpu', threshold)(noise(W, H))
    assert (answer.gap is None) == (answer.gap_score < threshold) and (answer.slider is None) == (answer.slider_score < threshold)
    assert (answer.distance is None) == (answer.gap is None or answer.slider is None)
    assert answer.error is None and json.loads(json.dumps(answer.to_dict(), allow_nan=False))['gap_score'] == round(answer.gap_score, 3)


def test_weights_that_are_not_finite_are_an_error_and_no_answer():
    model = Network().eval()
    model.head.weight.data[0, 0] = float('nan')
    answer = Predictor(model, 'cpu', 0.)(noise(W, H))
    assert 'not finite' in answer.error and answer.gap is None and set(answer.to_dict()) == {'image', 'error'}


def test_every_form_of_a_picture_gives_the_same_pixels(tmp_path):
    picture = noise(40, 30)
    Image.fromarray(picture).save(tmp_path/'a.png')
    content = (tmp_path/'a.png').read_bytes()
    clear = np.dstack([picture, np.full((30, 40), 0, np.uint8)])
    for form in (str(tmp_path/'a.png'), tmp_path/'a.png', content, bytearray(content), memoryview(content), Image.open(tmp_path/'a.png'), picture):
        assert (as_pixels(form, 'x') == picture).all()
    assert (as_pixels(picture[..., ::-1], 'x', bgr=True) == picture).all() and (as_pixels(cv2.imread(str(tmp_path/'a.png')), 'x', bgr=True) == picture).all()
    assert (as_pixels(clear, 'x') == 255).all()   # transparent: the white page behind it
    assert (as_pixels(picture[..., 0].astype(np.uint16)*257, 'x') == picture[..., :1]).all() and (as_pixels(picture[..., :1], 'x') == picture[..., :1]).all()


@pytest.mark.parametrize('source, says', [(noise(8, 8), '8×8 px'), (np.zeros((5000, 20), np.uint8), '20×5000'), (np.zeros((0, 20, 3), np.uint8), 'no pixels'),
    (noise(40, 40)/255, 'float64'), (np.zeros((40, 40, 2), np.uint8), '[40, 40, 2]'), (np.zeros((2, 40, 40, 3), np.uint8), '[2, 40, 40, 3]'), (np.zeros(9, np.uint8), '[9]'),
    (None, 'NoneType'), (7, 'int'), (b'', 'not a readable'), (b'\x89PNG', 'not a readable'), ('a\0b', 'a')])
def test_what_is_no_picture_is_a_line(model, source, says):
    answers = Predictor(model, 'cpu')([source, noise(W, H)])
    assert says in answers[0].error and '\n' not in answers[0].error and answers[1].error is None
    assert answers[0].image == ('a\0b' if isinstance(source, str) else 'picture 0') and answers[0].gap is None


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_bytes_are_an_answer_or_a_line(model, data):
    content = bytearray(PNG)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)): content[place] = data.draw(st.integers(0, 255))
    answer = Predictor(model, 'cpu', 0.)(bytes(content[:data.draw(st.integers(0, len(content)))]))
    assert (answer.error is None) == (answer.gap is not None)


buffer = io.BytesIO(); Image.fromarray(noise(40, 30)).save(buffer, 'PNG'); PNG = buffer.getvalue()


def test_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('d/b.png', 'd/a.JPG', 'd/e/c.webp', '[x].png'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(PNG)
    Path('d/labels.jsonl').touch(); Path('empty').mkdir()
    names = lambda *named: [name for name, _, error in find_images(named) if error is None]
    assert names('d') == ['d/a.JPG', 'd/b.png', 'd/e/c.webp'] and names('d/*.png', '[x].png') == ['d/b.png', '[x].png'] and names('d/**/c*') == ['d/e/c.webp']
    assert [error for _, _, error in find_images(['empty', 'no/*.png'])] == ['empty: no picture in it', 'no/*.png: nothing matches']
    assert names('nowhere.png') == ['nowhere.png']   # its reader says that it isn't there


def test_a_folder_that_cannot_be_read_is_a_line(tmp_path, monkeypatch):
    walk = os.walk
    def closed(name, onerror=None):
        yield from walk(name)
        onerror(PermissionError(13, 'Permission denied', f'{name}/secret'))
    (tmp_path/'a.png').write_bytes(PNG)
    monkeypatch.setattr('os.walk', closed)
    assert find_images([tmp_path]) == [(f'{tmp_path}/a.png', f'{tmp_path}/a.png', None), (f'{tmp_path}/secret', f'{tmp_path}/secret', f'{tmp_path}/secret: Permission denied')]


def test_forms_of_the_call(model, tmp_path):
    (tmp_path/'a.png').write_bytes(PNG)
    predictor = Predictor(model, 'cpu')
    assert isinstance(predictor(tmp_path/'a.png'), Prediction) and isinstance(predictor([tmp_path/'a.png']), list)
    assert [answer.image for answer in predictor(tmp_path)] == [answer.image for answer in predictor(str(tmp_path/'*.png'))] == [str(tmp_path/'a.png')]
    assert predictor([]) == [] and ['nothing matches' in answer.error for answer in predictor(str(tmp_path/'*.gif'))] == [True]


def test_a_stream_holds_one_batch(model, monkeypatch):
    "Nothing is read before its batch is asked for."
    read = []
    monkeypatch.setattr('captcha_hrnet.predict.as_pixels', lambda source, name, bgr: read.append(name) or noise(W, H))
    stream = Predictor(model, 'cpu', batch_size=3).stream(find_images([b'x']*10**4))
    next(stream)
    assert len(read) == 3
    for _ in range(3): next(stream)
    assert len(read) == 6


def test_drawings(model):
    for answer in (Prediction('a', (30., 20.), (10., 20.), 1., 1., pixels=noise(W, H)), Prediction('b', (30., 20.), None, 1., 0., pixels=noise(W, H))):
        changed = (answer.draw() != Prediction('c', pixels=answer.pixels).draw()).any(-1)
        assert changed[60, 90] and changed[60, 30] == (answer.slider is not None)   # drawn three times as large
        assert Image.open(io.BytesIO(answer.encoded())).size == (3*W, 3*H)
    tall = Prediction('tall', (8., 4000.), (8., 20.), 1., 1., pixels=noise(16, 4096))
    assert Image.open(io.BytesIO(tall.encoded('.jpg'))).size == (64, 16384)   # no more than a JPEG can hold
    assert '&lt;b&gt;' in Prediction('x', error='<b>')._repr_html_() and '&lt;b&gt;' in Prediction('<b>', gap_score=0., slider_score=0., pixels=noise(W, H))._repr_html_()


@pytest.mark.parametrize('options, says', [(dict(threshold=1.5), 'threshold'), (dict(threshold=float('nan')), 'threshold'), (dict(batch_size=0), 'batch_size'), (dict(device='cuda:77'), 'cuda:77')])
def test_options_out_of_range(model, options, says):
    with pytest.raises(UserError, match=says): Predictor(model, **dict(device='cpu') | options)


def test_letterboxed_keeps_the_channels_that_are_asked_for():
    for channels in (3, 4): assert letterboxed([noise(50, 20), noise(20, 50)], (H, W), channels)[0].shape == (2, channels, H, W)


def test_three_channel_networks_predict():
    config = CONFIG.override('model.in_channels=3')
    model = create_lite_hrnet_18_fpn(config.model).eval()
    model.config = config.to_dict()
    assert Predictor(model, 'cpu', 0.)(noise(90, 50)).error is None


def run(*arguments, folder): return subprocess.run([sys.executable, '-m', 'captcha_hrnet.predict', *map(str, arguments)], capture_output=True, text=True, cwd=folder)


def test_the_command(checkpoint, tmp_path):
    "One line a picture in order; equal names in different folders have two drawings; errors in their place, on standard error and in the exit code."
    for name in ('a/x.png', 'b/x.png'):
        (tmp_path/name).parent.mkdir()
        (tmp_path/name).write_bytes(PNG)
    (tmp_path/'b/torn.png').write_bytes(PNG[:60])
    done = run('a', 'b', 'nowhere.png', '--weights', checkpoint, '--out', 'out', '--device', 'cpu', '--threshold', '0', folder=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert [line['image'] for line in lines] == [os.path.join(*path) for path in (('a', 'x.png'), ('b', 'torn.png'), ('b', 'x.png'), ('nowhere.png',))]
    assert [set(line) == {'image', 'error'} for line in lines] == [False, True, False, True]
    assert set(lines[0]) == {'image', 'gap', 'slider', 'distance', 'gap_score', 'slider_score', 'candidates', 'picture'}
    assert [line for line in done.stderr.splitlines() if line.startswith('error: ')][-1] == 'error: 2 of 4 pictures could not be answered'
    pictures = {line['picture'] for line in lines if 'picture' in line}
    assert len(pictures) == 2 and {str(path.relative_to(tmp_path)) for path in (tmp_path/'out').iterdir()} == pictures


@pytest.mark.parametrize('said, expected', [([], [False, True]), (['--contrast', 'on'], [True, True]), (['--contrast', 'off'], [False, False])])
def test_who_looks_once_more(checkpoint, tmp_path, monkeypatch, said, expected):
    "What the command line says, else what the network was saved with, of one that is never sure."
    from captcha_hrnet import model as network
    from captcha_hrnet.config import run_command
    from captcha_hrnet.predict import main
    (tmp_path/'a.png').write_bytes(PNG)
    saved, plain, looked = torch.load(checkpoint, weights_only=True), network.raised_contrast, []
    saved['model_state_dict']['calibration'] = torch.tensor([[1e-9, 0.], [1e-9, 0.]])   # every score is a half
    monkeypatch.setattr(network, 'raised_contrast', lambda image: looked.append(image) or plain(image))
    for contrast, again in zip((False, True), expected):
        saved['config']['model']['contrast'] = contrast
        torch.save(saved, tmp_path/'saved.pth')
        assert run_command(main.__wrapped__, [str(tmp_path/'a.png'), '--weights', str(tmp_path/'saved.pth'), '--device', 'cpu', *said]) == 0
        assert bool(looked) is again
        looked.clear()


def test_mistakes_on_the_command_line(checkpoint, tmp_path, capsys):
    from captcha_hrnet.config import run_command
    from captcha_hrnet.predict import main
    (tmp_path/'a.png').write_bytes(PNG); (tmp_path/'file').touch()
    torch.save(dict(config=CONFIG.to_dict() | dict(model=dict(name='lite_hrnet_99')), model_state_dict={}), tmp_path/'newer.pth')
    picture, weights = str(tmp_path/'a.png'), ['--weights', str(checkpoint)]
    for arguments, says in (([picture, '--weights', 'pretrain'], 'pretrain: no such weights file'), ([picture, '--weights', str(tmp_path/'file')], 'not a readable weights file'),
                            ([picture, '--weights', str(tmp_path/'newer.pth')], 'lite_hrnet_99'), ([picture, '--weights', 'none.pth'], 'no such weights file'),
                            ([picture, *weights, '--out', str(tmp_path/'file'/'x')], '--out'), ([str(tmp_path/'*.gif'), *weights], 'nothing matches'),
                            ([picture, *weights, '--threshold', '2'], 'threshold'), ([picture, *weights, '--device', 'tpu'], "device: value 'tpu': "), ([str(tmp_path/'a\nerror: b.png'), *weights], 'a\\nerror: b.png: no such file'), ([picture, *weights, '--out', ''], '--out: must name a folder')):
        assert run_command(main.__wrapped__, arguments) == 1
        said = capsys.readouterr().err
        assert says in said and all(line.startswith('error: ') for line in said.splitlines() if line.strip()), said
    for arguments in ([], [picture, '--threshold', 'high'], [picture, '--sing']):
        with pytest.raises(SystemExit) as stop: run_command(main.__wrapped__, arguments)
        assert stop.value.code == 2
