"""Evaluation from the command line and in a browser, and the paired test against what it should be."""
import itertools, json, shutil, subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from captcha_hrnet.config import Config, UserError, run_command
from captcha_hrnet.data import write_coco
from captcha_hrnet.engine import TrainingEngine, load_checkpoint, make_ema, save_checkpoint
from captcha_hrnet.evaluate import LEAST, Evaluation, calibrate, evaluate, evaluation_page, fit_calibration, label_values, logits_of, main, open_data, paired_test, score_metrics, scored_points, width_groups
from captcha_hrnet.model import create_lite_hrnet_18_fpn, load_model
from captcha_hrnet.predict import Predictor
from captcha_hrnet.synth import write_dataset
from captcha_hrnet.validator import metrics_of, sample_errors

SMALL = Config().override('data.input_height=64', 'data.input_width=64', 'synth.width=[96, 160]', 'synth.noise={p: 0.5}', 'synth.piece_size=[0.3, 0.4]', 'train.amp=off')


def checkpoint(path, seed=0, config=SMALL):
    torch.manual_seed(seed)
    save_checkpoint(path, dict(model_state_dict=create_lite_hrnet_18_fpn(config.model).state_dict(), config=config.to_dict()))
    return str(path)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Two checkpoints, a data folder and the same as COCO."
    home = tmp_path_factory.mktemp('evaluate')
    torch.set_num_threads(1)
    for number in range(2): checkpoint(home / f'{number}.pth', number)
    write_dataset(SMALL.synth, 3, str(home / 'data'), train=0, val=8, workers=1)
    write_coco(home / 'coco.json', [json.loads(line) for line in open(home / 'data/val/labels.jsonl')])
    return home


def run(*arguments): return run_command(main.__wrapped__, [*map(str, arguments), '--device', 'cpu', '--resamples', '20'])

def random_errors(count, seed, shift=0.):
    random = np.random.default_rng(seed)
    return sample_errors(random.normal(shift, 3, (count, 4)), np.zeros((count, 4)))


def lacking(folder, count):
    "A data folder in which gaps and slider pieces are missing; how many of each."
    write_dataset(SMALL.synth.model_copy(update=dict(no_gap=.4, no_slider=.3)), 5, str(folder), train=0, val=count, workers=1)
    records = [json.loads(line) for line in open(folder / 'val/labels.jsonl')]
    return [sum(record[key] is None for record in records) for key in ('gap', 'slider')], sum(not (record['gap'] and record['slider']) for record in records)


def test_captchas_that_lack_something_are_counted_apart(home, tmp_path, capsys):
    (gapless, bare), incomplete = lacking(tmp_path / 'data', 12)
    assert gapless and bare and incomplete < 12
    assert not run('--weights', home / '0.pth', '--data', tmp_path / 'data', '--out', tmp_path / 'out')
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result['n'], result['without_gaps'], result['without_sliders']) == (12 - incomplete, gapless, bare)
    assert [result['scores'][name]['n'] for name in ('gap', 'slider')] == [12, 12]      # a point that is not there counts as wrong
    report = json.loads((tmp_path / 'out/metrics.json').read_text())
    for kind in ('width', 'shape', 'gap_style', 'slider_style'): assert sum(group['n'] for group in report[f'by_{kind}'].values()) == 12 - incomplete
    assert f'Of the {gapless} captchas without a gap, {result["false_gaps"]:.1f} % are said to have one.' in (tmp_path / 'out/report.html').read_text()


# the paired test

def test_the_paired_test_equals_a_loop():
    a, b, resamples = random_errors(30, 0), random_errors(30, 1, 1.), 200
    random = np.random.default_rng(0)
    picks, swaps = random.integers(0, 30, (resamples, 30)), random.random((resamples, 30)) < .5
    found = paired_test(a, b, resamples)
    for name in ('mae_px', 'rmse_px', 'median_px', 'slide_hit_le_5px', 'hit_le_2px'):
        of = lambda errors, rows: float(metrics_of({key: np.array([errors[k][key][i] for k, i in rows]) for key in a})[name])
        pair = (a, b)
        difference = of(pair, [(1, i) for i in range(30)]) - of(pair, [(0, i) for i in range(30)])
        drawn = [of(pair, [(1, i) for i in pick]) - of(pair, [(0, i) for i in pick]) for pick in picks]
        chance = [of(pair, [(int(not s), i) for i, s in enumerate(swap)]) - of(pair, [(int(s), i) for i, s in enumerate(swap)]) for swap in swaps]
        as_large = sum(abs(value) > abs(difference) - 1e-9 for value in chance)
        assert found[name]['difference'] == pytest.approx(difference)
        assert found[name]['interval'] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
        assert found[name]['p'] == pytest.approx((1 + as_large)/(1 + resamples))


