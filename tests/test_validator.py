"""What the validator's notebook can't hold: metrics, intervals and decisions against slow twins, whatever the batches and processes."""
import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from captcha_hrnet import validator as module
from captcha_hrnet.config import Config, UserError
from captcha_hrnet.geometry import Letterbox, letterbox
from captcha_hrnet.validator import HIT_PX, Validator, bootstrap_intervals, direction, gather_rows, group_metrics, metrics_of, sample_errors
from toys import HEIGHT, WIDTH, Toy, batch_of

torch.set_num_threads(1)
NAMES = {'mae_px', 'rmse_px', 'gap_mae', 'slider_mae', 'slide_mae', 'median_px', 'p95_px',
         *(f'{kind}hit_le_{t}px' for kind in ('', 'slide_') for t in HIT_PX)}


# metrics

def percentile(values, share):
    "With straight lines between the sorted values."
    values, place = sorted(values), share/100*(len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low)*(values[min(low + 1, len(values) - 1)] - values[low])


def slow_metrics(found, true):
    errors, gaps, sliders, slides, squares = [], [], [], [], []
    for (gx, gy, sx, sy), (tgx, tgy, tsx, tsy) in zip(found, true):
        gap, slider = (abs(gx - tgx) + abs(gy - tgy)) / 2, (abs(sx - tsx) + abs(sy - tsy)) / 2
        gaps.append(gap)
        sliders.append(slider)
        errors.append((gap + slider) / 2)
        slides.append(abs((gx - sx) - (tgx - tsx)))
        squares += [(gx - tgx)**2, (gy - tgy)**2, (sx - tsx)**2, (sy - tsy)**2]
    result = dict(mae_px=statistics.fmean(errors), rmse_px=math.sqrt(statistics.fmean(squares)), gap_mae=statistics.fmean(gaps),
                  slider_mae=statistics.fmean(sliders), slide_mae=statistics.fmean(slides), median_px=statistics.median(errors), p95_px=percentile(errors, 95))
    for limit in (1, 2, 5):
        result[f'hit_le_{limit}px'] = 100*sum(error <= limit for error in errors)/len(errors)
        result[f'slide_hit_le_{limit}px'] = 100*sum(slide <= limit for slide in slides)/len(slides)
    return result


halves = st.integers(-2000, 2000).map(lambda n: n/4)   # exact in binary: errors of exactly 1, 2 and 5 px occur
points = st.tuples(halves, halves, halves, halves)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(points, st.tuples(*[st.sampled_from([-8., -5., -2., -1., -.25, 0., .5, 1., 2., 5., 40.])]*4)), min_size=1, max_size=20))
def test_metrics_equal_their_twin(samples):
    true = np.array([point for point, _ in samples])
    found = true + np.array([error for _, error in samples])
    fast, slow = metrics_of(sample_errors(found, true)), slow_metrics(found.tolist(), true.tolist())
    assert fast.keys() == slow.keys() == NAMES
    for name, value in slow.items(): assert float(fast[name]) == pytest.approx(value, abs=1e-9), name


def test_a_miss_in_x_alone_shows_in_the_slide():
    metrics = metrics_of(sample_errors([[208., 80, 30, 80]], [[200., 80, 30, 80]]))
    assert (metrics['hit_le_2px'], metrics['slide_hit_le_5px'], metrics['slide_mae']) == (100, 0, 8)


# intervals

def errors_of(count, seed=0):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 300, (count, 4))
    return sample_errors(true + rng.normal(0, 2, true.shape), true)


@pytest.mark.parametrize('count', [1, 2, 37])
def test_intervals_equal_their_twin(count):
    errors, resamples = errors_of(count), 60
    picks = np.random.default_rng(0).integers(0, count, (resamples, count))
    drawn = [metrics_of({name: value[pick] for name, value in errors.items()}) for pick in picks]
    found = bootstrap_intervals(errors, resamples)
    assert found.keys() == NAMES
    for name, (low, high) in found.items():
        values = [float(metrics[name]) for metrics in drawn]
        assert (low, high) == pytest.approx((percentile(values, 2.5), percentile(values, 97.5)), abs=1e-9)
        assert low <= high and (count > 1 or low == high == float(metrics_of(errors)[name]))


