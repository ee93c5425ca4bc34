"""Training that is stopped, killed or starved at any moment and goes on as if nothing had happened; several processes that are one; long runs.

`pytest tests/test_resume.py -k cuda` checks the same on GPUs."""
import functools
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from captcha_hrnet import synth
from captcha_hrnet import train as module
from captcha_hrnet.config import Config, UserError, load_config
from captcha_hrnet.data import DataPipeline
from captcha_hrnet.engine import Meter, TrainingEngine, load_checkpoint, newest_checkpoint, save_checkpoint, seed_everything
from captcha_hrnet.model import create_lite_hrnet_18_fpn, load_model
from captcha_hrnet.validator import Validator
from processes import BARE, LASTING, QUIET, TINY, Program, assert_same_run, in_this_process, records, same, until
from toys import Loader, Toy, batch_of

torch.set_num_threads(1)


# stopped at any moment

class Killed(BaseException):
    "What nobody catches."


class Incident:
    "Something that happens at the so-manieth moment of a run: a forward pass, a validated batch, a part of a write."
    def __init__(self, kind, moment): self.kind, self.left = kind, moment

    def tick(self, writing=False):
        self.left -= 1
        if self.left == 0 or self.left < 0 and writing and self.kind == 'full': self.happen(writing)

    def happen(self, writing):
        if self.kind == 'asked': os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == 'killed': raise Killed
        elif writing: raise OSError(28, 'No space left on device')

    def into(self, run, patch):
        "Make the run meet it."
        for owner, name in ((run.engine, '_batch'), (run.validator, '_batch')):
            def with_tick(*args, old=getattr(owner, name), **kwargs):
                self.tick()
                return old(*args, **kwargs)
            setattr(owner, name, with_tick)
        for name in ('fsync', 'replace'):
            def with_tick(*args, old=getattr(os, name)):
                self.tick(writing=True)
                return old(*args)
            patch.setattr(os, name, with_tick)