def test_p_is_near_the_share_of_all_arrangements():
    a, b = random_errors(9, 2), random_errors(9, 3, 1.5)
    differences = b['error'] - a['error']
    every = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=9)]
    exact = np.mean(np.array(every) >= abs(differences.sum()) - 1e-9)
    assert .01 < exact < .9
    assert paired_test(a, b, 4000)['mae_px']['p'] == pytest.approx(exact, abs=4*np.sqrt(exact*(1 - exact)/4000))


@pytest.mark.parametrize('metric', ['mae_px', 'hit_le_2px', 'median_px'])
def test_equals_are_called_different_no_more_often_than_the_level_says(metric):
    level, rounds = .1, 150
    def p(seed):
        random = np.random.default_rng(seed)
        hard = random.exponential(2, (25, 1, 1))
        found = hard*random.normal(size=(25, 2, 4))            # hard for both
        return paired_test(*(sample_errors(found[:, k], np.zeros((25, 4))) for k in (0, 1)), 39)[metric]['p']
    alarms = sum(p(seed) <= level for seed in range(rounds))
    assert alarms <= rounds*level + 3*np.sqrt(rounds*level*(1 - level))
    assert metric != 'mae_px' or alarms >= rounds*level/3         # and it is no test that never says anything


def test_a_difference_is_found():
    hard = np.random.default_rng(0).exponential(4, (60, 4))
    a, b = sample_errors(hard + .5, 0*hard), sample_errors(hard, 0*hard)
    found = paired_test(a, b, 300)['mae_px']
    assert found['p'] == pytest.approx(1/301) and found['difference'] == pytest.approx(-.5) and found['interval'][1] < 0


@settings(max_examples=15)
@given(count=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_the_other_way_round_is_the_mirror(count, seed):
    a, b = random_errors(count, seed), random_errors(count, seed + 1)
    there, back = paired_test(a, b, 30), paired_test(b, a, 30)
    for name in there:
        assert there[name]['difference'] == pytest.approx(-back[name]['difference']) and there[name]['p'] == back[name]['p'] and 0 < there[name]['p'] <= 1
        assert there[name]['interval'] == pytest.approx([-back[name]['interval'][1], -back[name]['interval'][0]])


def test_answers_that_are_no_numbers_give_no_p():
    a, b = random_errors(5, 0), random_errors(5, 1)
    b['error'][2] = np.nan
    assert np.isnan(paired_test(a, b, 10)['mae_px']['p'])


# calibration

sigmoid = lambda x: 1/(1 + np.exp(-x))


@settings(max_examples=30)
@given(slope=st.floats(.2, 5), intercept=st.floats(-2, 2), middle=st.floats(-3, 3), seed=st.integers(0, 10**6))
def test_a_fit_finds_what_there_is(slope, intercept, middle, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(middle, 2, 20_000)
    chance = sigmoid(slope*logits + intercept)
    right = random.random(20_000) < chance
    if min(right.sum(), (~right).sum()) < 1000: return    # too little to be precise
    a, b = fit_calibration(logits, right)
    assert np.abs(sigmoid(a*logits + b) - chance).mean() < .03 and a == pytest.approx(slope, rel=.15, abs=.05)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.floats(-40, 40), st.booleans()), min_size=2, max_size=80), st.floats(.01, 100), st.floats(-100, 100))
def test_a_fit_is_the_best_or_an_error(points, scale, shift):
    "Its gradient is zero; it does not depend on the scale of what it is given; and nothing makes it fail in another way."
    logits, right = (np.array(column) for column in zip(*points))
    try: slope, intercept = fit_calibration(logits, right)
    except UserError as error:
        assert min(right.sum(), (~right).sum()) < LEAST or 'all the same' in str(error) or 'not more often right' in str(error)
        return
    assert np.isfinite([slope, intercept]).all() and slope > 0
    target = np.where(right, (right.sum() + 1)/(right.sum() + 2), 1/((~right).sum() + 2))
    apart = sigmoid(np.clip(slope*logits + intercept, -500, 500)) - target
    assert abs(apart.sum()) < 1e-5 and abs((apart*(logits - logits.mean())/logits.std()).sum()) < 1e-5
    if np.ptp(logits) > .01:
        again = fit_calibration(scale*logits + shift, right)
        np.testing.assert_allclose(again[0]*(scale*logits + shift) + again[1], slope*logits + intercept, atol=1e-4)


