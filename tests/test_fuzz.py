"""Anything as configuration, command line, labels or checkpoint: a clear line or a result, never a traceback, never a hang.

`pytest tests/test_fuzz.py --hypothesis-profile=long` runs 2,000 cases of each test."""
import contextlib
import io
import json
import signal

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from captcha_hrnet import train as module
from captcha_hrnet.config import SCHEMA, ConfigManager, UserError, run_command
from captcha_hrnet.data import CaptchaDataset, LabelTable
from captcha_hrnet.engine import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from captcha_hrnet.train import inspect_checkpoint
from test_config import near_misses, trees, values
from test_data import ANYTHING, EDITS, GOOD, RECORD, grey, mutate
from test_engine import engine_of
from toys import Loader, batch_of

cases = settings(max_examples=settings.default.max_examples if settings.default.max_examples > 100 else 40, deadline=None, suppress_health_check=[*HealthCheck], phases=[Phase.explicit, Phase.reuse, Phase.generate])
SECONDS = 20   # a case that takes longer hangs
tree_texts = (trees | near_misses()).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))
texts = tree_texts | st.text("[]{}:,-&*!|>?'\"#% \n\tab1.e<\\u0\x00\x85\u2028", max_size=80)
overrides = st.builds('{}={}'.format, st.sampled_from(sorted(SCHEMA)).map('.'.join), values) | st.text(max_size=20)


@contextlib.contextmanager
def in_time():
    def hang(*_): raise AssertionError(f'more than {SECONDS} s')
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Reached(Exception):
    "The configuration was good: a run would begin."


def says(arguments):
    "What the training command says; whether it would train."
    out, err, code = io.StringIO(), io.StringIO(), None
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = run_command(module.main.__wrapped__, arguments)
        except SystemExit as stop: code = stop.code
        except Reached: return True
    assert code in (0, 1, 2), code
    if code == 1: assert err.getvalue() and all(line.startswith('error: ') and len(line) > 8 for line in err.getvalue().splitlines()), err.getvalue()
    if code == 2: assert 'usage: ' in err.getvalue()
    assert 'Traceback' not in err.getvalue() + out.getvalue()
    return False


@pytest.fixture
def command(tmp_path, monkeypatch):
    "No folder is made and no run begins."
    def reached(*_): raise Reached
    monkeypatch.setattr(module, 'Run', reached)
    monkeypatch.setattr(module, 'ConfigManager', lambda config, set: ConfigManager(config, set, make_folders=False))
    monkeypatch.chdir(tmp_path)


@cases
@given(text=texts)
def test_any_file_is_a_configuration_or_a_line(command, text):
    with open('any.yaml', 'w', errors='surrogatepass') as file: file.write(text)
    says(['--config', 'any.yaml'])


@cases
@given(assignments=st.lists(overrides, min_size=1, max_size=5))
def test_any_override_is_taken_or_a_line(command, assignments):
    with open('small.yaml', 'w') as file: file.write('seed: 1\n')
    says(['--config', 'small.yaml', '--set', *assignments])


words = st.sampled_from(['--config', '--resume', '--set', '--inspect', '--help', '--', '-h', '--conf', 'small.yaml', 'auto', 'nowhere', '.', '', 'train.amp=off', '--set=seed=2']) | st.text(max_size=12)


@cases
@given(arguments=st.lists(words, max_size=6))
@example(arguments=['--config', 'a\rb\n.//c\x85\x1b[2J'])   # 2,000 cases found that such a name was two lines
@example(arguments=['--resume', '\n', '--config', 'small.yaml', '--set', 'a\n=\r'])
def test_any_command_line_is_understood_or_refused(command, arguments):
    with open('small.yaml', 'w') as file: file.write('seed: 1\n')
    says(arguments)


LINES = [{**GOOD, 'image': f'images/{i}.png', 'decoys': [[1, 2.5]], 'has_noise': True, 'gap_angle': 3} for i in range(3)]


@pytest.fixture
def split(tmp_path):
    (tmp_path/'images').mkdir()
    for i in range(3): grey(50*i).save(tmp_path/f'images/{i}.png')
    return tmp_path


@cases
@given(lines=st.lists(RECORD | ANYTHING | st.sampled_from(LINES), max_size=4), edits=st.just([]) | EDITS, between=st.sampled_from([b'\n', b'\r\n', b'\n\n', b'']))
def test_any_labels_are_taken_or_reported(split, lines, edits, between):
    (split/'labels.jsonl').write_bytes(mutate(between.join(json.dumps(line).encode() for line in lines), edits))
    with in_time():
        table = LabelTable(split/'labels.jsonl')
        assert all(isinstance(reason, str) and reason for _, reason in table.rejected)
        try: dataset = CaptchaDataset(split.parent, split.name, 64, 64, 'skip')
        except UserError as error: assert str(error)
        else: assert all(torch.isfinite(dataset[i]['gap_coords']).all() for i in range(len(dataset)))


def trained():
    engine = engine_of(norm=True)
    engine.train_epoch(Loader([batch_of(4)]), 0)
    return engine.state_dict() | dict(validator=dict(best=[1., -2.], best_epoch=0, guard_best=None, bad_epochs=0), done=False, metrics={})


STATE = trained()


def read(path):
    "By everything that reads checkpoints."
    with in_time():
        try: state = load_checkpoint(path)
        except CheckpointError as error: return str(error)
        for reader in (lambda: newest_checkpoint(path.parent), lambda: inspect_checkpoint(path), lambda: engine_of(norm=True).load_state_dict(state)):
            try: reader()
            except CheckpointError as error: assert str(error) and '\n' not in str(error)


@cases
@given(edits=EDITS)
def test_any_damage_to_a_checkpoint_is_found_or_harmless(tmp_path, edits):
    path = tmp_path/'last.pth'
    save_checkpoint(path, STATE)
    path.write_bytes(mutate(path.read_bytes(), edits))
    read(path)


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(torch.zeros(2)),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3), max_leaves=6)


def paths(tree, prefix=()):
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@cases
@given(changes=st.lists(st.tuples(st.sampled_from([*paths(STATE)]), plain | st.just('missing')), min_size=1, max_size=3))
def test_any_content_of_a_checkpoint_is_taken_or_refused(tmp_path, changes):
    state = dict(STATE)
    for path, value in changes:
        node = state
        for key in path[:-1]:
            node[key] = dict(node[key]) if isinstance(node.get(key), dict) else {}
            node = node[key]
        if isinstance(value, str) and value == 'missing': node.pop(path[-1], None)
        else: node[path[-1]] = value
    save_checkpoint(tmp_path/'last.pth', state)
    read(tmp_path/'last.pth')
