"""What the training notebook can't hold: the command line, signals and kills, two processes, and every mistake as one clear line."""
import functools
import gzip
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from captcha_hrnet import train as module
from captcha_hrnet.config import Config, UserError, load_config, run_command
from captcha_hrnet.data import DataPipeline
from captcha_hrnet.engine import TrainingEngine, load_checkpoint, log, newest_checkpoint, save_checkpoint
from captcha_hrnet.model import load_model
from captcha_hrnet.train import MetricsFile, advice, clear_errors, plain, profiled
from captcha_hrnet.validator import Validator
from processes import BARE, TINY, Program, assert_same_run, in_this_process, is_over, kill, records, strict_json, until
from toys import Loader, Toy, batch_of

torch.set_num_threads(1)


@functools.cache
def checkpoint_of(folder, name): return load_checkpoint(folder/f'checkpoints/tiny/{name}.pth')   # of a run that is over


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    "A whole run, as a user starts it."
    folder = tmp_path_factory.mktemp('finished')
    (folder/'tiny.yaml').write_text(TINY)
    process = Program(folder, 'captcha_hrnet.train', '--config', 'tiny.yaml')
    process.process.wait(240)
    left = not is_over(process)
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
                     *(f'logs/log-tiny/{name}' for name in ('training.log', 'metrics.jsonl', 'config.yaml', 'predictions.png')),
                     'checkpoints/tiny/.lock', 'logs/log-tiny/.lock'}
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
    assert 'result/mae_px' in board.Tags()['scalars']


# stopped and killed

def workers_of(process): return [*map(int, Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split())]


def test_stopped_and_killed_and_resumed(finished, start, tmp_path):
    "In both epochs; the training process alone is killed, and stops come twice, to the whole group, as schedulers send them."
    (tmp_path/'tiny.yaml').write_text(TINY)
    last, arguments, killed = tmp_path/'checkpoints/tiny/last.pth', ['--config', 'tiny.yaml', '--resume', 'auto', '--set', *BARE], []
    for number, wanted_epoch, moment in ((signal.SIGKILL, 0, .5), (signal.SIGINT, 0, None), (signal.SIGKILL, 1, None), (signal.SIGTERM, 1, None)):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = start(tmp_path, *arguments)
        if not before: until(last.exists, process)
        elif wanted_epoch and not (tmp_path/'logs/log-tiny/metrics.jsonl').exists(): until(lambda before=before: last.stat().st_mtime_ns > before, process)
        else: until(lambda process=process: 'resumed from' in process.out.read_text(), process)
        if not before: assert_refused(start(tmp_path, *arguments).wait(), process)
        if number == signal.SIGKILL:
            kill(process, tmp_path, moment)
            assert process.poll() == -signal.SIGKILL
            killed.append(process)
        else:
            until(lambda process=process: workers_of(process), process)   # a whole epoch lies before it
            for _ in range(2): process.signal(number)
            done = process.wait()
            assert (done.code, done.err) == (0, '')
            assert done.out.count(f'{number.name}: finishing this step') == 1
            assert 'go on with: --resume auto' in done.out and 'checkpoints/tiny/last.pth' in done.out
        if (tmp_path/'logs/log-tiny/metrics.jsonl').exists(): records(tmp_path)
    done = start(tmp_path, *arguments).wait()
    assert (done.code, done.err) == (0, '')
    log_text = (tmp_path/'logs/log-tiny/training.log').read_text()
    assert log_text.count('resumed from checkpoints/tiny/last.pth: epoch') == 4 and 'older one' not in log_text   # last.pth was whole each time
    assert [f'checkpoints/tiny: taken over from process {process.pid} on ' in log_text for process in killed] == [True, True]
    assert not [*tmp_path.rglob('*.tmp')]
    assert_same_run(finished.folder, tmp_path)
    for process in killed: until(lambda process=process: is_over(process), SimpleNamespace(poll=lambda: None, began=time.monotonic(), err=process.err), 30)