def test_scores_that_boast_are_brought_down():
    random = np.random.default_rng(0)
    score = sigmoid(random.normal(4, 2, 3000)).astype(np.float32)
    points = {name: (score, random.random(3000) < sigmoid(.5*logits_of(score) - 1)) for name in ('gap', 'slider')}
    model = create_lite_hrnet_18_fpn(SMALL.model)
    after = calibrate(model, points)
    before, now = score_metrics(points)['gap'], score_metrics(after)['gap']
    assert before['ece'] > .2 and now['ece'] < .03 and now['brier'] < before['brier'] and now['n'] == before['n'] == 3000
    assert (np.diff(after['gap'][0][np.argsort(score, kind='stable')]) >= 0).all()
    np.testing.assert_allclose(model.calibration, [[.5, -1]]*2, atol=.1)
    calibrate(model, {name: (after[name][0].astype(np.float32), points[name][1]) for name in points})     # on top of that there is nothing to do
    np.testing.assert_allclose(model.calibration, [[.5, -1]]*2, atol=.1)


def test_a_point_that_cannot_be_fitted_keeps_its_scores(caplog):
    random, model = np.random.default_rng(0), create_lite_hrnet_18_fpn(SMALL.model)
    score = random.random(400)
    points = dict(gap=(score, random.random(400) < .5*score), slider=(score, np.ones(400, bool)))
    after = calibrate(model, points)
    assert model.calibration[1].tolist() == [1, 0] and model.calibration[0].tolist() != [1, 0] and 'slider: 400 right and 0 wrong points' in caplog.text
    np.testing.assert_allclose(after['slider'][0], score, atol=1e-6)
    with pytest.raises(UserError, match='nothing to calibrate with: gap: 400 right and 0 wrong points; at least 5'): calibrate(model, dict(gap=points['slider']))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=100))
def test_what_scores_are_worth_has_bounds(points):
    score, right = (np.array(column) for column in zip(*points))
    found = score_metrics(dict(a=(score, right)))['a']
    assert 0 <= found['ece'] <= 1 and 0 <= found['brier'] <= 1 and found['n'] == len(score)
    assert score_metrics(dict(a=(right.astype(float), right)))['a'] | dict(right=0) == dict(n=len(score), right=0, ece=0, brier=0)


def settled(path):
    "A checkpoint of a network whose norms have seen pictures, so that its answers lie in them."
    torch.manual_seed(0)
    model = create_lite_hrnet_18_fpn(SMALL.model)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d): part.momentum = 1.
    with torch.no_grad(): model(torch.randint(0, 256, (8, 4, 64, 64), dtype=torch.uint8))
    save_checkpoint(path, dict(model_state_dict=model.state_dict(), config=SMALL.to_dict()))
    return path


def agreeing(folder, weights, count=40):
    "A data folder that a network is right about more often the surer it is: its own answers are the truth, or are not."
    write_dataset(SMALL.synth, 9, str(folder), train=0, val=count, workers=1)
    file, model, random = folder / 'val/labels.jsonl', load_model(weights), np.random.default_rng(0)
    with open_data(folder, input_width=64, input_height=64) as dataset: predictions = evaluate(model, dataset, resamples=0).predictions
    records = [json.loads(line) for line in open(file)]
    for column, name in ((0, 'gap'), (1, 'slider')):
        rank = predictions.scores[:, column].argsort().argsort()/count
        for record, found, true in zip(records, predictions.found[:, 2*column:2*column + 2], random.random(count) < rank):
            size = np.array([record['width'], record['height']])
            record[name] = np.clip(found if true else (found + size/2) % size, .5, size - .5).tolist()
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return folder