def test_intervals_of_many_samples_are_those_of_all_resamples_at_once():
    "They are drawn some at a time, so that memory does not grow with their number."
    errors = errors_of(150_001)   # six resamples at once
    drawn = metrics_of({name: value[np.random.default_rng(0).integers(0, 150_001, (13, 150_001))] for name, value in errors.items()})
    found = bootstrap_intervals(errors, 13)
    for name in NAMES: assert found[name] == pytest.approx(np.percentile(drawn[name], [2.5, 97.5]), abs=1e-9)


def test_intervals_are_repeatable_and_leave_global_generators_alone():
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    assert bootstrap_intervals(errors_of(50), 30) == bootstrap_intervals(errors_of(50), 30)
    assert (np.random.get_state()[1] == state).all()
    assert bootstrap_intervals(errors_of(50), 0) == {}


# validating

class Samples(torch.utils.data.Dataset):
    "Pictures of several sizes, letterboxed; some have flags."
    def __init__(self, count):
        self.samples, rng = [], np.random.default_rng(0)
        for index in range(count):
            sample = {name: value[0] for name, value in batch_of(1, seed=index, first=index).items()}
            width, height = (int(v) for v in rng.integers(20, 300, 2))
            sample['letterbox'] = torch.tensor(Letterbox(width, height, WIDTH, HEIGHT).params)
            self.samples.append(sample | dict(has_rotation=index % 3 == 0, has_noise=index == 4, has_decoy=False))

    def __len__(self): return len(self.samples)
    def __getitem__(self, i): return self.samples[i]


def config_of(bootstrap=20, amp='off', space='original', **stopping):
    return Config(train=dict(amp=amp), eval=dict(bootstrap=bootstrap, space=space, early_stopping=stopping))


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = Toy(norm=True)
    for seed in range(5): model.train()(batch_of(8, seed)['image'])
    return model


def validated(model, batch_size, count=13, **options):
    validator = Validator(config_of(**options), 'cpu')
    return validator.validate(model, DataLoader(Samples(count), batch_size), 3), validator.rows


def by_hand(model, samples):
    "Predictions, one picture at a time, carried to the original picture by hand."
    found, true = [], []
    model.eval()
    for sample in samples:
        answer = model.decode_predictions(model(sample['image'][None]))
        sx, sy, left, top, _, _ = sample['letterbox'].tolist()
        back = lambda p: [(float(p[0]) - left)/sx, (float(p[1]) - top)/sy]
        found.append(back(answer['gap_coords'][0]) + back(answer['slider_coords'][0]))
        true.append(back(sample['gap_coords']) + back(sample['slider_coords']))
    return np.array(found), np.array(true)


def test_pictures_without_a_gap_or_a_slider_have_rates_and_no_errors(model):
    samples = [sample | dict(present=torch.ones(2, dtype=torch.bool)) for sample in Samples(13)]
    for index, name in ((2, 'gap'), (5, 'gap'), (5, 'slider'), (9, 'slider')):
        samples[index][f'{name}_coords'] = torch.full((2,), math.nan)
        samples[index]['present'][name == 'slider'] = False
    validator = Validator(config_of(), 'cpu')
    result = validator.validate(model, DataLoader(samples, 4))
    complete = [index for index in range(13) if index not in (2, 5, 9)]
    alone = Validator(config_of(), 'cpu').validate(model, DataLoader([samples[index] for index in complete], 4))
    assert result['n'] == 10 and validator.rows['index'].tolist() == complete and validator.lacking['index'].tolist() == [2, 5, 9]
    assert all(result[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-2) for name in NAMES) and 'false_gaps' not in alone
    with torch.no_grad(): scores = {i: model.eval().decode_predictions(model(samples[i]['image'][None])) for i in (2, 5, 9)}
    assert result['false_gaps'] == 100*np.mean([scores[i]['gap_score'].item() >= .1 for i in (2, 5)])
    assert result['false_sliders'] == 100*np.mean([scores[i]['slider_score'].item() >= .1 for i in (5, 9)])
    with pytest.raises(UserError, match='nothing to measure'): validator.validate(model, DataLoader([samples[2]], 1))


