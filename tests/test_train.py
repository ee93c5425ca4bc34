"""What the training notebook can't hold: the command line, signals and kills, two processes, and every mistake as one clear line."""
import functools
import gzip
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captcha_hrnet import train as module
from captcha_hrnet.config import Config, ConfigManager, load_config, run_command
from captcha_hrnet.data import DataPipeline
from captcha_hrnet.engine import TrainingEngine, load_checkpoint, log, newest_checkpoint, save_checkpoint
from captcha_hrnet.model import load_model
from captcha_hrnet.train import MetricsFile, Run, advice, plain, profiled
from captcha_hrnet.validator import Validator
from toys import Loader, Toy, batch_of

torch.set_num_threads(1)
QUICKSTART = Path(__file__).parent.parent/'configs'/'quickstart.yaml'
TINY = f"""
base: {QUICKSTART}
version: tiny
data: {{train_samples: 20, val_samples: 7}}
model: {{name: naive_lite_hrnet_18, neck_channels: 16, head_channels: 16}}
sched: {{epochs: 2, warmup_epochs: 0.5}}
train: {{batch_size: 4, accumulate: 2, num_workers: 1, log_every: 2}}
eval: {{batch_size: 4, vis_fail_k: 2, vis_samples: 2, bootstrap: 10}}
checkpoints: {{save_interval: 1}}
logging: {{hist_interval: 1}}
"""   # 5 batches an epoch: three optimiser steps, the last one short
BARE = ['eval.vis_fail_k=0', 'eval.vis_samples=0', 'logging.hist_interval=0', 'checkpoints.save_interval=5']   # the same weights, sooner
QUIET = os.environ | dict(OMP_WAIT_POLICY='passive', OMP_NUM_THREADS='1')
SERVER = """
import atexit, json, os, runpy, sys, traceback, torch
import captcha_hrnet.data, captcha_hrnet.model, captcha_hrnet.validator, captcha_hrnet.visualizer
torch.optim.AdamW([torch.zeros(1)])   # the last of the slow imports

def is_command():
    for line in sys.stdin:
        order = json.loads(line)
        if 'pid' in order:
            pid, status = os.waitpid(order['pid'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer: break
        print(json.dumps(answer), flush=True)
    else: return False
    os.setsid()
    os.chdir(order['folder'])
    for number, path in enumerate([os.devnull, order['out'], order['err']]): os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv[1:] = order['arguments']
    return True

if is_command():
    code = 0
    try: runpy.run_module('captcha_hrnet.train', run_name='__main__', alter_sys=True)
    except SystemExit as stop: code = stop.code
    except BaseException: code = traceback.print_exc() or 1
    atexit._run_exitfuncs()
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)   # to tear down what was imported would take a second
"""


class Command:
    "A process in a group of its own; what it prints goes to files, since workers may outlive a kill for seconds."
    def __init__(self, folder):
        number = len(list(folder.glob('out*.txt')))
        self.folder, self.out, self.err = folder, folder/f'out{number}.txt', folder/f'err{number}.txt'
        self.out.touch()
        self.began, self.code = time.monotonic(), None

    def wait(self, timeout=240):
        "Exit code, standard output and standard error."
        while self.poll() is None and time.monotonic() < self.began + timeout: time.sleep(.02)
        self.signal(signal.SIGKILL, missing_ok=True)   # whatever is left
        assert self.poll() is not None, 'no end'
        return SimpleNamespace(code=self.poll(), out=self.out.read_text(), err=self.err.read_text(), folder=self.folder)

    def signal(self, number, missing_ok=False):
        "To the whole group, as Ctrl-C and schedulers do."
        try: os.killpg(self.pid, number)
        except ProcessLookupError:
            if not missing_ok: raise


class Program(Command):
    "`python -m name arguments`"
    def __init__(self, folder, *arguments):
        super().__init__(folder)
        with open(self.out, 'w') as out, open(self.err, 'w') as err:
            self.process = subprocess.Popen([sys.executable, '-m', *arguments], cwd=folder, stdout=out, stderr=err, start_new_session=True, env=QUIET)
        self.pid, self.poll = self.process.pid, self.process.poll