def test_calibrating_from_the_command_line(tmp_path, capsys):
    weights, new = settled(tmp_path / 'net.pth'), tmp_path / 'new/calibrated.safetensors'
    data = agreeing(tmp_path / 'data', weights)
    assert not run('--weights', weights, '--data', data, '--calibrate', new, '--out', tmp_path / 'out')
    out = capsys.readouterr().out
    said = json.loads(out.splitlines()[-1])
    assert 'gap, calibrated' in out and str(new) in out and said == json.loads((tmp_path / 'out/metrics.json').read_text())
    assert '>calibrated<' in (tmp_path / 'out/report.html').read_text()      # the second curve
    model = load_model(new)
    assert model.calibration.tolist() == [said['calibration'][name] for name in ('gap', 'slider')] != [[1, 0], [1, 0]]
    assert model.config == load_model(weights).config and '40 captchas' in model.facts['calibrated_on']
    assert list(new.parent.iterdir()) == [new]
    for name in ('gap', 'slider'):
        before, after = said['scores'][name], said['calibrated_scores'][name]
        assert after['brier'] < before['brier'] and after['ece'] < before['ece'] and before['n'] == after['n'] == 40
    assert not run('--weights', new, '--data', data)       # the file gives what was promised
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ('gap', 'slider'): assert again['scores'][name]['brier'] == pytest.approx(said['calibrated_scores'][name]['brier'], abs=1e-4)
    with open_data(data, input_width=64, input_height=64) as dataset: sure = evaluate(model, dataset, resamples=0)
    answers = Predictor(model, 'cpu', 0.)([str(data / 'val' / name) for name in sure.predictions.names])
    np.testing.assert_allclose([[answer.gap_score, answer.slider_score] for answer in answers], sure.predictions.scores, atol=2e-3)
    assert not run('--weights', weights, '--data', data, '--calibrate', tmp_path / 'twice.safetensors', '--contrast', 'on')
    twice = load_model(tmp_path / 'twice.safetensors')     # what looks again is fitted to a first look as well
    assert twice.contrast and not model.contrast and torch.equal(twice.calibration, model.calibration)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['scores'] == said['scores']