@torch.no_grad()
def test_validation_by_hand(model):
    result, rows = validated(model, 4)
    found, true = by_hand(model, Samples(13))
    np.testing.assert_allclose(rows['found'], found, atol=1e-2)
    np.testing.assert_allclose(rows['true'], true, atol=1e-6)
    for name, value in slow_metrics(rows['found'], rows['true']).items(): assert result[name] == pytest.approx(value, abs=1e-9)
    assert (result['n'], result['epoch']) == (13, 3) and result['interval'].keys() == NAMES
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize('batch_size', [1, 5, 13, 64])
def test_the_batch_size_does_not_matter(model, batch_size):
    (result, rows), (reference, reference_rows) = validated(model, batch_size), validated(model, 2)
    assert rows['index'].tolist() == list(range(13)) and rows.keys() == reference_rows.keys()
    np.testing.assert_allclose(rows['found'], reference_rows['found'], atol=1e-2)
    assert result.keys() == reference.keys()
    for name in NAMES | {name for name in result if 'loss' in name}: assert result[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-2), name


def test_the_loss_of_a_small_last_batch_counts_as_little_as_it_is(model):
    result, _ = validated(model, 8)
    losses = [validated_one['loss'] for validated_one in (Validator(config_of(), 'cpu').validate(model, DataLoader([sample], 1)) for sample in Samples(13))]
    assert result['loss'] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    parts = {name for name in result if name.startswith('loss_')}
    assert parts == {'loss_gap_focal', 'loss_slider_focal', 'loss_offset', 'loss_margin'}


def test_every_flag_has_its_rows(model):
    result, rows = validated(model, 4)
    assert set(result['by_flag']) == {'has_rotation', 'has_noise'}   # no sample has a decoy
    for flag, metrics in result['by_flag'].items():
        has = rows[flag]
        assert metrics['n'] == has.sum() == (5 if flag == 'has_rotation' else 1)
        assert metrics == group_metrics(dict(found=rows['found'][has], true=rows['true'][has]), 20)


def test_input_space(model):
    _, rows = validated(model, 4, space='input')
    samples = Samples(13)
    np.testing.assert_allclose(rows['true'][:, :2], np.stack([sample['gap_coords'].numpy() for sample in samples]))
    _, original = validated(model, 4)
    params = np.stack([sample['letterbox'].numpy() for sample in samples])
    np.testing.assert_allclose(letterbox(original['found'][:, 2:], params)[0], rows['found'][0, 2:], atol=1e-3)


def test_the_model_is_left_as_it_was(model):
    for training in (True, False):
        model.train(training)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        validated(model, 4)
        assert model.training is training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_half_precision_measures_about_the_same(model):
    assert validated(model, 4, amp='bf16')[0]['loss'] == pytest.approx(validated(model, 4)[0]['loss'], rel=.05)


# several processes

