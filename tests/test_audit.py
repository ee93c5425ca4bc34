"""The audit from the command line and in a browser, and its formulas against slow ones."""
import itertools, json, math, shutil, subprocess, sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from captcha_hrnet.audit import EFFECTS, HITS, STRENGTHS, Audit, audit_page, between, findings, hits, level_row, main, pair_row, paired_points, rate_interval, sentence, similarity, unpaired_points, verdict, visible_indices, with_factors
from captcha_hrnet.config import UserError, run_command
from captcha_hrnet.synth import FACTORS, CaptchaSynth, write_dataset
from captcha_hrnet.evaluate import span
from test_evaluate import SMALL, checkpoint, lacking


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('audit')
    torch.set_num_threads(1)
    checkpoint(home / 'a.pth')
    write_dataset(SMALL.synth, 3, str(home / 'data'), train=0, val=2, workers=1)
    return home


# formulas

def test_similarity_equals_a_loop():
    random = np.random.default_rng(0)
    a = cv2.GaussianBlur(random.integers(0, 256, (14, 17, 3), np.uint8), (0, 0), 1.5)
    b = cv2.add(a, random.integers(0, 40, a.shape, np.uint8))
    x = np.arange(-5, 6)
    window = np.exp(-(x**2)/(2*1.5**2))
    window = np.outer(window, window)/window.sum()**2
    grey = [np.pad(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(float), 5, 'reflect') for picture in (a, b)]
    values = []
    for i in range(14):
        for j in range(17):
            p, q = (picture[i:i + 11, j:j + 11] for picture in grey)
            m, n = (window*p).sum(), (window*q).sum()
            s, t, c = (window*(p - m)**2).sum(), (window*(q - n)**2).sum(), (window*(p - m)*(q - n)).sum()
            values.append((2*m*n + 2.55**2)*(2*c + 7.65**2)/((m*m + n*n + 2.55**2)*(s + t + 7.65**2)))
    assert similarity(a, b, (0, 0, 17, 14)) == pytest.approx(np.mean(values), rel=1e-6) and similarity(a, a, (-3, -3, 40, 40)) == pytest.approx(1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_points_are_the_difference_and_inside_their_interval(pairs):
    before, after = np.array(pairs).T
    cost, (low, high) = paired_points(before, after)
    assert cost == pytest.approx(100*(before.mean() - after.mean())) and low < high and low - 1e-9 <= cost <= high + 1e-9
    back, (least, most) = paired_points(after, before)
    assert [back, least, most] == pytest.approx([-cost, -high, -low])


@pytest.mark.parametrize('lost, gained', [(.006, 0), (.02, 0), (.06, .04), (.1, 0), (.18, .008), (.3, 0), (.5, .1)])
@pytest.mark.parametrize('count', [24, 40])
def test_intervals_cover(count, lost, gained):
    "The probability that the interval holds the truth, summed over all outcomes."
    covered = 0.
    for i, j in itertools.product(range(count + 1), repeat=2):
        if i + j > count: continue
        before, after = np.arange(count) < i, (np.arange(count) >= i) & (np.arange(count) < i + j)
        low, high = paired_points(before, after)[1]
        p = math.comb(count, i)*math.comb(count - i, j)*lost**i*gained**j*(1 - lost - gained)**(count - i - j)
        covered += p*(low <= 100*(lost - gained) <= high)
    assert covered > .91


def test_intervals_of_different_captchas_cover():
    one, other = (np.random.default_rng(seed).random((400, 30)) < rate for seed, rate in ((0, .5), (1, .4)))
    assert np.mean([low <= 10 <= high for low, high in (unpaired_points(a, b)[1] for a, b in zip(one, other))]) > .92


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_excess_is_the_pair_less_the_sum(count, seed):
    base, one, other, both = np.random.default_rng(seed).random((4, count)) < .6
    row = pair_row(('a', 'b'), base, one, other, both, 50)
    assert row['excess'] == pytest.approx(row['cost'] - row['sum']) and row['excess_interval'][0] - 1e-9 <= row['excess_interval'][1]
    assert row['sum'] == pytest.approx(paired_points(base, one)[0] + paired_points(base, other)[0])


def test_a_hit_is_a_slide_or_an_answer_within_its_px():
    rows = dict(true=np.zeros((3, 4)), found=np.array([[4., 0, 0, 0], [8., 0, 8, 0], [2., 0, 0, 0]]))
    assert hits(rows, 'slide_hit_le_5px').tolist() == [True, True, True] and hits(rows, 'slide_hit_le_2px').tolist() == [False, True, True]
    assert hits(rows, 'hit_le_1px').tolist() == [True, False, True] and len(HITS) == 6


# the generator's side

def test_levels_are_the_same_captchas():
    base, indices = CaptchaSynth(with_factors(SMALL.synth, {}), 1, 'val'), range(3)
    for factor in ('noise', 'highlight', 'decoy', 'hollow', 'bright_edge', 'jpeg', 'blur', 'color_shift', 'sensor_noise', 'clutter'):
        for strength in STRENGTHS[::3]:
            synth = CaptchaSynth(with_factors(SMALL.synth, {factor: strength}), 1, 'val')
            for index in indices:
                a, b = base.draw(index), synth.draw(index)
                assert (a.gap, a.slider, a.shape, a.styles) == (b.gap, b.slider, b.shape, b.styles) and b.strength == dict.fromkeys(FACTORS, 0.) | {factor: strength}


def test_only_captchas_that_can_be_seen_are_the_base():
    synth = CaptchaSynth(with_factors(SMALL.synth, {}), 1, 'val')
    indices = visible_indices(synth, 5)
    assert indices == [i for i in range(indices[-1] + 1) if min(synth.draw(i).visibility, synth.draw(i).slider_visibility) >= .8]
    class Faint:
        def draw(self, index): return type('Sample', (), dict(visibility=.1, slider_visibility=3.))
    with pytest.raises(UserError, match='only 0 of 100 captchas'): visible_indices(Faint(), 2)


@pytest.mark.parametrize('name', EFFECTS)
def test_effects_keep_the_picture_and_its_size(name):
    picture = np.random.default_rng(0).integers(0, 256, (41, 83, 3), np.uint8)
    before = picture.copy()
    changes = []
    for strength in (.25, 1.):
        one, two = (EFFECTS[name](picture, strength, np.random.default_rng(5)) for _ in range(2))
        assert one.shape == picture.shape and one.dtype == np.uint8 and (one == two).all() and (picture == before).all()
        changes.append(np.abs(one.astype(int) - picture).mean())
    assert 0 < changes[0] < changes[1]


# the command line

def test_command_line(home, tmp_path):
    arguments = ['--weights', 'a.pth', '--data', 'data', '--factors', 'noise,rotation', '--strengths', '0.5,1', '--samples', '3', '--pairs', '2', '--out', str(tmp_path / 'new'), '--device', 'cpu']
    done = subprocess.run([sys.executable, '-m', 'captcha_hrnet.audit', *arguments], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved, page = json.loads((tmp_path / 'new/audit.json').read_text()), (tmp_path / 'new/report.html').read_text()
    assert [(level['factor'], level['strength']) for level in saved['levels']] == [('noise', .5), ('noise', 1.), ('rotation', .5), ('rotation', 1.)]
    assert [line.strip(' :') for line in done.stdout.splitlines()[:-1]] == [text.strip(' :') for heading, texts in saved['findings'].items() for text in (heading, *texts)] and done.stdout.splitlines()[-1].endswith('report.html')
    assert [pair['factors'] for pair in saved['pairs']] == [['noise', 'rotation']] and len(saved['own']['levels']) == 2*len(EFFECTS) and saved['own']['n'] == 2
    assert page.count('<figure>') > 20 and 'strength 0.5' in page and saved['settings']['trained_with']['noise'] == .5


@pytest.mark.parametrize('arguments, said', [
    (['--factors', 'noise,rotatoin'], "'rotatoin': unknown factor, nearest: rotation"),
    (['--factors', 'none'], 'then --data is needed'),
    (['--weights', 'none.pth'], 'none.pth: no such weights file'),
    (['--weights', 'data/val/labels.jsonl'], 'labels.jsonl: not a readable weights file'),
    (['--data', 'empty'], 'empty/val: no such folder'),
    (['--data', 'data', '--split', 'images'], "needs one named 'images'"),
    (['--out', 'a.pth/out'], "out: value 'a.pth/out': must be a folder that can be written to"),
    (['--strengths', '1,0.5'], "'1,0.5': must be rising numbers above 0 up to 1"),
    (['--samples', '1'], '--samples 1'),
    (['--factors', 'noise', '--set', 'synth.widht=3'], 'synth.widht: unknown key, nearest known: synth.width'),
])
def test_mistakes_are_told(home, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(home)
    given = dict(zip(arguments[::2], arguments[1::2]))
    rest = {'--weights': 'a.pth', '--out': str(tmp_path / 'out'), '--device': 'cpu'} | given
    assert run_command(main.__wrapped__, [text for pair in rest.items() for text in pair]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith('error: ') and 'Traceback' not in error


def test_bad_usage(capsys):
    for arguments in ([], ['--weights', 'a.pth'], ['--weights', 'a.pth', '--out', 'x', '--metric', 'luck']):
        with pytest.raises(SystemExit) as ended: run_command(main.__wrapped__, arguments)
        assert ended.value.code == 2


# words and page

def made_up() -> Audit:
    "An audit in which noise is worth trying, blur hides the gap, jpeg does nothing and a decoy is unclear."
    random = np.random.default_rng(0)
    true = np.tile([100., 30, 20, 30], (200, 1))
    def rows(right, seen):
        found = true + np.where(random.random((200, 1)) < right, 0, 40)*[1, 0, 0, 0]
        return dict(true=true, found=found, visibility=np.where(random.random(200) < seen, 3., .1), similarity=np.full(200, .9))
    before = rows(1, 1)
    levels = [level_row(name, strength, before, rows(1 - strength*cost, 1 - strength*people), HITS[0]) for name, cost, people in
              (('noise', .4, 0), ('blur', .4, .5), ('jpeg', 0, 0), ('decoy', .06, 0)) for strength in (.5, 1.)]
    metrics = level_row('noise', 0., before, before, HITS[0])['metrics']
    settings = dict(weights='<b>a.pth', metric=HITS[0], samples=200, seed=1, strengths=[.5, 1.], pair_strength=.5, trained_with=dict.fromkeys(FACTORS, .2) | dict(noise=0.))
    picture = np.full((60, 120, 3), 120, np.uint8)
    examples = {name: [(s, picture, true[0], true[0]) for s in (0., .5, 1.)] for name in ('noise', 'blur', 'jpeg', 'decoy')}
    some = np.ones(200, bool)
    return Audit(settings, dict(hits=100., interval=rate_interval(np.ones(200, bool)), metrics=metrics), levels, [pair_row(('noise', 'blur'), some, some, some, some, 20)], {}, examples)


def test_the_summary_says_what_the_numbers_say():
    audit, told = made_up(), findings(made_up())
    said = {level['factor']: verdict(level) for level in audit.levels if level['strength'] == 1}
    assert said == dict(noise='worth trying', blur='costs people too', jpeg='buys nothing', decoy='not decided')
    noise = audit.of('noise')[1]
    assert '<b>a.pth gets 100 % (98 to 100) of 200' in told['The machine'][0]
    new = next(texts for heading, texts in told.items() if 'the network never met it' in heading)      # noise was not in its training
    assert new == [sentence(noise)] and f'the machine gets {noise["hits"]:.0f} % instead of 100 %, {noise["cost"]:.0f} points less' in new[0] and 'people lose 0 (0 to' in new[0]
    assert told['Worth trying'][0].startswith('Nothing that was tested surely costs a machine that was trained for it')
    assert 'blur' in told['Costs the machine, and may cost people'][0] and 'JPEG' in told['Buys nothing'][0] and 'decoy' in told['Not decided by 200 captchas (--samples asks for more)'][0]
    audit.settings['trained_with']['noise'] = .2
    assert findings(audit)['Worth trying'] == [sentence(noise)] and not any('never met' in heading for heading in findings(audit))
    assert between([-.3, 4.6]) == '0 to 5' and span([-.02, 1], 1) == '[0.0, 1.0]'   # no minus before a zero


def test_page_in_a_browser(tmp_path):
    playwright = pytest.importorskip('playwright.sync_api')
    if not shutil.which('chromium'): pytest.skip('no chromium on the path')
    flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    (tmp_path / 'page.html').write_text(audit_page(made_up()), 'utf-8')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=flags)
        for width, scheme in ((1200, 'light'), (360, 'dark')):
            page, wrong = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme), []
            page.on('request', lambda request: request.url.startswith(('file:', 'data:')) or wrong.append(request.url))
            page.on('console', lambda message: wrong.append(message.text))
            page.goto((tmp_path / 'page.html').as_uri())
            assert page.evaluate('document.documentElement.scrollWidth') <= width and wrong == []
            assert page.locator('.lead').bounding_box()['y'] < 300 and '<b>a.pth' in page.inner_text('main')
            assert page.locator('svg[role=img]').evaluate_all('all => all.every(e => e.getAttribute("aria-label"))') and page.locator('.chart').count() == 6
            assert page.locator('.pictures figure').count() == 12
            ink = page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill.match(/\\d+/g).slice(0, 3).every(part => part > 180)")
            assert ink == (scheme == 'dark')
            page.close()
        browser.close()


def test_captchas_that_lack_something_are_left_out_and_listed(home, tmp_path, capsys):
    _, incomplete = lacking(tmp_path / 'data', 8)
    assert not run_command(main.__wrapped__, list(map(str, ['--weights', home / 'a.pth', '--data', tmp_path / 'data', '--factors', 'none', '--strengths', '1', '--out', tmp_path / 'out', '--device', 'cpu'])))
    own = json.loads((tmp_path / 'out/audit.json').read_text())['own']
    assert own['n'] == 8 - incomplete and len(own['rejected']) == incomplete
