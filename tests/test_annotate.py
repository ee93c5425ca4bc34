"""The annotator: any actions and a new start give the same state, a killed kernel loses nothing, and a hand in a browser is understood."""
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from captcha_hrnet.annotate import ARROWS, LEAP, NUDGE, Annotations, Annotator, picture_sizes, split_labels
from captcha_hrnet.config import UserError
from captcha_hrnet.data import CaptchaDataset
from test_widget import chromium, in_chromium, open_notebook, serving, shoot  # noqa: F401

SIZES = {'images/0.png': (60, 30), 'images/1.png': (64, 48), 'images/3.png': (40, 40), 'images/more/2.png': (32, 90)}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')/'train'
    (folder/'images/more').mkdir(parents=True)
    for i, (name, (width, height)) in enumerate(SIZES.items()): Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)).save(folder/name)
    return folder


@pytest.fixture
def folder(pictures, tmp_path): return shutil.copytree(pictures, tmp_path/'train')


def state(store): return store.here, {name: store.points(name) for name in store.names}


# any actions

fractions = st.tuples(*[st.floats(0, 1)]*2)
actions = st.lists(st.one_of(st.tuples(st.just('click'), fractions), st.tuples(st.just('box'), fractions, fractions), st.tuples(st.just('nudge'), st.sampled_from([*ARROWS.values()]), st.sampled_from([NUDGE, LEAP])),
                             st.tuples(st.just('choose'), st.sampled_from(['gap', 'slider'])), st.tuples(st.just('step'), st.sampled_from([-1, 1])), st.tuples(st.sampled_from(['undo', 'clear', 'first']))), max_size=25)


class Twin:
    "What the annotator should do, in the plainest way: all states ever, and no files."
    def __init__(self): self.at, self.chosen, self.moving, self.points, self.past = 0, 'gap', 'gap', [{} for _ in SIZES], []

    def arrive(self, at): self.at, self.chosen = at, next((name for name in ('gap', 'slider') if name not in self.points[at]), 'gap'); self.moving = self.chosen
    def put(self, points): self.past.append((self.at, self.points[self.at])); self.points[self.at] = points

    def do(self, kind, *how):
        own, size = self.points[self.at], [*SIZES.values()][self.at]
        if kind in ('click', 'box'):
            self.put(own | {self.chosen: [sum(f[k] for f in how)/len(how)*size[k] for k in (0, 1)]})
            self.moving = self.chosen
            self.chosen = next((name for name in ('gap', 'slider') if name not in self.points[self.at]), self.chosen)
        if kind == 'nudge': self.put(own | {self.moving: [min(max(v + how[1]*d, 0), s) for v, d, s in zip(own.get(self.moving, [s/2 for s in size]), how[0], size)]})
        if kind == 'choose': self.chosen = self.moving = how[0]
        if kind == 'step' and 0 <= self.at + how[0] < len(SIZES): self.arrive(self.at + how[0])
        if kind == 'clear' and own: self.put({})
        if kind == 'first': self.go(next((i for i, points in enumerate(self.points) if len(points) < 2), self.at))
        if kind == 'undo' and self.past:
            at, points = self.past.pop()
            self.points[at] = points
            self.go(at)

    def go(self, at):
        if at != self.at: self.arrive(at)


def do(tool, kind, *how):
    width, height = tool.store.sizes[tool.name]
    if kind in ('click', 'box'): how = [v*side for f in how for v, side in zip(f, (width, height))]
    if kind == 'nudge': how = [how[1]*d for d in how[0]]
    getattr(tool, kind)(*how)


@settings(max_examples=30, suppress_health_check=[*HealthCheck])
@given(actions=actions)
def test_any_actions_and_a_new_start_give_the_same_state(folder, monkeypatch, actions):
    monkeypatch.setattr(os, 'fsync', lambda _: None)   # no power fails here, and to wait for the disk takes long
    for name in ('labels.jsonl', '.annotate.json'): (folder/name).unlink(missing_ok=True)
    tool, twin = Annotator(folder), Twin()
    assert tool.store.sizes == SIZES
    for action in actions:
        do(tool, *action)
        twin.do(*action)
        assert (tool.number.value - 1, tool.point.value, tool.moving) == (twin.at, twin.chosen, twin.moving), action
        for name, points in zip(SIZES, twin.points):
            assert tool.store.points(name).keys() == points.keys()
            for point, xy in points.items(): assert tool.store.points(name)[point] == pytest.approx(xy, abs=.005*(1 + len(actions)))
    whole, again = [name for name, points in zip(SIZES, twin.points) if len(points) == 2], Annotations(folder)
    assert state(again)[1] == state(tool.store)[1] and again.done == tool.bar.value == len(whole)
    assert again.here == tool.name or not (folder/'.annotate.json').exists()
    if whole: assert sorted(CaptchaDataset(folder.parent, 'train').name(i) for i in range(len(whole))) == [str(folder/name) for name in whole]