@torch.no_grad()
def test_rows_of_all_processes_meet_in_order(model, monkeypatch):
    "Process 1 of 3 has every third sample, process 2 has none."
    def validate(indices): return [Validator(config_of(), 'cpu')._batch(model.eval(), next(iter(DataLoader(Samples(7), batch_sampler=[i]))), module.Meter()) for i in indices]
    parts = [validate([[0, 2], [3, 5], [6]]), validate([[1, 4]]), []]
    alone = gather_rows(validate([[0, 1, 2, 3, 4, 5, 6]]))
    def gather(out, _): out[:] = parts
    monkeypatch.setattr(module.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(module.dist, 'get_world_size', lambda: 3)
    monkeypatch.setattr(module.dist, 'all_gather_object', gather)
    rows = gather_rows([])
    assert rows['index'].tolist() == list(range(7))
    for name, value in alone.items(): np.testing.assert_allclose(rows[name], value, atol=1e-3)


def test_losses_of_all_processes_are_one_mean(monkeypatch):
    parts = [dict(loss=6., count=3.), dict(loss=2., count=1.), {}]
    def gather(out, own): out[:] = [own, *parts[1:]]
    monkeypatch.setattr(module.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(module.dist, 'get_world_size', lambda: 3)
    monkeypatch.setattr(module.dist, 'all_gather_object', gather)
    meter = module.Meter()
    meter.add({name: torch.tensor(value) for name, value in parts[0].items()})
    assert Validator(config_of(), 'cpu')._mean_over_processes(meter) == dict(loss=2.)


# decisions

def slow_judge(history, min_epochs, patience, guard, enabled):
    "The rules read from the history, in terms of the patience that is left. Yields (is it the best, should it stop)."
    left, guard_best = patience, None
    for epoch, metrics in enumerate(history):
        key = lambda m: (m['hit_le_5px'], -m['mae_px'])
        best = all(key(metrics) > key(earlier) for earlier in history[:epoch])
        left = patience if best else left - 1
        if guard:
            value = metrics[guard['metric']]
            if guard_best is None: guard_best = value
            elif (guard_best - value if guard['mode'] == 'min' else value - guard_best) > guard['min_delta']:
                left, guard_best = min(patience, left + 3), value
        yield best, enabled and epoch >= min_epochs - 1 and left <= 0


guards = st.one_of(st.none(), st.fixed_dictionaries(dict(metric=st.just('mae_px'), mode=st.just('min'), min_delta=st.sampled_from([0., .5, 2.]))),
                   st.fixed_dictionaries(dict(metric=st.just('hit_le_1px'), mode=st.just('max'), min_delta=st.sampled_from([0., 10.]))))
histories = st.lists(st.tuples(st.sampled_from([0., 50., 90.]), st.sampled_from([1., 1.5, 2., 4., 8.]), st.sampled_from([0., 20., 40.])), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(histories, st.integers(0, 8), st.integers(1, 6), guards, st.booleans(), st.randoms(use_true_random=False))
def test_decisions_equal_their_twin(history, min_epochs, patience, guard, enabled, chance):
    history = [dict(zip(('hit_le_5px', 'mae_px', 'hit_le_1px'), values)) for values in history]
    config = config_of(min_epochs=min_epochs, patience=patience, second_guard=guard, enabled=enabled)
    judge = Validator(config, 'cpu')
    for epoch, expected in enumerate(slow_judge(history, min_epochs, patience, guard, enabled)):
        assert judge.update(history[epoch], epoch) == expected
        if chance.random() < .3:   # the run is stopped and resumed here
            state, judge = json.loads(json.dumps(judge.state_dict())), Validator(config, 'cpu')
            judge.load_state_dict(state)


def best_epochs(history, select_by='hit_le_5px'):
    judge = Validator(Config(eval=dict(select_by=select_by, early_stopping=dict(min_epochs=50))), 'cpu')
    found = [epoch for epoch, metrics in enumerate(history) if judge.update(metrics, epoch)[0]]
    assert judge.best_epoch == found[-1]
    return found


def test_ties_are_broken_by_mae_and_epoch_0_counts():
    assert best_epochs([dict(hit_le_5px=hit, mae_px=mae) for hit, mae in [(80, 3), (80, 3), (80, 2.5), (79, 1), (80, 2.7), (81, 9)]]) == [0, 2, 5]
    assert best_epochs([dict(hit_le_5px=90, mae_px=1)] + [dict(hit_le_5px=80, mae_px=2)]*5) == [0]   # the best of all, long before min_epochs


@pytest.mark.parametrize('select_by', sorted(NAMES | {'loss'}))
def test_any_metric_can_select(select_by):
    better = [1., 2., 3.] if 'hit' in select_by else [3., 2., 1.]
    assert direction(select_by) == (1 if 'hit' in select_by else -1)
    assert best_epochs([dict(mae_px=7.) | {select_by: value} for value in better], select_by) == [0, 1, 2]
    assert best_epochs([dict(mae_px=7.) | {select_by: value} for value in better[::-1]], select_by) == [0]


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_what_is_not_a_number_is_never_better(bad):
    history = [dict(loss=bad, mae_px=bad)] + [dict(loss=9., mae_px=9.), dict(loss=bad, mae_px=1.), dict(loss=8., mae_px=bad)]
    assert best_epochs(history, 'loss') == [0, 1, 3]


def test_the_guard_gives_back_three_epochs_and_no_more_than_were_used():
    def epochs_run(maes):
        judge = Validator(config_of(min_epochs=0, patience=4, second_guard=dict(metric='mae_px', mode='min', min_delta=.5)), 'cpu')
        return next(epoch for epoch, mae in enumerate(maes) if judge.update(dict(hit_le_5px=90. if not epoch else 80., mae_px=mae), epoch)[1])
    assert epochs_run([9.]*9) == 4
    assert epochs_run([9., 9., 9., 9., 8., 8., 8., 8.]) == 7   # three bad epochs and a fourth, three of them forgiven: three more
    assert epochs_run([9., 8.] + [8.]*9) == 5                  # one bad epoch forgiven, not three
    assert epochs_run([9., 8.6, 8.4] + [8.4]*9) == 6           # 0.4 is not enough, 0.6 from the last improvement is