def assert_refused(second, first):
    name = rf'process {first.pid} on {re.escape(socket.gethostname())}'
    assert second.code == 1 and re.fullmatch(rf'error: checkpoints/tiny: {name} trains in this folder: .*version\n', second.err), second.err


def test_a_full_disk_ends_the_run_in_a_line(start, tmp_path):
    "The limit of a file's size stands for it; what was written before is still there, and is gone on with."
    (tmp_path/'tiny.yaml').write_text(TINY)
    last, arguments = tmp_path/'checkpoints/tiny/last.pth', ['--config', 'tiny.yaml', '--resume', 'auto', '--set', *BARE, 'sched.epochs=1']
    process = start(tmp_path, *arguments)
    until(last.exists, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (last.stat().st_size//2, resource.RLIM_INFINITY))
    done = process.wait()
    assert done.code == 1 and re.fullmatch(r'error: checkpoints/tiny/best_model.pth: cannot be written \(.*\); what stood there before is untouched\n', done.err), done.err
    assert load_checkpoint(last)['step'] == 0 and {path.name for path in last.parent.iterdir()} == {'last.pth', '.lock'}
    assert start(tmp_path, *arguments).wait().code == 0 and load_checkpoint(last)['step'] == 3


def test_signals_outside_of_the_training(start, tmp_path):
    "While it imports, and while it looks at its data: one line, and an end in order."
    (tmp_path/'tiny.yaml').write_text(TINY)
    process = Program(tmp_path, 'captcha_hrnet.train', '--config', 'tiny.yaml')
    until(lambda: 'torch' in Path(f'/proc/{process.pid}/maps').read_text(), process)   # its libraries are being loaded
    process.signal(signal.SIGINT)
    done = process.wait()
    assert (done.code, done.out, done.err) == (0, 'SIGINT: ended outside of the training; nothing was lost\n', '')
    process = start(tmp_path, '--config', 'tiny.yaml', '--set', 'data.cache=cache', 'data.val_samples=5000')   # to be packed
    until((tmp_path/'cache').exists, process)
    process.signal(signal.SIGTERM)
    done = process.wait()
    assert (done.code, done.out, done.err) == (0, 'SIGTERM: ended outside of the training; nothing was lost\n', '')
    assert not [*tmp_path.rglob('*.pth'), *tmp_path.rglob('*.tmp')]


WHILE = dict(
    around_a_fork='''
os.register_at_fork(before=end)   # Python prints what is raised here, and goes on
if not os.fork(): os._exit(0)''',
    something_is_half_built='''
class Loader:
    def __init__(self): end(); self.workers = []
    def __del__(self): self.workers.clear()
Loader()''',
    a_run_is_half_built='''
class Loader:
    def __init__(self): end(); self.workers = []
    def __del__(self): self.workers.clear()
with train.clear_errors(None): Loader()''',
    all_is_swallowed='''
try: end()
except BaseException: pass''',
    it_tidies_up='''
try: end()
finally: time.sleep(.5); print('tidy')''')


@pytest.mark.parametrize('moment', WHILE)
def test_a_signal_that_comes_while(moment):
    setup = 'import os, signal, time\nfrom captcha_hrnet import train\nsignal.signal(signal.SIGTERM, train.end_at_once)\ndef end(): os.kill(os.getpid(), signal.SIGTERM)'
    done = subprocess.run([sys.executable, '-c', f'{setup}{WHILE[moment]}\ntime.sleep(30)\nraise SystemExit(9)'], capture_output=True, text=True, timeout=60)
    tidy = 'tidy\n'*(moment == 'it_tidies_up')
    assert (done.returncode, done.stdout, done.stderr) == (0, f'SIGTERM: ended outside of the training; nothing was lost\n{tidy}', '')


def test_a_signal_to_a_worker_that_just_starts(monkeypatch):
    "PyTorch's workers end at a SIGTERM until they are told otherwise."
    theirs = signal_handling._set_worker_signal_handlers
    monkeypatch.setattr(signal_handling, '_set_worker_signal_handlers', lambda: (theirs(), os.kill(os.getpid(), signal.SIGTERM)))
    loader = DataLoader(range(6), num_workers=2, worker_init_fn=abs)
    with module.patient_workers(loader): assert [int(x) for x in loader] == [*range(6)]
    with pytest.raises(RuntimeError, match='worker'): [*loader]


def test_a_killed_worker_ends_the_run_in_a_line(start, tmp_path):
    (tmp_path/'tiny.yaml').write_text(TINY)
    process = start(tmp_path, '--config', 'tiny.yaml', '--set', *BARE, 'sched.epochs=50')
    until(lambda: 'epoch=1 ' in process.out.read_text(), process)
    for worker in workers_of(process): os.kill(worker, signal.SIGKILL)
    done = process.wait()
    assert done.code == 1 and re.fullmatch(r'error: a process that loads data was killed, .*num_workers.*--resume auto\n', done.err), done.err
    assert load_checkpoint(tmp_path/'checkpoints/tiny/last.pth')['epoch'] >= 1


def test_a_worker_that_is_gone_is_not_reported_by_a_destructor(capsys):
    "PyTorch raises where the signal finds the program; in a destructor Python can only report it. Other reports stay, and all of them afterwards."
    class Leaves:
        def __init__(self, message): self.message = message
        def __del__(self): raise RuntimeError(self.message)
    before = sys.unraisablehook
    try:
        sys.unraisablehook = sys.__unraisablehook__   # pytest has its own
        with clear_errors(Config().train): Leaves('DataLoader worker (pid 7) is killed by signal: Killed. '); Leaves('something else')
        said = capsys.readouterr().err
        assert 'something else' in said and 'DataLoader' not in said and sys.unraisablehook is sys.__unraisablehook__
    finally: sys.unraisablehook = before


def test_what_a_worker_says_is_a_line(start, tmp_path):
    "A picture that is gone in mid-run: PyTorch's report of it is a traceback."
    (tmp_path/'tiny.yaml').write_text(TINY)
    assert Program(tmp_path, 'captcha_hrnet.synth', '--out', 'data', '--train', '9', '--val', '5', '--config', 'tiny.yaml', '--workers', '1').wait().code == 0
    process = start(tmp_path, '--config', 'tiny.yaml', '--set', *DIRECTORY, *BARE, 'sched.epochs=50')
    until((tmp_path/'logs/log-tiny/metrics.jsonl').exists, process)
    for picture in (tmp_path/'data/train/images').iterdir(): picture.unlink()
    done = process.wait()
    assert done.code == 1 and re.fullmatch(r'error: data/train/images/\S+: no such file.*\n', done.err), done.err


def test_another_runs_best_model_is_not_taken_for_this_ones(finished, tmp_path):
    "It lies beside what is resumed, because a run was made in the same folder meanwhile, or because later epochs are given up."
    (tmp_path/'tiny.yaml').write_text(TINY)
    theirs = tmp_path/'checkpoints/tiny'
    shutil.copytree(finished.folder/'checkpoints/tiny', theirs)
    other = checkpoint_of(finished.folder, 'best_model')
    other['validator'] |= dict(best=[other['validator']['best'][0], -1e-3])   # better than any
    save_checkpoint(theirs/'best_model.pth', other)
    run = in_this_process(tmp_path, 'version=longer', 'sched.epochs=3', 'data.val_samples=3', resume=str(theirs/'last.pth'))
    assert run.validator.best is None and not (tmp_path/'checkpoints/longer/best_model.pth').exists()
    assert 'not the best of the epochs that this run goes on from' in (tmp_path/'logs/log-longer/training.log').read_text()
    assert run.fit()['epoch'] == 2 and load_checkpoint(tmp_path/'checkpoints/longer/best_model.pth')['validator']['best_epoch'] == 2


def test_a_run_that_another_one_took_the_place_of_goes_on(tmp_path):
    "By the line that the other run's log gives: with its own weights and its own best, and nothing of it is lost."
    (tmp_path/'tiny.yaml').write_text(TINY)
    first = in_this_process(tmp_path, 'version=tiny', 'sched.epochs=1', 'data.val_samples=3')
    first.fit()
    folder = tmp_path/'checkpoints/tiny'
    last, best = (folder/'last.pth').read_bytes(), (folder/'best_model.pth').read_bytes()
    in_this_process(tmp_path, 'version=tiny', 'seed=7', 'sched.epochs=1', 'data.val_samples=3').fit()
    assert f'--resume {folder}/previous.pth' in (tmp_path/'logs/log-tiny/training.log').read_text() and (folder/'best_model.pth').read_bytes() != best
    other = (folder/'last.pth').read_bytes()
    again = in_this_process(tmp_path, 'version=tiny', 'sched.epochs=1', 'data.val_samples=3', resume=str(folder/'previous.pth'))
    assert again.fit()['mae_px'] == load_checkpoint(folder/'best_model.pth')['metrics']['mae_px']
    assert [(folder/name).read_bytes() for name in ('last.pth', 'previous.pth', 'best_model.pth', 'previous_2.pth')] == [last, last, best, other]


def test_a_mistake_leaves_the_folder_in_order(tmp_path):
    "The next run takes over from nobody."
    (tmp_path/'tiny.yaml').write_text(TINY)
    with pytest.raises(UserError): in_this_process(tmp_path, 'data.source=directory', 'data.root=nowhere')
    in_this_process(tmp_path)
    assert 'taken over from' not in (tmp_path/'logs/log-tiny/training.log').read_text()


def test_a_reader_that_goes_is_no_traceback(finished, tmp_path):
    "`… | head -1`"
    (tmp_path/'tiny.yaml').write_text(TINY)
    done = subprocess.run(f'{sys.executable} -m captcha_hrnet.train --config tiny.yaml --set sched.epochs=2 | head -1', shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert 'Logging error' not in done.stderr and load_checkpoint(tmp_path/'checkpoints/tiny/last.pth')['done']


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
    for name, epoch in (('last', 9), ('epoch_008', 9)): save_checkpoint(folder/f'{name}.pth', dict(model_state_dict={}, epoch=epoch, step=70))
    run = in_this_process(tmp_path)
    def killed(epoch): raise KeyboardInterrupt
    monkeypatch.setattr(run, '_epoch', killed)
    with pytest.raises(KeyboardInterrupt): run.fit()
    assert newest_checkpoint(folder).name == 'last.pth' and load_checkpoint(folder/'last.pth')['step'] == 0
    assert load_checkpoint(folder/'previous.pth')['epoch'] == 9 and 'a run of 70 steps was here' in (tmp_path/'logs/log-tiny/training.log').read_text()


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
    written = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() and p.name != '.lock'} - {'out0.txt', 'err0.txt'}
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


# pieces

def test_null_stands_for_what_json_does_not_know(tmp_path):
    assert plain(dict(a=[float('nan'), (float('inf'), 1)], b=dict(c=-float('inf'), d='x', e=None, f=True))) == dict(a=[None, [None, 1]], b=dict(c=None, d='x', e=None, f=True))
    file = MetricsFile(tmp_path/'metrics.jsonl')
    file.append(dict(epoch=0, val=dict(mae_px=float('nan'))))
    assert [strict_json(line) for line in (tmp_path/'metrics.jsonl').read_text().splitlines()] == [dict(epoch=0, val=dict(mae_px=None))]


def test_advice_survives_an_epoch_without_a_loss():
    assert advice([dict(train=dict(dropped=3), val=dict(hit_le_5px=0.))]*8) == []