# kills

def work(folder, seed, done):
    "Random actions for ever; a byte after each."
    random_, tool = random.Random(seed), Annotator(folder)
    while True:
        do(tool, *random_action(random_))
        os.write(done, b'.')


def random_action(r):
    kind = r.choice(['click', 'click', 'click', 'box', 'nudge', 'step', 'step', 'undo', 'clear', 'choose'])
    pair = lambda: (r.random(), r.random())
    return dict(click=lambda: (kind, pair()), box=lambda: (kind, pair(), pair()), nudge=lambda: (kind, r.choice([*ARROWS.values()]), NUDGE), step=lambda: (kind, r.choice([-1, 1])),
                choose=lambda: (kind, r.choice(['gap', 'slider']))).get(kind, lambda: (kind,))()


@pytest.mark.parametrize('seed', range(12))
def test_a_killed_kernel_has_lost_nothing(folder, tmp_path, seed):
    "What was done before the kill is there; what was being done is there or not, and nothing between."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try: work(folder, seed, write)
        finally: os._exit(1)
    os.close(write)
    count = len(os.read(read, 1))   # it has begun
    time.sleep(random.Random(seed).uniform(0, .25))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    while more := os.read(read, 65536): count += len(more)
    os.close(read)
    found, other, random_ = state(Annotations(folder))[1], Annotator(shutil.copytree(folder, tmp_path/'other/train', ignore=lambda *_: ['labels.jsonl', '.annotate.json'])), random.Random(seed)
    for _ in range(count): do(other, *random_action(random_))
    before = state(other.store)[1]
    do(other, *random_action(random_))
    assert found in (before, state(other.store)[1])
    Annotator(folder).click(5, 5)   # and it goes on
    assert not [path for path in folder.iterdir() if path.suffix == '.tmp' and str(child) not in path.name]


# what is there already, and what is wrong

def test_labels_that_are_there_keep_what_is_theirs(folder):
    record = dict(image='images/./1.png', width=64, height=48, gap=[40, 20], slider=[8.125, 20], decoys=[[30, 9]], has_noise=True, colour='blau é')
    (folder/'labels.jsonl').write_text('\ufeff' + json.dumps(record) + '\n\n')
    tool = Annotator(folder)
    assert (tool.name, tool.store.done) == ('images/0.png', 1)
    tool.step(1)
    tool.choose('gap')
    tool.nudge(.25, 0)
    assert json.loads((folder/'labels.jsonl').read_text()) == record | dict(gap=[40.25, 20], slider=[8.12, 20])
    tool.undo()
    assert json.loads((folder/'labels.jsonl').read_text()) == record


@pytest.mark.parametrize(('files', 'says'), [({'labels.jsonl': 'no JSON'}, 'labels.jsonl:1: not JSON'), ({'labels.jsonl': '{"image": "images/0.png"}'}, 'no width'),
    ({'labels.jsonl': json.dumps(dict(image='images/0.png', width=61, height=30, gap=[1, 1], slider=[2, 2]))}, '60×30 px; its label says 61×30'),
    ({'labels.jsonl': json.dumps(dict(image='images/9.png', width=61, height=30, gap=[1, 1], slider=[2, 2]))}, 'no such file'),
    ({'.annotate.json': '{"here": 1'}, 'annotate.json: cannot be used'), ({'.annotate.json': '[]'}, 'annotate.json: cannot be used'),
    ({'.annotate.json': '{"here": null, "unfinished": [{"image": "images/9.png", "width": 60, "height": 30, "gap": [1, 2]}]}'}, 'images/9.png: gone')])
def test_files_that_cannot_be_used_are_left_alone(folder, files, says):
    for name, text in files.items(): (folder/name).write_text(text)
    with pytest.raises(UserError, match=says): Annotations(folder)
    assert all((folder/name).read_text() == text for name, text in files.items())


