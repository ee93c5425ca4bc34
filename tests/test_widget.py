"""The widgets where people use them: JupyterLab, the classic notebook, voila and a file in a browser, driven in headless Chromium."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from captcha_hrnet.config import UserError
from captcha_hrnet.data import CaptchaDataset
from captcha_hrnet.widget import (METRICS, SORTS, Browser, Predictions, RunFiles, TrainingView, answered_metrics, export_rows, html_page, mark, metrics_line,
                                  pictured, select, write_html)

HERE = Path(__file__).resolve().parent
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
         '--disable-sync').split()
in_chromium = pytest.mark.skipif(CHROMIUM is None or find_spec('playwright') is None, reason='needs playwright and a Chromium on the path')
SHOTS = os.environ.get('WIDGET_SHOTS')   # a folder: screenshots of what the tests see go there

# 60 pictures with answers that are right to some pixels, by two "models": what the notebooks below show, and what the tests expect of them
SOURCE = f'''
import sys; sys.path.insert(0, {str(HERE)!r})
import numpy as np, torch
from captcha_hrnet.config import load_config
from captcha_hrnet.data import SyntheticDataset
from captcha_hrnet.widget import Browser, Predictions, TrainingView
from toys import Toy
torch.set_num_threads(1); torch.manual_seed(0)
dataset = SyntheticDataset(load_config({str(HERE.parent / "configs/quickstart.yaml")!r}, ['data.val_samples=60', 'synth.noise.p=0.5', 'synth.decoy.p=0.4']), 'val')
drawn = [dataset.synth.draw(i) for i in range(60)]
def predictions(name, seed):
    random, true = np.random.default_rng(seed), np.array([[*d.gap, *d.slider] for d in drawn])
    found = true + random.exponential(3, (60, 1))*random.normal(size=(60, 4))
    flags = {{flag: np.array([d.flags[flag] for d in drawn]) for flag in ('has_noise', 'has_decoy')}}
    return Predictions(dict(index=np.arange(60), true=true, found=found, scores=random.random((60, 2)), **flags), dataset, Toy(False), name=name)
a, b = predictions('first', 1), predictions('second', 2)
'''


@pytest.fixture(scope='module')
def models():
    space = {}
    exec(SOURCE, space)
    return space['a'], space['b']


# numbers

def bare(count, seed=0, names=None, **fields):
    "Predictions of pictures that are never drawn."
    class Nothing:
        def name(self, i): return names[i] if names else f'{i}.png'
    random = np.random.default_rng(seed)
    true = random.uniform(10, 90, (count, 4))
    rows = dict(index=np.arange(count), true=true, found=true + random.normal(size=(count, 4))*random.exponential(3, (count, 1)), scores=random.random((count, 2)),
                has_noise=random.random(count) < .4, has_decoy=random.random(count) < .4)
    return Predictions(rows | fields, Nothing())


@pytest.mark.parametrize('seed', range(6))
def test_selection_equals_a_loop(seed):
    p, random = bare(80, seed), np.random.default_rng(seed)
    flags = [flag for flag in ('noise', 'decoy') if random.random() < .5]
    error, threshold, answer, search = (random.uniform(0, 2), random.uniform(2, 8)), random.random(), ('all', 'answered', 'none')[seed % 3], str(seed)
    expected = []
    for i in range(80):
        size = sum(abs(f - t) for f, t in zip(p.found[i], p.true[i]))/4
        answered = min(p.scores[i]) >= threshold
        if not error[0] <= size <= error[1] or search not in f'{i}.png' or not all(p.flags[flag][i] for flag in flags): continue
        if answer == 'all' or answered == (answer == 'answered'): expected.append((-size, i))
    assert select(p, flags=flags, error=error, answer=answer, threshold=threshold, search=search).tolist() == [i for _, i in sorted(expected)]


def test_a_prediction_that_is_not_a_number_is_the_worst_and_is_no_hit():
    found = bare(20).found.copy()
    found[7, 2] = math.nan
    p = bare(20, found=found)
    for sort in ('worst first', 'slider error', 'slide distance error'): assert select(p, sort=sort)[0] == 7, sort
    assert select(p, sort='best first')[-1] == 7
    assert 7 not in select(p, error=(0, 1e6)) and 7 in select(p)
    assert answered_metrics(p, np.array([7]))['hit_le_5px'] == 0
    assert mark('found', math.nan, 3, 5, True) == ''


def test_two_models_on_different_samples_are_refused():
    with pytest.raises(UserError, match='same samples'): Browser(bare(20), bare(20, seed=1))


def test_an_exported_selection_is_a_data_set(models, tmp_path):
    a, rows = models[0], select(models[0], flags=['decoy'])
    assert export_rows(a, rows, tmp_path / 'train') == len(rows)
    again = CaptchaDataset(tmp_path, 'train')
    for i, row in enumerate(rows):
        box, sample = again[i]['letterbox'].numpy(), again.labels[i]
        assert (again._picture(i) == a.picture(int(row))).all()
        assert [*sample['gap'], *sample['slider']] == pytest.approx(a.true[row], abs=.001)
        assert sample['flags']['has_decoy'] and len(sample['decoys']) and box[4] == a.picture(int(row)).shape[1]
    line = json.loads((tmp_path / 'train/labels.jsonl').read_text().splitlines()[0])
    assert [*line['found_gap'], *line['found_slider']] == pytest.approx(a.found[rows[0]], abs=.001)


def test_pictures_of_a_page_are_the_worst_and_some_of_all():
    p = bare(100)
    for limit in (0, 1, 2, 7, 100, 500):
        rows = pictured(p, limit)
        assert len(rows) == min(limit, 100) and set(select(p)[:(limit + 1)//2]) <= set(rows)


def test_ten_thousand_samples_only_draw_what_is_looked_at(models):
    base, count = models[0], 10_000
    rows = dict(index=np.arange(count) % 60, true=np.tile(base.true, (167, 1))[:count], found=np.random.default_rng(0).normal(50, 20, (count, 4)), scores=np.ones((count, 2)))
    p = Predictions(rows, base.dataset)
    looked = []
    p.picture = lambda row: looked.append(row) or np.zeros((60, 120, 3), np.uint8)
    browser = Browser(p)
    browser.sort.value = 'best first'
    browser.view.value = 'table'
    browser.step(1)
    assert len(looked) == 2   # one for each selection: the table draws none
    browser.view.value = 'grid'
    browser.step(1)
    assert len(looked) == 2 + 2*browser.per_page
    browser.step(-1)
    assert len(looked) == 2 + 2*browser.per_page   # the thumbnails are still there


def test_shown_answers_follow_the_threshold(models):
    "It changes what is an answer, and of all answers no selection."
    base = models[0]
    p = Predictions(dict(index=np.arange(4), true=base.true[:4], found=base.true[:4] + 1, scores=np.repeat([[.9], [.8], [.3], [.2]], 2, 1)), base.dataset)
    browser = Browser(p)
    for view, told in (('table', lambda: browser.list.value.count('none')), ('grid', lambda: sum('none' in button.description for button in browser.opens))):
        browser.view.value, counts = view, []
        for browser.threshold.value in (0, .5, .85): counts.append(told())
        assert counts[0] < counts[1] < counts[2], view


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('run.yaml').write_text('version: none\ndata: {source: directory, root: nowhere}\nhardware: {device: cpu}\n')
    view = TrainingView('run.yaml', every=60)
    view.start()
    view.wait()
    assert 'failed' in view.status.value and 'nowhere' in view.status.value and view.end.disabled


def test_the_second_model_stands_in_the_tables_too(models):
    a, b = models
    browser = Browser(a, b)
    browser.view.value = 'table'
    rows = re.findall(r'<tr.*?</tr>', browser.list.value)
    words = [re.findall(r'<td( class=chv-text)?>', row) for row in rows[1:]]
    assert all(row == words[0] for row in words) and [bool(word) for word in words[0]][:4] == [False, True, True, False]   # #, file, model, error
    browser.view.value = 'grid'
    assert browser.opens[0].description.startswith(f'{a.errors["error"][browser.rows[0]]:.1f} / {b.errors["error"][browser.rows[0]]:.1f} px')


def test_the_files_of_a_run_are_removed_while_it_is_watched(tmp_path, monkeypatch, capfd):
    from torch.utils.tensorboard import SummaryWriter
    monkeypatch.chdir(tmp_path)
    Path('run.yaml').write_text('version: watched\nhardware: {device: cpu}\n')
    view = TrainingView('run.yaml', every=.02)
    with SummaryWriter(str(view.manager.tensorboard_dir)) as writer: writer.add_scalar('step/loss', 2., 3)
    def wait_for(what):
        end = time.time() + 20
        while not what(): assert time.time() < end; time.sleep(.02)
    wait_for(lambda: view.files.steps)
    shutil.rmtree(view.manager.tensorboard_dir)
    wait_for(lambda: 'the files of this run were removed' in view.status.value)
    assert view.thread.is_alive() and view.files.steps[3]['loss'] == 2 and capfd.readouterr() == ('', '')
    with SummaryWriter(str(view.manager.tensorboard_dir)) as writer: writer.add_scalar('step/loss', 1., 1)
    wait_for(lambda: 1 in view.files.steps)
    assert list(view.files.steps) == [1] and 'removed' not in view.status.value   # another run in its place


def test_what_an_earlier_run_left_is_not_shown(tmp_path):
    class Manager: log_dir = tensorboard_dir = tmp_path
    (tmp_path / 'metrics.jsonl').write_text('{"epoch": 0}\n')
    old, new = RunFiles(Manager), RunFiles(Manager, int(time.time()) + 5)
    old.read(), new.read()
    assert (len(old.records), len(new.records)) == (1, 0)


# in a browser

@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def serving(folder, notebooks):
    "One Jupyter server for all front ends, on a port that the system picks, and notebooks of one cell each: its address and its folder."
    for module in ('jupyterlab', 'nbclassic', 'voila'):
        if find_spec(module) is None: pytest.skip(f'{module} is not installed')
    home = {f'JUPYTER_{name}': str(folder / name) for name in ('RUNTIME_DIR', 'CONFIG_DIR')} | {f'JUPYTERLAB_{name}': str(folder / name) for name in ('SETTINGS_DIR', 'WORKSPACES_DIR')}
    for name, code in notebooks.items():
        notebook = new_notebook(cells=[new_code_cell(code)])
        notebook.metadata.kernelspec = dict(name='python3', display_name='Python 3')
        nbformat.write(notebook, folder / f'{name}.ipynb')
    quiet = folder / 'SETTINGS_DIR/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false"}')
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.port=0', '--ServerApp.token=t', f'--ServerApp.root_dir={folder}',
               '--LabApp.expose_app_in_browser=True', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(folder / 'server.log', 'w') as log: process = subprocess.Popen(command, env=os.environ | home, cwd=folder, stdout=log, stderr=log)
    try:
        end = time.time() + 60
        while not (files := list((folder / 'RUNTIME_DIR').glob('jpserver-*.json'))):
            assert process.poll() is None and time.time() < end, (folder / 'server.log').read_text()[-2000:]
            time.sleep(.1)
        yield json.loads(files[0].read_text())['url'], folder
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    training = "from captcha_hrnet.widget import TrainingView\nTrainingView('tiny.yaml', every=.3)"
    with serving(tmp_path_factory.mktemp('server'), dict(browser=f'{SOURCE}\nBrowser(a, b)', training=training)) as served: yield served


def open_notebook(browser, server, front_end, name):
    "A page with the notebook's output on it."
    url, page = server[0], browser.new_page(viewport=dict(width=1280, height=1400))
    page.set_default_timeout(120_000)
    if front_end == 'voila': page.goto(f'{url}voila/render/{name}.ipynb?token=t')
    elif front_end == 'lab':
        page.goto(f'{url}lab/tree/{name}.ipynb?token=t')
        page.wait_for_function(f'''[window.jupyterapp?.shell?.currentWidget].some(w => w?.context?.path === "{name}.ipynb" &&
            w.sessionContext?.session?.kernel?.status === "idle")''')   # Lab opens what was open before, too
        page.evaluate('jupyterapp.commands.execute("notebook:run-all-cells")')
    else:
        try: prefix = 'nbclassic/' if urlopen(f'{url}nbclassic/tree?token=t').status == 200 else ''
        except HTTPError: prefix = ''
        page.goto(f'{url}{prefix}notebooks/{name}.ipynb?token=t')
        page.wait_for_function('window.Jupyter?.notebook?.kernel?.is_connected() && "jupyter.widget" in Jupyter.notebook.kernel.comm_manager.targets')   # who runs cells sooner sees no widget
        page.evaluate('Jupyter.notebook.execute_all_cells()')
    return page


def handle(page, label):
    "The handle of the slider beside the field of this label."
    return page.locator('.widget-hbox').filter(has=page.get_by_label(label, exact=True)).locator('.noUi-handle')


def shoot(page, name):
    if SHOTS: page.screenshot(path=f'{SHOTS}/{name}.png')


@in_chromium
@pytest.mark.parametrize('front_end', ['lab', 'classic', 'voila'])
def test_browser_in(front_end, chromium, server, models):
    from playwright.sync_api import expect
    a, b = models
    page, worst = open_notebook(chromium, server, front_end, 'browser'), select(a)
    title, place = page.locator('.chv-name').first, page.get_by_label('Picture', exact=True)
    shows = lambda row: expect(title).to_have_text(re.compile(rf'^{a.names[row]}\b'))
    expect(title).to_be_visible(timeout=90_000)                    # imports and predictions first
    shows(worst[0])
    expect(page.locator('.chv-panel svg[role=img]')).to_have_count(6)   # two models: a picture and two magnifiers each
    handle(page, 'Picture').focus()                                # the slider's handle: arrow keys
    for key in ('ArrowRight', 'ArrowRight', 'ArrowRight', 'ArrowLeft'): page.keyboard.press(key)
    shows(worst[2])
    expect(place).to_have_value('3')
    page.wait_for_timeout(1000)                                    # the kernel's echoes of those keys
    place.focus()                                                  # the field: up and down
    page.keyboard.press('ArrowUp')
    shows(worst[3])
    shoot(page, f'browser_{front_end}')
    page.get_by_label('Sort', exact=True).select_option('second is worse')
    shows((b.errors['error'] - a.errors['error']).argmax())
    page.get_by_label('Sort', exact=True).select_option('worst first')
    page.get_by_label('noise (').check()
    noisy = select(a, flags=['noise'])
    shows(noisy[0])
    expect(page.locator('.chv table').first).to_contain_text(metrics_line(answered_metrics(a, noisy), 'first')[3])
    handle(page, 'Confidence threshold').focus()
    for _ in range(3): page.keyboard.press('PageUp')
    expect(page.get_by_label('Confidence threshold', exact=True)).to_have_value('0.15')
    page.get_by_label('Confidence threshold', exact=True).fill('0.4')
    page.keyboard.press('Enter')
    cells = page.locator('.chv table').first.locator('tbody tr').first.locator('td')
    expect(cells).to_have_text(metrics_line(answered_metrics(a, noisy, .4), 'first'))     # live metrics
    page.get_by_label('Answers', exact=True).select_option('none: below the threshold')
    shows(select(a, flags=['noise'], answer='none', threshold=.4)[0])
    page.get_by_label('noise (').uncheck()
    page.get_by_label('Answers', exact=True).select_option('all')
    page.get_by_role('textbox', name='File').fill('sample 5')
    shows(select(a, search='sample 5')[0])
    page.get_by_role('textbox', name='File').fill('')
    page.get_by_label('Error from, px').fill('3')
    page.keyboard.press('Enter')
    page.get_by_label('Heat map', exact=True).select_option('gap')
    expect(page.locator('.chv-panel image[opacity="0.8"]')).to_have_count(2)
    handle(page, 'Opacity').focus()
    page.keyboard.press('ArrowLeft')
    expect(page.locator('.chv-panel image[opacity="0.75"]')).to_have_count(2)
    page.get_by_role('button', name='grid').click()
    large = select(a, error=(3, 1e6))
    opener = page.get_by_role('button', name=re.compile(f'· {a.names[large[1]]}$'))
    expect(page.locator('.chv-thumb:visible')).to_have_count(min(12, len(large)))
    shoot(page, f'grid_{front_end}')
    opener.focus()
    page.keyboard.press('Enter')                                   # a cell opens with the keyboard too
    expect(page.locator('.chv-lenses:visible')).to_have_count(2)
    shows(large[1])
    page.get_by_role('button', name='table').click()
    expect(page.locator('tr[aria-current] td').nth(1)).to_be_visible()
    shoot(page, f'table_{front_end}')
    page.get_by_label('Export to').fill(f'out_{front_end}/train')
    page.get_by_role('button', name='Export what is selected').click()
    expect(page.get_by_text(f'{len(large)} samples in')).to_be_visible()
    assert len(CaptchaDataset(server[1] / f'out_{front_end}', 'train')) == len(large)
    page.close()


@in_chromium
def test_a_run_is_watched_and_stopped_by_its_button(chromium, server):
    from playwright.sync_api import expect
    folder = server[1]
    (folder / 'tiny.yaml').write_text('''
version: tiny
data: {input_height: 64, input_width: 128, train_samples: 32, val_samples: 8}
train: {batch_size: 4, num_workers: 0, amp: 'off', log_every: 2}
eval: {batch_size: 8, vis_fail_k: 1, vis_samples: 4, bootstrap: 0}
sched: {epochs: 500, warmup_epochs: 0.5}
hardware: {device: cpu, threads: 1}
''')
    page = open_notebook(chromium, server, 'lab', 'training')
    page.get_by_role('button', name='Start', exact=True).click()
    expect(page.get_by_alt_text('sample predictions')).to_be_visible(timeout=90_000)
    expect(page.get_by_role('status').filter(has_text='running')).to_contain_text('left')
    expect(page.get_by_alt_text('hit ≤ 5 px')).to_be_visible()
    before = page.get_by_alt_text('sample predictions').get_attribute('src')
    expect(page.get_by_alt_text('sample predictions')).not_to_have_attribute('src', before)   # the next epoch's
    shoot(page, 'training_running')
    page.get_by_role('button', name='Stop and save').click()
    expect(page.get_by_text('stopped and saved')).to_be_visible()
    shoot(page, 'training_stopped')
    assert (folder / 'checkpoints/tiny/last.pth').exists() and 'stopped; go on' in (folder / 'logs/log-tiny/training.log').read_text()
    assert len((folder / 'logs/log-tiny/metrics.jsonl').read_text().splitlines()) < 500
    page.close()


@pytest.fixture
def page(chromium):
    "A page that may not ask anybody for anything, and must not complain."
    page, wrong = chromium.new_page(viewport=dict(width=1280, height=1000)), []
    page.on('request', lambda request: request.url.startswith(('file:', 'data:')) or wrong.append(request.url))
    page.on('console', lambda message: wrong.append(message.text))
    page.on('pageerror', lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert wrong == []


@in_chromium
def test_page_without_python(page, models, tmp_path):
    a, b = models
    write_html(a, tmp_path / 'page.html', limit=30, other=b, title='Answers & <others>')
    page.goto((tmp_path / 'page.html').as_uri())
    assert page.title() == page.inner_text('h1') == 'Answers & <others>'
    kept = set(pictured(a, 30))
    def agrees(threshold=0., **query):
        rows = select(a, b, threshold=threshold, **query)
        lines = [page.locator('#metrics tbody tr').nth(k).locator('td').all_inner_texts() for k in range(2)]
        assert lines == [metrics_line(answered_metrics(p, rows, threshold), p.name) for p in (a, b)]
        shown = [row for row in rows if row in kept]
        assert page.locator('#grid button').evaluate_all('all => all.map(e => e.title)') == [a.names[row] for row in shown[:24]]
        return shown
    worst = agrees()
    for sort in [*SORTS, 'second is worse']:
        page.select_option('#sort', sort)
        agrees(sort=sort)
    page.select_option('#sort', 'worst first')
    for key, place in (('ArrowRight', 1), ('ArrowRight', 2), ('ArrowLeft', 1), ('End', 29), ('Home', 0), ('PageDown', 24)):
        page.keyboard.press(key)
        assert re.match(rf'{a.names[worst[place]]}\b', page.inner_text('#name')) and f'picture {place + 1} of 30' == page.inner_text('#place'), key
    page.locator('#threshold').focus()
    for _ in range(40): page.keyboard.press('ArrowRight')
    assert page.inner_text('#threshold-says') == '0.40'
    agrees(.4)
    page.select_option('#answer', 'none')
    agrees(.4, answer='none')
    page.check('#flags input[value=noise]')
    agrees(.4, answer='none', flags=['noise'])
    page.uncheck('#flags input[value=noise]')
    page.select_option('#answer', 'all')
    page.fill('#low', '1')
    page.fill('#high', '4.5')
    agrees(.4, error=(1, 4.5))
    page.fill('#search', 'SAMPLE 3')
    agrees(.4, error=(1, 4.5), search='SAMPLE 3')
    page.select_option('#heat', 'gap')
    assert page.locator('#panels > section > svg image[opacity="0.8"]').count() == 2
    page.fill('#search', 'no such file')
    assert page.locator('#one').is_hidden() and page.inner_text('#place') == 'no picture to show'


@in_chromium
def test_page_on_a_phone_in_the_dark(chromium, models, tmp_path):
    write_html(models[0], tmp_path / 'page.html', limit=8)
    page = chromium.new_page(viewport=dict(width=360, height=700), color_scheme='dark')
    page.goto((tmp_path / 'page.html').as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    text, ground = page.evaluate('(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))')
    brightness = lambda colour: sum(map(int, colour[4:-1].split(',')))
    assert brightness(text) > 600 and brightness(ground) < 100
    unnamed = page.locator('input:visible, select:visible, button:visible').evaluate_all('all => all.filter(e => !e.labels?.length && !e.textContent.trim()).map(e => e.outerHTML)')
    assert unnamed == []
    page.close()


@in_chromium
def test_a_page_takes_names_as_text_and_lives_with_numbers_that_are_none(page, models, tmp_path):
    names = ['</script><script>document.title="taken"</script>', '<img src=x onerror="document.title=\'taken\'">', "a'b\"c&d", 'plain']
    found = bare(4).found.copy()
    found[1] = math.nan
    p = bare(4, names=names, found=found)
    p.picture = lambda row: np.full((60, 120, 3), 90, np.uint8)
    (tmp_path / 'page.html').write_text(html_page(p, title='mine'), 'utf-8')
    page.goto((tmp_path / 'page.html').as_uri())
    assert page.title() == 'mine'
    assert page.inner_text('#name').startswith(names[1])            # not a number: the worst
    assert page.locator('#grid button').evaluate_all('all => new Set(all.map(e => e.title)).size') == 4
    assert len(METRICS) + 3 == page.locator('#metrics tbody td').count()
