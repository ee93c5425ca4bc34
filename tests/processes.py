"""Trainings in processes that tests start, signal and kill, and what is asked of them afterwards."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from captcha_hrnet.config import ConfigManager
from captcha_hrnet.engine import load_checkpoint
from captcha_hrnet.train import Run

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


@contextmanager
def forking():
    "`start(folder, *arguments)` starts a training within a moment."
    server, lock = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET), threading.Lock()
    def ask(**order):
        with lock:
            print(json.dumps(order), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())
    yield partial(Forked, ask)
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


def in_this_process(folder, *overrides, resume=None):
    places = [f'checkpoints.save_dir={folder}/checkpoints', f'logging.log_dir={folder}/logs', f'logging.tensorboard_dir={folder}/logs/tensorboard']
    manager = ConfigManager(folder/'tiny.yaml', ['train.num_workers=0', *BARE, *places, *overrides])
    return Run(manager, resume)


LASTING = 'model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'scaler_state_dict', 'epoch', 'step', 'validator', 'metrics', 'done'


def assert_same_run(one, other, version='tiny'):
    "Last checkpoint, best model and metrics of two folders, to the last bit."
    a, b = (load_checkpoint(folder/f'checkpoints/{version}/last.pth') for folder in (one, other))
    for key in LASTING: assert same(a[key], b[key]), key
    assert records(one, version) == records(other, version)
    assert same(*[load_checkpoint(folder/f'checkpoints/{version}/best_model.pth')['ema_state_dict'] for folder in (one, other)])


def kill(process, folder, moment=None):
    "SIGKILL to the training process alone, as out-of-memory killers do, after so many seconds or while a checkpoint is written; the sizes of what was half written."
    folder = folder/'checkpoints/tiny'
    writing = lambda: [name for name in os.listdir(folder) if name.endswith('.tmp')] if folder.exists() else []
    end = time.monotonic() + (60 if moment is None else moment)
    while process.poll() is None and time.monotonic() < end and (moment is not None or not writing()): time.sleep(.0005)
    if process.poll() is None: os.kill(process.pid, signal.SIGKILL)
    while process.poll() is None: time.sleep(.005)
    return [(folder/name).stat().st_size for name in writing()]


def is_over(process) -> bool:
    "Whether the whole group has ended, workers too."
    try: process.signal(0)
    except ProcessLookupError: return True
    return False