def test_pictures_that_cannot_be_used_are_named(folder):
    (folder/'broken.PNG').write_bytes(b'no')
    os.symlink('/etc/hostname', folder/'away.jpg')
    Image.new('RGB', (5, 5)).save(folder/'small.png')
    sizes, wrong = picture_sizes(folder)
    assert len(sizes) == 4 and [any(part in line for line in wrong) for part in ('broken.PNG', 'leaves the data folder', '5×5')] == [True]*3
    assert 'pictures that cannot be used: 3' in Annotator(folder).problems.value
    (folder/'empty').mkdir()
    with pytest.raises(UserError, match='no readable picture'): Annotations(folder/'empty')
    with pytest.raises(UserError, match='no such folder'): Annotations(folder/'none')


def test_a_disk_that_cannot_be_written_is_a_line_and_no_change(folder, monkeypatch):
    tool = Annotator(folder)
    tool.click(5, 5)
    monkeypatch.setattr('captcha_hrnet.config.os.replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    tool._try('click', 9, 9)
    assert 'No space left' in tool.said.value and tool.points == dict(gap=[5, 5]) and tool.point.value == 'slider'
    monkeypatch.undo()
    tool._try('click', 9, 9)
    assert tool.said.value == '' and len(CaptchaDataset(folder.parent, 'train')) == 1


def test_clearing_takes_two_points_and_nothing_else(folder):
    "Flags and decoys that a label came with outlive its points, on the disk as well."
    rest = dict(has_rotation=True, decoys=[[3, 4]], shape='star', no_slider=True)
    (folder/'labels.jsonl').write_text(json.dumps(dict(image='images/0.png', width=60, height=30, gap=[30, 10], slider=None, **rest)) + '\n')
    store = Annotations(folder)
    store.change('images/0.png', {})
    assert store.points('images/0.png') == {} and not store.is_whole('images/0.png')
    again = Annotations(folder)
    again.change('images/0.png', dict(gap=[20, 9], slider=[5, 9]))
    assert json.loads((folder/'labels.jsonl').read_text()) == dict(image='images/0.png', width=60, height=30, gap=[20, 9], slider=[5, 9], has_rotation=True, decoys=[[3, 4]], shape='star')


def test_two_pictures_of_one_name_are_not_split(folder, tmp_path):
    Image.new('RGB', (50, 50)).save(folder/'0.png')
    for name in ('0.png', 'images/0.png', 'images/1.png', 'images/3.png'): Annotations(folder).change(name, dict(gap=[9, 9], slider=[3, 9]))
    with pytest.raises(UserError, match='images/0.png and 0.png would both become images/0.png|0.png and images/0.png would both become images/0.png'): split_labels(folder, tmp_path/'data', .5)
    assert not (tmp_path/'data').exists()


def test_a_split_is_decided_by_content_alone(folder, tmp_path):
    shutil.copy(folder/'images/0.png', folder/'again.png')
    tool = Annotator(folder)
    for name in tool.store.names: tool.store.change(name, dict(gap=[9, 9], slider=[3, 9]))
    sides = lambda data: {line['image']: side for side in ('train', 'val') for line in map(json.loads, open(data/side/'labels.jsonl'))}
    assert sum(split_labels(folder, tmp_path/'data', .3).values()) == 5
    first = sides(tmp_path/'data')
    assert first['images/again.png'] == first['images/0.png']                       # the same picture
    assert {side: len(CaptchaDataset(tmp_path/'data', side)) for side in ('train', 'val')} == {side: list(first.values()).count(side) for side in ('train', 'val')}
    Image.new('RGB', (50, 50)).save(folder/'new.png')
    Annotations(folder).change('new.png', dict(gap=[9, 9], slider=[3, 9]))
    split_labels(folder, tmp_path/'more', .3)
    assert {name: side for name, side in sides(tmp_path/'more').items() if name in first} == first     # whoever was there stays
    for val, says in ((0, 'between 0 and 1'), (1e-9, 'all of its 6 pictures fall into train')):
        with pytest.raises(UserError, match=says): split_labels(folder, tmp_path/'third', val)
    assert not (tmp_path/'third').exists()


# in a browser

@in_chromium
@pytest.mark.parametrize('front_end', (os.environ.get('ANNOTATE_IN') or 'voila').split())   # ANNOTATE_IN='lab classic voila' for all
def test_a_hand_in(front_end, chromium, pictures, tmp_path):  # noqa: F811
    from playwright.sync_api import expect
    shutil.copytree(pictures, tmp_path/'train')
    labels = lambda: [json.loads(line) for line in open(tmp_path/'train/labels.jsonl')]
    with serving(tmp_path, dict(tool="from captcha_hrnet.annotate import Annotator\nAnnotator('train')")) as server:
        page = open_notebook(chromium, server, front_end, 'tool')
        status, stage = page.get_by_role('status').filter(has_text='labelled'), page.locator('.cha-picture svg')
        expect(status).to_contain_text('0 of 4 labelled; images/0.png')
        page.wait_for_function('document.querySelector(".cha")?.dataset.ready')
        stage.scroll_into_view_if_needed()
        def spot(x, y, width, height):
            "Where a point of the picture is on the screen."
            box = stage.bounding_box()
            scale = min(box['width']/width, box['height']/height)
            return box['x'] + (box['width'] - scale*width)/2 + scale*x, box['y'] + (box['height'] - scale*height)/2 + scale*y
        page.mouse.click(*spot(41.3, 12.6, 60, 30))
        expect(status).to_contain_text('gap 41.')
        page.mouse.move(*spot(4, 6, 60, 30))
        page.mouse.down()
        page.mouse.move(*spot(15, 17, 60, 30), steps=3)
        shoot(page, f'annotate_box_{front_end}')
        page.mouse.up()                                             # a box: its centre
        expect(status).to_contain_text('1 of 4 labelled')
        record, = labels()
        assert record['gap'] == pytest.approx([41.3, 12.6], abs=.15) and record['slider'] == pytest.approx([9.5, 11.5], abs=.15)
        for _ in range(25): page.keyboard.press('ArrowRight')        # faster than a kernel answers: none is lost
        page.keyboard.press('Shift+ArrowDown')
        expect(status).to_contain_text(f'slider {record["slider"][0] + 6.25:.2f}, {record["slider"][1] + 4:.2f}')
        page.keyboard.press('n')
        page.keyboard.press('n')                                     # two steps, however fast
        expect(status).to_contain_text('images/3.png: no point yet')
        page.keyboard.press('f')
        expect(status).to_contain_text('images/1.png: no point yet')
        page.mouse.click(*spot(50, 24, 64, 48))
        expect(status).to_contain_text('gap 50.')
        page.get_by_role('button', name='gap').click()               # the other point by its button
        page.mouse.click(*spot(44, 24, 64, 48))
        expect(status).to_contain_text('gap 44.')
        shoot(page, f'annotate_{front_end}')
        page.keyboard.press('u')
        page.get_by_role('button', name='Undo').click()
        expect(status).to_contain_text('images/1.png: no point yet')
        page.get_by_label('Picture', exact=True).fill('1')           # n, b, … are text in a field
        page.keyboard.press('Enter')
        expect(status).to_contain_text('images/0.png: gap')
        assert len(labels()) == 1
        if front_end == 'lab': assert page.evaluate('document.querySelectorAll(".jp-Notebook-cell").length') == 1   # no key reached the notebook
        page.close()
    assert Annotations(tmp_path/'train').done == 1


def test_labels_that_say_there_is_none(tmp_path):
    "They stand as they are until somebody marks what they lack."
    for name in 'ab': Image.fromarray(np.full((40, 80, 3), 99, np.uint8)).save(tmp_path / f'{name}.png')
    lines = [dict(image=f'{name}.png', width=80, height=40, gap=None, no_gap=True, slider=[9, 9]) for name in 'ab']
    (tmp_path / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    annotator = Annotator(tmp_path)
    annotator.step(1)
    assert annotator.store.done == 2 and annotator.points == dict(slider=[9, 9])
    annotator.store.change('b.png', dict(slider=[10, 9]))
    annotator.store.change('a.png', dict(slider=[9, 9], gap=[50, 9]))
    records = [json.loads(line) for line in (tmp_path / 'labels.jsonl').read_text().splitlines()]
    assert records == [dict(image='a.png', width=80, height=40, gap=[50, 9], slider=[9, 9]), lines[1] | dict(slider=[10, 9])]
    assert annotator.store.undo() == 'a.png' and Annotations(tmp_path).done == 2 and Annotations(tmp_path).points('a.png') == dict(slider=[9, 9])