@pytest.mark.parametrize('arguments, said', [
    (['--calibrate', 'new.pth'], '--calibrate new.pth: the name must end in .safetensors'),
    (['--calibrate', 'there.safetensors'], '--calibrate there.safetensors: is there already'),
    (['--calibrate', 'coco.json/new.safetensors'], "--calibrate: value 'coco.json': must be a folder"),
    (['--calibrate', 'new.safetensors', '--compare', '1.pth'], '--calibrate: one network at a time'),
    (['--calibrate', 'new.safetensors'], 'nothing to calibrate with: gap: '),
])
def test_what_cannot_be_calibrated_is_told(home, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(home)
    (home / 'there.safetensors').touch()
    assert run('--weights', '0.pth', '--data', 'data', *arguments) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith('error: ') and len(error.splitlines()) == 1 and not (home / 'new.safetensors').exists()


def test_training_keeps_a_calibration_and_reads_files_without_one(tmp_path):
    model = create_lite_hrnet_18_fpn(SMALL.model)
    model.calibration.copy_(torch.tensor([[.7, -1.3], [1.1, .2]]))
    ema = make_ema(model, .9)
    for _ in range(5): ema.update_parameters(model)
    assert torch.equal(ema.module.calibration, model.calibration)
    engine = TrainingEngine(create_lite_hrnet_18_fpn(SMALL.model), SMALL, 'cpu')
    state = engine.state_dict()
    for key in ('model_state_dict', 'ema_state_dict'): del state[key]['calibration']
    save_checkpoint(tmp_path / 'old.pth', state)
    engine.load_state_dict(load_checkpoint(tmp_path / 'old.pth'))
    for part in (engine.model, engine.ema.module): assert part.calibration.tolist() == [[1, 0], [1, 0]]


# groups

@given(st.lists(st.integers(16, 4096), min_size=1, max_size=60), st.integers(1, 6))
def test_each_picture_is_in_one_group_of_widths(widths, most):
    groups = width_groups(np.array(widths), most)
    assert (sum(members.astype(int) for members in groups.values()) == 1).all() and len(groups) <= most and all(members.any() for members in groups.values())


def test_label_values_follow_the_samples(home, tmp_path):
    shutil.copytree(home / 'data', tmp_path / 'data')
    lines = (tmp_path / 'data/val/labels.jsonl').read_text().splitlines()
    lines[2:3] = ['', 'broken', lines[2]]
    lines[0] = '\ufeff' + json.dumps(json.loads(lines[0]) | dict(shape='first'))
    (tmp_path / 'data/val/labels.jsonl').write_text('\n'.join(lines), 'utf-8')
    with open_data(tmp_path / 'data', on_bad_sample='skip') as dataset:
        assert label_values(dataset, 'image')['image'] == [dataset.labels.name(row) for row in dataset.rows] and len(dataset) == 8
        values = label_values(dataset, 'shape', 'none such')
        assert values['shape'][0] == 'first' and values['none such'] == [None]*8
        assert [line for line, _ in dataset.labels.rejected] == [4]


# the command line

def test_command_line(home, tmp_path):
    arguments = ['--weights', '0.pth', '--compare', '1.pth', '--data', 'data', '--out', str(tmp_path / 'new/out'), '--device', 'cpu', '--resamples', '50']
    done = subprocess.run([sys.executable, '-m', 'captcha_hrnet.evaluate', *arguments], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, saved = json.loads(done.stdout.splitlines()[-1]), json.loads((tmp_path / 'new/out/metrics.json').read_text())
    assert said == saved and said['n'] == 8 and said['interval']['hit_le_5px'][0] <= said['hit_le_5px'] <= said['interval']['hit_le_5px'][1]
    for kind in ('width', 'shape', 'gap_style', 'slider_style'): assert sum(group['n'] for group in said[f'by_{kind}'].values()) == 8
    assert said['difference']['mae_px']['difference'] == pytest.approx(said['compare']['mae_px'] - said['mae_px'])
    assert said['weights'] == '0.pth' and said['compare']['weights'] == '1.pth' and said['rejected'] == []


@pytest.mark.parametrize('name', ['slider_left', 'contrast'])
def test_how_to_look_is_told_here_or_in_the_configuration(home, tmp_path, capsys, name):
    configured, said = checkpoint(tmp_path / 'told.pth', 1, SMALL.override(f'model.{name}=true')), []
    for arguments in ([home / '1.pth'], [home / '1.pth', f'--{name}', *['on']*(name == 'contrast')], [configured]):
        assert run('--data', home / 'data', '--weights', *arguments) == 0
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        del said[-1]['weights']
    assert [each.pop(name) for each in said] == [False, True, True]
    assert said[1] == said[2] and (said[1] != said[0] or name == 'contrast')   # asked again it may say the same


def test_one_look_is_enough_if_so_told(home, tmp_path, capsys):
    twice, said = checkpoint(tmp_path / 'twice.pth', 1, SMALL.override('model.contrast=true')), []
    for arguments in ([home / '1.pth'], [twice, '--contrast', 'off']):
        assert run('--data', home / 'data', '--weights', *arguments) == 0
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]) | dict(weights=None))
    assert said[0] == said[1] and said[0]['contrast'] is False


def test_coco_gives_the_same_numbers(home, capsys):
    said = []
    for data in (['--data', home / 'data'], ['--data', home / 'coco.json', '--images', home / 'data/val']):
        assert run('--weights', home / '0.pth', *data) == 0
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert {key: value for key, value in said[0].items() if key != 'data'} == {key: value for key, value in said[1].items() if key != 'data'}


def test_what_is_left_out_is_told(home, tmp_path, capsys, caplog):
    shutil.copytree(home / 'data', tmp_path / 'data')
    (tmp_path / 'data/val/images/000003.png').write_bytes(b'no picture')
    assert run('--weights', home / '0.pth', '--data', tmp_path / 'data') == 1
    assert 'labels.jsonl:4:' in capsys.readouterr().err
    for data in (['--data', tmp_path / 'data'], ['--data', home / 'coco.json', '--images', tmp_path / 'data/val']):
        caplog.clear()
        assert run('--weights', home / '0.pth', *data, '--on_bad_sample', 'skip', '--out', tmp_path / 'out') == 0
        out = capsys.readouterr().out
        said = json.loads(out.splitlines()[-1])
        assert said['n'] == 7 and '1 left out' in out and [bad['line'] for bad in said['rejected']] == [4]
        assert str(tmp_path / 'data/val/images/000003.png') in said['rejected'][0]['reason'] and 'left out' in caplog.text
        assert '1 samples were left out' in (tmp_path / 'out/report.html').read_text()