def toy_run(folder, overrides, resume=None, incident=None):
    "One process of a run with a small network; whether it came to its end, or the line that says why not."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'create_lite_hrnet_18_fpn', lambda config: Toy(norm=True))
        (folder/'tiny.yaml').write_text(TINY)
        run = in_this_process(folder, *overrides, 'checkpoints.save_interval=1', resume=resume)
        if incident: incident.into(run, patch)
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM)}
        patch.setattr(sys, 'unraisablehook', sys.unraisablehook)
        signal.signal(signal.SIGTERM, module.end_at_once)   # as the command does; but this process goes on after its end
        try: run.fit()
        except (Killed, SystemExit): return False
        except UserError as error: return str(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items(): signal.signal(number, handler)
            run.visualizer.close()
            for lock in run.locks: lock.close()
        return run.done


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    (folder/'tiny.yaml').write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        synth.main(out='data', train=20, val=7, config='tiny.yaml')
    return folder


SOURCES = {'synthetic': [], 'packed': ['data.source=directory', 'data.root={0}/data', 'data.cache={0}/cache'],
           'augmented': ['augment.flip=0.5', 'augment.scale=[0.7,1.0]', 'augment.color=0.5', 'augment.views=2']}


@functools.cache
def straight(data, amp, accumulate, source):
    "A run to which nothing happened."
    folder = Path(tempfile.mkdtemp(dir=data))
    overrides = [f'train.amp={amp}', f'train.accumulate={accumulate}', *[text.format(data) for text in SOURCES[source]]]
    assert toy_run(folder, overrides) is True
    return folder, overrides


@given(amp=st.sampled_from(['off', 'bf16']), accumulate=st.integers(1, 3), source=st.sampled_from([*SOURCES]), workers=st.sampled_from([0, 0, 2]),
       incidents=st.lists(st.tuples(st.sampled_from(['asked', 'killed', 'full']), st.integers(1, 45)), min_size=1, max_size=3), damage=st.none() | st.integers(0, 9))
@settings(max_examples=8 if settings.default.max_examples <= 100 else 100, deadline=None, phases=[Phase.reuse, Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_happens_the_run_is_the_same(data, amp, accumulate, source, workers, incidents, damage):
    "Between batches, in a window, in validation, between epochs, in a write; with a last.pth that is damaged afterwards where an older file is whole."
    reference, overrides = straight(data, amp, accumulate, source)
    folder = Path(tempfile.mkdtemp(dir=data))
    overrides = [*overrides, f'train.num_workers={workers}']
    for kind, moment in incidents:
        end = toy_run(folder, overrides, 'auto', Incident(kind, moment))
        assert end in (True, False) or re.fullmatch(r'.*cannot be written \(No space left on device\).*', end), end
        assert not newest_checkpoint(folder/'checkpoints/tiny') or (folder/'checkpoints/tiny/last.pth') == newest_checkpoint(folder/'checkpoints/tiny')   # never torn
    last = folder/'checkpoints/tiny/last.pth'
    if damage is not None and any(last.parent.glob('epoch_*.pth')): last.write_bytes(last.read_bytes()[:damage*last.stat().st_size//10])
    assert toy_run(folder, overrides, 'auto') is True
    assert_same_run(reference, folder)


def test_a_damaged_last_checkpoint_is_put_in_order_before_the_first_step(data, tmp_path):
    "Gone on with from an older file, as last.pth was damaged; then killed in the first batch."
    reference, overrides = straight(data, 'off', 1, 'synthetic')
    folder = tmp_path/'checkpoints/tiny'
    folder.mkdir(parents=True)
    (folder/'epoch_000.pth').write_bytes((reference/'checkpoints/tiny/epoch_000.pth').read_bytes())
    (folder/'last.pth').touch()
    assert toy_run(tmp_path, overrides, 'auto', Incident('killed', 3)) is False   # after the two moments of a write
    assert load_checkpoint(folder/'last.pth')['epoch'] == 1 and newest_checkpoint(folder).name == 'last.pth'


def test_states_that_are_none_of_ours_are_refused_in_a_line(data, tmp_path):
    "Whatever of what a run reads is missing or of another type."
    reference, overrides = straight(data, 'off', 1, 'synthetic')
    state = load_checkpoint(reference/'checkpoints/tiny/last.pth')
    for key in ('validator', 'done', 'config', 'metrics', 'epoch', 'model_state_dict'):
        for spoilt in ({k: v for k, v in state.items() if k != key}, state | {key: 'wrong'}, state | {key: [1]}):
            save_checkpoint(tmp_path/'spoilt.pth', spoilt)
            with pytest.raises(UserError, match='spoilt.pth: ') as error: toy_run(tmp_path, overrides, str(tmp_path/'spoilt.pth'))
            assert '\n' not in str(error.value)


def test_a_damaged_best_model_is_found_at_once(data, tmp_path, capsys):
    reference, overrides = straight(data, 'off', 1, 'synthetic')
    assert toy_run(tmp_path, overrides, incident=Incident('asked', 18)) is False
    best = tmp_path/'checkpoints/tiny/best_model.pth'
    best.write_bytes(best.read_bytes()[:100])
    assert toy_run(tmp_path, overrides, 'auto') is True and load_checkpoint(best)['metrics']['epoch'] == 1
    assert 'the next best epoch takes its place' in capsys.readouterr().out


def test_changed_settings_are_said(data, tmp_path, capsys):
    "Stopped after 3 batches of 4, gone on with in batches of 2."
    _, overrides = straight(data, 'off', 1, 'synthetic')
    assert toy_run(tmp_path, overrides, incident=Incident('asked', 7)) is False   # four moments were the first writes'
    assert toy_run(tmp_path, [*overrides, 'train.batch_size=2'], 'auto') is True
    out = capsys.readouterr().out
    assert 'changed since the checkpoint: train.batch_size 4 → 2' in out
    assert 'batches of 2 samples were ones of 4: epoch 0 goes on at sample 12, 0 are seen again' in out


def test_a_history_that_is_no_json_is_a_line(data, tmp_path):
    reference, overrides = straight(data, 'off', 1, 'synthetic')
    (tmp_path/'logs/log-tiny').mkdir(parents=True)
    (tmp_path/'logs/log-tiny/metrics.jsonl').write_text('{"epoch": 0}\n{"ep')
    with pytest.raises(UserError, match='metrics.jsonl: not JSON lines .*move it away'): toy_run(tmp_path, overrides)


# several processes

def frozen(model, dataset):
    "BatchNorm with the fixed statistics of some samples: statistics are the one thing that depends on how a batch is cut."
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms: norm.momentum = None   # the mean of all batches
    with torch.no_grad():
        model(torch.stack([dataset[i]['image'] for i in range(16)]))
    for norm in norms: norm.train = lambda mode=True, norm=norm: torch.nn.Module.train(norm, False)
    return model


def curve(config, rank, world, small, steps, device='cpu'):
    "The losses of so many steps, the final weights, and how often gradients were exchanged."
    seed_everything(0)
    pipeline = DataPipeline(config, rank, world).setup()
    network = Toy(norm=False) if small else frozen(create_lite_hrnet_18_fpn(config.model), pipeline.val_loader.dataset)
    engine = TrainingEngine(network, config, device)
    losses, exchanges = [], []
    def count(_, bucket):
        exchanges.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future().then(lambda done: done.value()[0])
    if dist.is_initialized(): engine.parallel.register_comm_hook(None, count)
    def note(step, means):
        losses.append(means['loss'])
        engine.meter = Meter()   # of each step, not of all
        engine.stop_requested = step == steps
    engine.on_log = note
    engine.train_epoch(pipeline.train_loader, 0)
    return dict(losses=losses, weights=engine.model.state_dict(), exchanges=exchanges)


def same_batches(device='cpu', lr=1e-3, **train):
    "The configuration of one process; two have half the batch each."
    return lambda world: load_config(Path(TINY.split('base: ')[1].split('\n')[0])).override(
        'data.train_samples=240', 'model.name=naive_lite_hrnet_18', 'model.neck_channels=16', 'model.head_channels=16', f'hardware.device={device}', 'train.log_every=1',
        'train.num_workers=0', f'optimizer.lr={lr}', 'optimizer.eps=1e-3', f'train.batch_size={4//world}', *(f'train.{key}={value}' for key, value in train.items()))


CURVES = {   # configuration, small network, steps. Rounding grows threefold a step in the real network, so that it is compared over few
    'every batch': (same_batches(), True, 20), 'windows of three': (same_batches(accumulate=3), True, 20), 'the real network': (same_batches(lr=1e-4, accumulate=2), False, 3)}


def in_parallel(rank, folder, world=2):
    "What two processes find: curves, and validations of sets with every remainder."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    found = {name: curve(config(world), rank, world, *how) for name, (config, *how) in CURVES.items()}
    found['validations'] = validations(rank, world)
    found['first'] = module.from_first(f'of {rank}')
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def validations(rank=0, world=1):
    "Metrics of sets of 1 to 9 samples, in batches of 4."
    torch.manual_seed(0)
    model, found = Toy(norm=True), {}
    for count in range(1, 10):
        config = same_batches()(1).override(f'data.val_samples={count}', 'eval.batch_size=4', 'eval.bootstrap=10')
        found[count] = Validator(config, 'cpu').validate(model, DataPipeline(config, rank, world).setup().val_loader)
    return found


def two(_, folder):
    import torch._dynamo   # noqa: F401 seconds that both would spend
    torch.multiprocessing.start_processes(in_parallel, (folder,), 2, start_method='fork')


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pair')
    torch.multiprocessing.start_processes(two, (str(folder),), 1, start_method='spawn')   # what has gone backward must not fork
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in range(2)]


def assert_same_curve(one, pair, steps):
    assert len(one['losses']) == steps and one['losses'][-1] != one['losses'][0]
    assert pair['losses'] == pytest.approx(one['losses'], rel=2e-6)
    for name, value in one['weights'].items(): torch.testing.assert_close(pair['weights'][name], value, atol=1e-5, rtol=1e-4)
    assert pair['exchanges'].count(0) == steps   # of the first bucket of gradients: once a window


@pytest.mark.parametrize('kind', CURVES)
def test_two_processes_are_one(pair, kind):
    "At the same global batch; BatchNorm at fixed statistics, as these differ by definition."
    config, small, steps = CURVES[kind]
    first, second = (found[kind] for found in pair)
    assert_same_curve(curve(config(1), 0, 1, small, steps), first, steps)
    assert first['losses'] == second['losses'] and same(first['weights'], second['weights'])


def test_every_sample_is_validated_once_whatever_the_remainder(pair):
    alone = validations()
    for count, metrics in alone.items():
        for found in pair:
            assert metrics['n'] == found['validations'][count]['n'] == count
            for name in ('mae_px', 'rmse_px', 'loss', 'hit_le_5px', 'slide_mae'): assert found['validations'][count][name] == pytest.approx(metrics[name], rel=1e-6)
    assert [found['first'] for found in pair] == ['of 0', 'of 0']


def test_a_killed_process_is_restarted_with_the_others(tmp_path):
    "By `torchrun --max-restarts 1`; without a restart the line that the other says is the end. One process alone goes on with what two have done."
    (tmp_path/'tiny.yaml').write_text(TINY)
    out, last, settings = lambda: process.out.read_text(), tmp_path/'checkpoints/tiny/last.pth', [*BARE, 'eval.early_stopping.enabled=false']
    process = Program(tmp_path, 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1', '-m', 'captcha_hrnet.train',
                      '--config', 'tiny.yaml', '--resume', 'auto', '--set', *settings, 'sched.epochs=4')
    until(lambda: 'epoch=1 ' in out(), process)
    writer = int((tmp_path/'checkpoints/tiny/.lock').read_text().split()[1])
    os.kill(next(pid for pid in map(int, Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()) if pid != writer), signal.SIGKILL)
    done = process.wait()
    assert done.code == 0 and 'Traceback' not in done.err, done.err
    assert done.err.count('error: another process of this run is gone; the last checkpoint is whole, go on with: --resume auto') == 1
    found, text = records(tmp_path), (tmp_path/'logs/log-tiny/training.log').read_text()
    assert [record['epoch'] for record in found] == [0, 1, 2, 3] and all(record['val']['n'] == 7 for record in found)   # 4 and 3 samples
    assert text.count('resumed from checkpoints/tiny/last.pth: epoch') == 1 and [text.count(f'epoch={epoch} ') for epoch in (0, 3)] == [1, 1]
    assert len({path.name.split('.')[-2] for path in (tmp_path/'logs/tensorboard').rglob('*tfevents*')}) == 2   # of each start one process writes
    assert {path.name for path in last.parent.iterdir()} == {'last.pth', 'best_model.pth', '.lock'}
    assert load_checkpoint(last)['step'] == 4   # 20 samples, 2 processes of 4, 2 batches a step: one an epoch
    best, config = last.with_name('best_model.pth'), load_config(tmp_path/'tiny.yaml', ['train.num_workers=0'])
    again = Validator(config, 'cpu').validate(load_model(best), DataPipeline(config).setup().val_loader)
    assert again['mae_px'] == pytest.approx(load_checkpoint(best)['metrics']['mae_px'], rel=1e-6)
    alone = in_this_process(tmp_path, *settings, 'sched.epochs=5', resume='auto')
    assert (alone.engine.epoch, alone.done) == (4, False) and alone.fit()['n'] == 7
    assert [record['epoch'] for record in records(tmp_path)] == [0, 1, 2, 3, 4] and load_checkpoint(last)['step'] == 12 + 3   # three steps an epoch now


# long runs

def memory_mb(): return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()/2**20


def test_two_thousand_steps_leave_memory_and_files_as_they_were(tmp_path):
    "Steps with losses that are not finite among them, logs and averages; the same loader's workers all the way."
    config = Config(train=dict(amp='off', num_workers=0, log_every=10, max_nonfinite_steps=3), optimizer=dict(lr=1e-4), logging=dict(tensorboard_dir=str(tmp_path)))
    engine, board = TrainingEngine(Toy(norm=True), config, 'cpu'), module.Visualizer(config)
    engine.on_log = lambda step, means: board.log_scalars('step', means, step)
    batches, found = [batch_of(2, seed) for seed in range(20)], []
    batches[7] = batches[7] | dict(gap_coords=batches[7]['gap_coords']*math.nan)
    for epoch in range(107):
        engine.train_epoch(Loader(batches), epoch)
        found.append((memory_mb(), len(os.listdir('/proc/self/fd'))))
    board.close()
    assert engine.step == 107*19 > 2000 and engine.dropped == 107
    stretches = [after[0] - before[0] for before, after in zip(found[20::20], found[40::20])]   # an allocator takes a step now and then, a leak grows in each
    assert min(stretches) < 1 and found[-1][1] == found[20][1], found[::20]
    files = [path.stat().st_size for path in tmp_path.rglob('*tfevents*')]
    assert len(files) == 1 and files[0] < 300*engine.step


# on GPUs

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
EXACT = ['hardware.device=cuda', 'hardware.deterministic=true', 'model.name=lite_hrnet_18', 'data.input_width=512', 'data.input_height=256', 'data.train_samples=96',
         'train.batch_size=8', 'train.num_workers=4', 'train.log_every=1']


@cuda
@pytest.mark.parametrize('amp', ['off', 'bf16', 'fp16'])
def test_cuda_resume_is_bit_exact(amp, tmp_path, monkeypatch):
    "The real network at its real size, in the deterministic setting, stopped in the second epoch."
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    (tmp_path/'tiny.yaml').write_text(TINY)
    run = lambda version, resume=None: in_this_process(tmp_path, *EXACT, f'train.amp={amp}', f'version={version}', resume=resume)
    run('straight').fit()
    broken = run('broken')
    broken.engine.on_log = lambda step, _: setattr(broken.engine, 'stop_requested', broken.engine.epoch == 1 and broken.engine.epoch_step >= 6)
    assert broken.fit() == {} and run('broken', 'auto').fit()
    states = [load_checkpoint(tmp_path/f'checkpoints/{version}/last.pth') for version in ('straight', 'broken')]
    for key in LASTING: assert same(states[0][key], states[1][key]), key
    assert same(*[[record['val'] for record in records(tmp_path, version)] for version in ('straight', 'broken')])


GPU_PAIR = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_resume import curve, same_batches
dist.init_process_group('cpu:gloo,cuda:nccl')
rank = dist.get_rank()
torch.cuda.set_device(rank)
torch.backends.cudnn.allow_tf32 = False   # it rounds by ten bits, and other batch sizes round otherwise
found = [curve(same_batches(f'cuda:{rank}', lr=1e-4, amp='off')(2), rank, 2, small, steps, f'cuda:{rank}') for small, steps in ((True, 20), (False, 3))]
if rank == 0: torch.save(found, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_cuda_two_gpus_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    (tmp_path/'pair.py').write_text(GPU_PAIR)
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'pair.py', str(Path(__file__).parent), 'found.pt'], cwd=tmp_path, env=QUIET, check=True)
    for found, (small, steps) in zip(torch.load(tmp_path/'found.pt', weights_only=False), ((True, 20), (False, 3))):
        assert_same_curve(curve(same_batches('cuda:0', lr=1e-4, amp='off')(1), 0, 1, small, steps, 'cuda:0'), found, steps)