class Forked(Command):
    "`python -m captcha_hrnet.train arguments`, forked from a process that has done the imports."
    def __init__(self, ask, folder, *arguments):
        super().__init__(folder)
        self.ask, self.pid = ask, ask(folder=str(folder), out=str(self.out), err=str(self.err), arguments=list(map(str, arguments)))

    def poll(self):
        if self.code is None: self.code = self.ask(pid=self.pid)
        return self.code


@pytest.fixture(scope='session')
def start():
    "`start(folder, *arguments)` starts a training."
    server, lock = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET), threading.Lock()
    def ask(**order):
        with lock:
            print(json.dumps(order), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())
    yield functools.partial(Forked, ask)
    server.stdin.close()
    server.wait(30)


def until(condition, process, timeout=120):
    while not condition() and process.poll() is None and time.monotonic() < process.began + timeout: time.sleep(.01)
    assert condition(), process.err.read_text()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def strict_json(text):
    def refuse(name): raise AssertionError(f'{name} is no JSON')
    return json.loads(text, parse_constant=refuse)


def records(folder, version='tiny'):
    lines = [strict_json(line) for line in (folder/f'logs/log-{version}/metrics.jsonl').read_text().splitlines()]
    for line in lines:
        for name in ('images_per_second', 'data_wait'): line['train'].pop(name)   # the two that are not repeatable
    return lines


@functools.cache
def checkpoint_of(folder, name): return load_checkpoint(folder/f'checkpoints/tiny/{name}.pth')   # of a run that is over