@pytest.mark.parametrize('arguments, said', [
    (['--weights', 'none.pth', '--data', 'data'], 'none.pth: no such weights file'),
    (['--weights', 'coco.json', '--data', 'data'], 'coco.json: not a readable weights file'),
    (['--weights', 'pretrain', '--data', 'data'], 'pretrain: no such weights file'),
    (['--weights', '0.pth', '--data', 'nowhere'], 'nowhere/val: no such folder'),
    (['--weights', '0.pth', '--data', 'data', '--split', 'train'], "data needs one named 'train'"),
    (['--weights', '0.pth', '--data', '.', '--split', 'data'], 'data/labels.jsonl: no such file'),
    (['--weights', '0.pth', '--data', '0.pth'], '0.pth: not JSON'),
    (['--weights', '0.pth', '--data', 'coco.json', '--images', 'nowhere'], 'nowhere/images/000000.png: no such file'),
    (['--weights', '0.pth', '--data', 'data', '--out', 'coco.json/out'], "out: value 'coco.json/out': must be a folder that can be written to"),
    (['--weights', '0.pth', '--data', 'data', '--batch_size', '0'], '--batch_size 0'),
    (['--weights', '0.pth', '--data', 'data', '--device', 'cuda:77'], 'cuda:77 does not exist here'),
])
def test_mistakes_are_told(home, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(home)
    assert run_command(main.__wrapped__, ['--device', 'cpu', *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and 'Traceback' not in error and error.startswith('error: ')


def test_bad_usage(home, capsys):
    for arguments in ([], ['--weights', '0.pth', '--on_bad_sample', 'hide'], ['--weights', '0.pth', '--bach_size', '3']):
        with pytest.raises(SystemExit) as ended: run_command(main.__wrapped__, arguments)
        assert ended.value.code == 2


# the page

class Nothing:
    def __init__(self, names): self.names = names
    def name(self, i): return self.names[i]


def page_of(names, **options):
    "A report of made-up answers on grey pictures."
    from captcha_hrnet.validator import group_metrics
    from captcha_hrnet.widget import Predictions
    def evaluation(name, seed):
        random, count = np.random.default_rng(seed), len(names)
        true = np.tile([120., 30, 20, 30], (count, 1))
        rows = dict(index=np.arange(count), true=true, found=true + random.normal(0, 4, true.shape), scores=random.random((count, 2)), has_noise=np.arange(count) % 2 > 0)
        predictions = Predictions(rows, Nothing(names), name=name)
        predictions.picture = lambda row: np.full((64, 160, 3), 90, np.uint8)
        metrics = group_metrics(rows, 20)
        return Evaluation(name, predictions, metrics, dict(flag={}, width={'160 px': metrics}, shape={names[0]: metrics}), [(3, names[0])], scored_points([rows]))
    a, b = evaluation('<u>first</u>', 0), evaluation('second', 1)
    return evaluation_page(a, b, paired_test(a.predictions.errors, b.predictions.errors, 20), 'Mine & <yours>', **options)


def test_page_in_a_browser(tmp_path):
    playwright = pytest.importorskip('playwright.sync_api')
    if not shutil.which('chromium'): pytest.skip('no chromium on the path')
    flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    evil = '<img src=x onerror="document.title=\'taken\'">'
    (tmp_path / 'page.html').write_text(page_of([evil, '"><script>document.title="taken"</script>', 'plain.png'], pictures=3), 'utf-8')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=flags)
        for width, scheme in ((1200, 'light'), (360, 'dark')):
            page, wrong = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme), []
            page.on('request', lambda request: request.url.startswith(('file:', 'data:', 'about:')) or wrong.append(request.url))
            page.on('console', lambda message: wrong.append(message.text))
            page.on('pageerror', lambda error: wrong.append(str(error)))
            page.goto((tmp_path / 'page.html').as_uri())
            page.locator('summary').click()
            page.frame_locator('iframe').locator('#grid button').nth(2).wait_for()
            assert page.title() == page.inner_text('h1') == 'Mine & <yours>' and page.locator('img').count() == 0
            assert page.evaluate('document.documentElement.scrollWidth') <= width
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(part => part < 90)")
            assert dark == (scheme == 'dark')
            assert page.locator('svg[role=img]').evaluate_all('all => all.every(e => e.getAttribute("aria-label"))')
            assert page.locator('.chart').count() == 4 and page.locator('.chart').first.bounding_box()['width'] > 250
            assert wrong == []
            page.close()
        browser.close()