def assert_same_run(one, other):
    "Last checkpoint and metrics, to the last bit."
    a, b = (checkpoint_of(folder, 'last') for folder in (one, other))
    for key in ('model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'epoch', 'step', 'validator', 'metrics', 'done'): assert same(a[key], b[key]), key
    assert records(one) == records(other)
    assert same(*[checkpoint_of(folder, 'best_model')['ema_state_dict'] for folder in (one, other)])


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    "A whole run, as a user starts it."
    folder = tmp_path_factory.mktemp('finished')
    (folder/'tiny.yaml').write_text(TINY)
    process = Program(folder, 'captcha_hrnet.train', '--config', 'tiny.yaml')
    process.process.wait(240)
    try: process.signal(0)
    except ProcessLookupError: left = False
    else: left = True
    done = process.wait()
    done.left = left
    return done


# a whole run

def test_a_run_ends_well(finished):
    assert (finished.code, finished.err, finished.left) == (0, '', False)
    for what in ('best epoch', 'mae_px', 'checkpoints/tiny/best_model.pth', 'logs/log-tiny/predictions.png'): assert what in finished.out
    assert 'nan' not in finished.out.lower()


def test_a_run_leaves_its_files(finished):
    files = {str(p.relative_to(finished.folder)) for p in finished.folder.rglob('*') if p.is_file() and 'tfevents' not in p.name}
    assert files == {'tiny.yaml', 'out0.txt', 'err0.txt', *(f'checkpoints/tiny/{name}.pth' for name in ('best_model', 'last', 'epoch_000', 'epoch_001')),
                     *(f'logs/log-tiny/{name}' for name in ('training.log', 'metrics.jsonl', 'config.yaml', 'predictions.png'))}
    assert cv2.imread(str(finished.folder/'logs/log-tiny/predictions.png')).std() > 10


def test_the_log_can_be_searched(finished):
    text = (finished.folder/'logs/log-tiny/training.log').read_text()
    lines, numbers = re.findall(r'epoch=(\d+) loss=([\d.]+) .*mae=([\d.]+) ', text), records(finished.folder)
    assert [int(epoch) for epoch, _, _ in lines] == [0, 1]
    for (_, loss, mae), record in zip(lines, numbers):
        assert float(loss) == pytest.approx(record['train']['loss'], abs=1e-4) and float(mae) == pytest.approx(record['val']['mae_px'], abs=1e-3)


def test_metrics_are_json(finished):
    first, last = records(finished.folder)
    assert (first['epoch'], last['epoch']) == (0, 1) and first['is_best'] is True
    assert {'loss', 'gap_focal', 'slider_focal', 'offset', 'margin', 'gap_mae', 'slider_mae', 'grad_norm', 'lr', 'dropped', 'stopped'} == set(first['train'])
    assert {'mae_px', 'rmse_px', 'hit_le_1px', 'slide_hit_le_5px', 'p95_px', 'interval', 'by_flag', 'loss', 'loss_offset', 'n'} < set(last['val'])
    assert last['val']['n'] == 7


def test_the_saved_configuration_is_the_run(finished):
    saved = load_config(finished.folder/'logs/log-tiny/config.yaml')
    assert saved == load_config(finished.folder/'tiny.yaml')
    assert checkpoint_of(finished.folder, 'last')['config'] == saved.to_dict()


def test_checkpoints_hold_what_they_should(finished):
    states = {name: checkpoint_of(finished.folder, name) for name in ('epoch_000', 'best_model', 'last')}
    for state in states.values():
        assert {'epoch', 'epoch_step', 'step', 'model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'scheduler_state_dict', 'scaler_state_dict',
                'random', 'validator', 'config', 'metrics'} < set(state)
    assert {name: (state['epoch'], state['epoch_step'], state['step'], state['done']) for name, state in states.items() if name != 'best_model'} == {
        'epoch_000': (1, 0, 3, False), 'last': (2, 0, 6, True)}
    best = states['best_model']
    assert best['metrics']['epoch'] == best['epoch'] - 1 == best['validator']['best_epoch']   # so that it can be resumed from
    assert all(not name.startswith(('module.', '_orig_mod.')) for state in states.values() for name in state['model_state_dict'])


def test_the_best_model_predicts_what_was_measured(finished):
    model, config = load_model(finished.folder/'checkpoints/tiny/best_model.pth'), load_config(finished.folder/'tiny.yaml', ['train.num_workers=0'])
    metrics = Validator(config, 'cpu').validate(model, DataPipeline(config).setup().val_loader, checkpoint_of(finished.folder, 'best_model')['metrics']['epoch'])
    measured = next(record['val'] for record in records(finished.folder) if record['epoch'] == metrics['epoch'])
    assert strict_json(json.dumps(metrics)) == measured


@pytest.fixture(scope='session')
def board(finished):
    folder = finished.folder/'logs/tensorboard'
    assert [p.name for p in folder.rglob('*') if p.is_dir()] == ['tiny']   # one run, not one for each curve
    return EventAccumulator(str(folder/'tiny'), size_guidance=dict(scalars=0, images=0, histograms=0)).Reload()


def test_every_curve_is_in_tensorboard(board, finished):
    tags, (first, last) = set(board.Tags()['scalars']), records(finished.folder)
    metrics = {name for name, value in first['val'].items() if isinstance(value, float) and 'loss' not in name}
    assert len(metrics) == 13
    wanted = {f'loss/{name}' for name in ('train', 'val', 'gap_focal', 'slider_focal', 'offset', 'margin')} | {f'metrics/{name}' for name in metrics}
    wanted |= {'lr/current'} | {f'perf/{name}' for name in ('images_per_second', 'data_wait', 'dropped_steps', 'gpu_memory_gib')}
    wanted |= {f'metrics_{flag}/mae_px' for flag in first['val']['by_flag']}
    assert wanted <= tags
    curve = lambda tag: [(event.step, event.value) for event in board.Scalars(tag)]
    assert curve('loss/val') == [(i, pytest.approx(record['val']['loss'], rel=1e-6)) for i, record in enumerate((first, last))]
    assert curve('loss/train') == [(i, pytest.approx(record['train']['loss'], rel=1e-6)) for i, record in enumerate((first, last))]
    assert [step for step, _ in curve('lr/current')] == [2, 3, 4, 6]
    assert curve('lr/current')[1][1] == pytest.approx(first['train']['lr'])


def test_every_picture_is_in_tensorboard(board):
    wanted = {'vis/overlay_gap', 'vis/overlay_slider', 'vis/heatmap_gap', 'vis/heatmap_slider', 'failures/00', 'failures/01'}
    assert wanted == set(board.Tags()['images'])
    for tag in wanted:
        events = board.Images(tag)
        assert [event.step for event in events] == [0, 1] and events[0].height >= 64 and events[0].width >= 128


def test_histograms_and_settings_are_in_tensorboard(board):
    parts = lambda kind: {tag.removeprefix(f'hist/{kind}_') for tag in board.Tags()['distributions'] if tag.startswith(f'hist/{kind}_')}
    assert {'backbone_stem', 'heads_gap_heatmap', 'heads_slider_heatmap', 'heads_offsets'} < parts('weight') and len(parts('weight')) > 8
    assert parts('grad') == parts('weight')
    assert {'_hparams_/experiment', '_hparams_/session_start_info', '_hparams_/session_end_info'} <= set(board.summary_metadata)
    assert 'hparam/mae_px' in board.Tags()['scalars']


# stopped and killed

def test_stopped_and_killed_and_resumed(finished, start, tmp_path):
    "At random moments of both epochs; SIGINT and SIGTERM reach the loader's workers as well."
    (tmp_path/'tiny.yaml').write_text(TINY)
    last, arguments, rng = tmp_path/'checkpoints/tiny/last.pth', ['--config', 'tiny.yaml', '--resume', 'auto', '--set', *BARE], random.Random(0)
    for number, wanted_epoch in ((signal.SIGKILL, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 1)):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = start(tmp_path, *arguments)
        if not before: until(last.exists, process)
        elif wanted_epoch and not (tmp_path/'logs/log-tiny/metrics.jsonl').exists(): until(lambda before=before: last.stat().st_mtime_ns > before, process)
        else: until(lambda process=process: 'resumed from' in process.out.read_text(), process)
        time.sleep(rng.uniform(.3, .9))
        process.signal(number)
        done = process.wait()
        if number == signal.SIGKILL: assert done.code == -signal.SIGKILL
        else:
            assert (done.code, done.err) == (0, '')
            assert done.out.count(f'{number.name}: finishing this step') == 1
            assert 'go on with: --resume auto' in done.out and 'checkpoints/tiny/last.pth' in done.out
        if (tmp_path/'logs/log-tiny/metrics.jsonl').exists(): records(tmp_path)
    done = start(tmp_path, *arguments).wait()
    assert (done.code, done.err) == (0, '')
    log_text = (tmp_path/'logs/log-tiny/training.log').read_text()
    assert log_text.count('resumed from checkpoints/tiny/last.pth: epoch') == 4 and 'older one' not in log_text   # last.pth was whole each time
    assert_same_run(finished.folder, tmp_path)


def in_this_process(folder, *overrides, resume=None):
    places = [f'checkpoints.save_dir={folder}/checkpoints', f'logging.log_dir={folder}/logs', f'logging.tensorboard_dir={folder}/logs/tensorboard']
    manager = ConfigManager(folder/'tiny.yaml', ['train.num_workers=0', *BARE, *places, *overrides])
    return Run(manager, resume)


def test_more_epochs_in_another_folder(finished, tmp_path):
    "A finished run goes on when more epochs are asked for, and takes its best model along."
    (tmp_path/'tiny.yaml').write_text(TINY)
    theirs = finished.folder/'checkpoints/tiny'
    run = in_this_process(tmp_path, 'version=longer', 'sched.epochs=3', 'data.val_samples=3', resume=str(theirs/'last.pth'))
    assert (run.engine.epoch, run.done) == (2, False)
    ours = tmp_path/'checkpoints/longer/best_model.pth'
    assert ours.read_bytes() == (theirs/'best_model.pth').read_bytes()
    run.validator.best = [101., 0.]   # nothing can be better
    assert run.fit()['epoch'] == checkpoint_of(finished.folder, 'best_model')['validator']['best_epoch']
    assert [record['epoch'] for record in records(tmp_path, 'longer')] == [2]
    again = in_this_process(tmp_path, 'version=longer', 'sched.epochs=3', resume='auto')
    assert again.done and again.engine.epoch == 3   # nothing is left to do


def test_the_profile(tmp_path):
    engine = TrainingEngine(Toy(norm=True), Config(train=dict(amp='off', num_workers=0)), 'cpu')
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    with profiled(engine, 2, tmp_path): engine.train_epoch(Loader([batch_of(4)]*6), 0)
    log.removeHandler(handler)
    log.setLevel(level)
    with gzip.open(tmp_path/'trace.json.gz') as file: names = [event.get('name', '') for event in json.load(file)['traceEvents']]
    assert 'aten::convolution_backward' in names and len({name for name in names if name.startswith('ProfilerStep')}) == 2   # two steps of six
    assert len(lines) == 1 and 'profile of 2 steps' in lines[0] and 'Self CPU' in lines[0] and 'convolution' in lines[0]
    assert engine.profiler is None


def test_the_first_epoch_of_a_process_is_profiled(tmp_path, monkeypatch):
    (tmp_path/'tiny.yaml').write_text(TINY)
    run, calls = in_this_process(tmp_path, 'logging.profile_steps=3'), []
    run.first_epoch = 1
    monkeypatch.setattr(module, 'profiled', lambda engine, steps, folder: calls.append((steps, folder)) or nullcontext())
    monkeypatch.setattr(run.engine, 'train_epoch', lambda loader, epoch: epoch)
    assert [run._train(epoch) for epoch in (1, 2)] == [1, 2] and calls == [(3, run.manager.log_dir)]


def test_a_new_run_replaces_an_old_one(tmp_path, monkeypatch):
    "Killed before its first epoch is over, it must not be resumed from the old run's last.pth."
    (tmp_path/'tiny.yaml').write_text(TINY)
    folder = tmp_path/'checkpoints/tiny'
    folder.mkdir(parents=True)
    for name, epoch in (('last', 9), ('epoch_008', 9)): save_checkpoint(folder/f'{name}.pth', dict(model_state_dict={}, epoch=epoch))
    run = in_this_process(tmp_path)
    def killed(epoch): raise KeyboardInterrupt
    monkeypatch.setattr(run, '_epoch', killed)
    with pytest.raises(KeyboardInterrupt): run.fit()
    assert newest_checkpoint(folder).name == 'last.pth' and load_checkpoint(folder/'last.pth')['step'] == 0


def test_old_checkpoints_are_pruned(tmp_path):
    run = SimpleNamespace(manager=SimpleNamespace(checkpoint_dir=tmp_path), config=Config(checkpoints=dict(keep_last=2)))
    for name in ('epoch_998', 'epoch_999', 'epoch_1000', 'epoch_1001', 'epoch_1002', 'epoch_mine', 'last', 'best_model'): (tmp_path/f'{name}.pth').touch()
    module._prune(run, 1001)   # epoch 1002 is of a run that was given up
    assert {p.stem for p in tmp_path.iterdir()} == {'epoch_1000', 'epoch_1001', 'epoch_mine', 'last', 'best_model'}


# mistakes

def prepare(finished, folder, case):
    "The files that a case needs, in a folder of its own."
    (folder/'tiny.yaml').write_text(TINY)
    (folder/'empty.yaml').touch()
    (folder/'broken.yaml').write_text('train: {batch_size: 4\n')
    (folder/'wrong.yaml').write_text(TINY + 'optimiser: {lr: 1}\n')
    (folder/'many.yaml').write_text('sched: {epoch: 3}\ntrain: {batch_size: many}\nmodel: {name: resnet}\n')
    (folder/'images').mkdir()
    (folder/'unlabelled/train').mkdir(parents=True)
    whole = (finished.folder/'checkpoints/tiny/last.pth').read_bytes()
    if 'torn' in case: (folder/'torn.pth').write_bytes(whole[:len(whole)//2])
    if 'all torn' in case:
        (folder/'checkpoints/tiny').mkdir(parents=True)
        for name in ('last', 'epoch_000'): (folder/f'checkpoints/tiny/{name}.pth').write_bytes(whole[:1000])


TINY_RUN = ['--config', 'tiny.yaml']
DIRECTORY = ['data.source=directory']
MISTAKES = {   # case: arguments, exit code, what the lines say, in order
    'no config': ([], 2, ['--config is needed']),
    'unknown option': ([*TINY_RUN, '--epochs', '3'], 2, ['--epochs']),
    'config missing': (['--config', 'nowhere.yaml'], 1, ['nowhere.yaml: .*(No such file|no such file)']),
    'config empty': (['--config', 'empty.yaml'], 1, ['empty.yaml: .*empty']),
    'config not yaml': (['--config', 'broken.yaml'], 1, ['broken.yaml: not valid YAML: line']),
    'misspelt section': (['--config', 'wrong.yaml'], 1, ['wrong.yaml: optimiser: unknown key, .*optimizer']),
    'three mistakes': (['--config', 'many.yaml'], 1, ['model.name', 'sched.epoch.*sched.epochs', 'train.batch_size.*many']),
    'wrong type': ([*TINY_RUN, '--set', 'train.batch_size=eight'], 1, ['train.batch_size.*eight']),
    'resume missing': ([*TINY_RUN, '--resume', 'nowhere.pth'], 1, ['nowhere.pth: no such checkpoint']),
    'resume torn': ([*TINY_RUN, '--resume', 'torn.pth'], 1, ['torn.pth: not a readable checkpoint']),
    'resume folder': ([*TINY_RUN, '--resume', 'images'], 1, ['images: a folder']),
    'resume all torn': ([*TINY_RUN, '--resume', 'auto'], 1, ['checkpoints/tiny: none of its 2 checkpoints is whole']),
    'resume another model': ([*TINY_RUN, '--resume', 'FINISHED/last.pth', '--set', 'model.neck_channels=24'], 1, ['last.pth: .*model.neck_channels: 16 there, 24 here']),
    'data missing': ([*TINY_RUN, '--set', 'data.root=nowhere', *DIRECTORY], 1, ['nowhere/train: no such folder']),
    'data without labels': ([*TINY_RUN, '--set', 'data.root=unlabelled', *DIRECTORY], 1, ['unlabelled/train/labels.jsonl: no such file']),
    'no such device': ([*TINY_RUN, '--set', 'hardware.device=cuda:9'], 1, ['hardware.device.*cuda:9 does not exist here']),
    'half precision on the CPU': ([*TINY_RUN, '--set', 'train.amp=fp16'], 1, ['train.amp.*bf16 or off']),
    'batch too large': ([*TINY_RUN, '--set', 'train.batch_size=21'], 1, ['20 training samples.*train.batch_size']),
    'inspect torn': (['--inspect', 'torn.pth'], 1, ['torn.pth: not a readable checkpoint']),
    'diverges': ([*TINY_RUN, '--set', 'optimizer.lr=1e30', 'sched.warmup_epochs=0', 'train.max_nonfinite_steps=1', *BARE], 1,
                 ['2 steps in a row.*lower optimizer.lr.*saved checkpoints/tiny/last.pth']),
}


@pytest.fixture(scope='session')
def mistakes(finished, start, tmp_path_factory):
    "Every case run, two at a time."
    def run(case):
        folder = tmp_path_factory.mktemp('mistake')
        prepare(finished, folder, case)
        arguments = [argument.replace('FINISHED', str(finished.folder/'checkpoints/tiny')) for argument in MISTAKES[case][0]]
        return start(folder, *arguments).wait()
    with ThreadPoolExecutor(2) as pool: return dict(zip(MISTAKES, pool.map(run, MISTAKES)))


@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_is_a_clear_line(case, mistakes):
    result, (_, code, wanted) = mistakes[case], MISTAKES[case]
    assert result.code == code and 'Traceback' not in result.err + result.out
    lines = result.err.splitlines()
    if code == 1: assert len(lines) == len(wanted) and all(line.startswith('error: ') for line in lines), result.err
    else: assert lines[0].startswith('usage: python -m captcha_hrnet.train')
    for line, pattern in zip(lines[-len(wanted):], wanted): assert re.search(pattern, line), line


@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_leaves_nothing_broken(case, mistakes):
    folder = mistakes[case].folder
    written = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()} - {'out0.txt', 'err0.txt'}
    written = {name for name in written if not name.endswith(('.yaml', 'torn.pth', 'training.log'))} | {name for name in written if 'config.yaml' in name}
    if case == 'diverges':
        assert load_checkpoint(folder/'checkpoints/tiny/last.pth')['dropped'] == 2
        assert load_config(folder/'logs/log-tiny/config.yaml').optimizer.lr == 1e30
    elif case == 'resume all torn': assert written == {'checkpoints/tiny/last.pth', 'checkpoints/tiny/epoch_000.pth'}
    else: assert written == set()


def test_out_of_memory_says_what_to_do(finished, monkeypatch, capsys, tmp_path):
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(module, 'Run', full)
    monkeypatch.chdir(tmp_path)
    assert run_command(module.main.__wrapped__, ['--config', str(finished.folder/'tiny.yaml')]) == 1
    assert re.fullmatch(r'error: out of memory: halve train.batch_size \(4\) and double train.accumulate .*\n', capsys.readouterr().err)


def test_inspect(finished, capsys):
    assert run_command(module.main.__wrapped__, ['--inspect', str(finished.folder/'checkpoints/tiny/best_model.pth')]) == 0
    text = capsys.readouterr().out
    assert 'version tiny' in text and 'naive_lite_hrnet_18' in text and 'ema_state_dict' in text and 'mae_px' in text


def test_inspect_of_another_file(tmp_path, capsys):
    torch.save(dict(model_state_dict={}), tmp_path/'other.pth')
    assert run_command(module.main.__wrapped__, ['--inspect', str(tmp_path/'other.pth')]) == 1
    assert 'not a checkpoint of a training run' in capsys.readouterr().err


# other ways to train

def test_training_from_a_directory(start, tmp_path):
    (tmp_path/'tiny.yaml').write_text(TINY)
    made = Program(tmp_path, 'captcha_hrnet.synth', '--out', 'data', '--train', '9', '--val', '5', '--config', 'tiny.yaml', '--workers', '1').wait()
    assert made.code == 0, made.err
    done = start(tmp_path, '--config', 'tiny.yaml', '--set', *DIRECTORY, 'sched.epochs=1', 'train.log_every=20', *BARE).wait()
    assert (done.code, done.err) == (0, '')
    record, = records(tmp_path)
    assert record['val']['n'] == 5
    tags = EventAccumulator(str(tmp_path/'logs/tensorboard/tiny')).Reload().Tags()
    assert 'lr/current' in tags['scalars'] and not tags['images']   # log_every is longer than the run; no pictures were asked for


def test_two_processes(tmp_path):
    (tmp_path/'tiny.yaml').write_text(TINY)
    done = Program(tmp_path, 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'captcha_hrnet.train', '--config', 'tiny.yaml', '--set', *BARE).wait()
    assert done.code == 0 and 'Traceback' not in done.err, done.err
    first, last = records(tmp_path)
    assert (first['epoch'], last['epoch'], first['val']['n'], last['val']['n']) == (0, 1, 7, 7)   # 4 and 3 samples
    text = (tmp_path/'logs/log-tiny/training.log').read_text()
    assert [text.count(f'epoch={epoch} ') for epoch in (0, 1)] == [1, 1]
    assert len({path.name.split('.')[-2] for path in (tmp_path/'logs/tensorboard').rglob('*tfevents*')}) == 1   # one process writes
    assert {path.name for path in (tmp_path/'checkpoints/tiny').iterdir()} == {'last.pth', 'best_model.pth'}
    path = tmp_path/'checkpoints/tiny/best_model.pth'
    assert checkpoint_of(tmp_path, 'last')['step'] == 2   # 20 samples, 2 processes of 4, 2 batches a step: one an epoch
    config = load_config(tmp_path/'tiny.yaml', ['train.num_workers=0'])
    again = Validator(config, 'cpu').validate(load_model(path), DataPipeline(config).setup().val_loader)
    assert again['mae_px'] == pytest.approx(checkpoint_of(tmp_path, 'best_model')['metrics']['mae_px'], rel=1e-6)


# pieces

def test_null_stands_for_what_json_does_not_know(tmp_path):
    assert plain(dict(a=[float('nan'), (float('inf'), 1)], b=dict(c=-float('inf'), d='x', e=None, f=True))) == dict(a=[None, [None, 1]], b=dict(c=None, d='x', e=None, f=True))
    file = MetricsFile(tmp_path/'metrics.jsonl')
    file.append(dict(epoch=0, val=dict(mae_px=float('nan'))))
    assert [strict_json(line) for line in (tmp_path/'metrics.jsonl').read_text().splitlines()] == [dict(epoch=0, val=dict(mae_px=None))]


def test_advice_survives_an_epoch_without_a_loss():
    assert advice([dict(train=dict(dropped=3), val=dict(hit_le_5px=0.))]*8) == []
