"""Trainings that are killed, stopped, starved and damaged for some minutes, and what was lost: `python tests/chaos.py --minutes 10 [--json F]`.

Each training is compared with one that nothing happened to: same weights, same average, same optimiser, same metrics, to the last bit."""
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from json import dumps
from pathlib import Path

import torch
from fastcore.script import call_parse

from captcha_hrnet.engine import CheckpointError, load_checkpoint
from processes import BARE, TINY, assert_same_run, forking, is_over, kill, until

KINDS = [('train.num_workers=0', 'train.amp=off'), ('train.num_workers=2', 'train.amp=off', 'train.accumulate=3'), ('train.num_workers=1', 'train.amp=bf16', 'data.cache=cache')]
SMALL = [*BARE[:3], 'checkpoints.save_interval=1', 'eval.early_stopping.enabled=false']   # every epoch's file, no pictures
SECONDS = 2.5   # a start, the imports done, and an epoch


class Bomb:
    def __reduce__(self): return os.mkdir, ('crater',)


class Chaos:
    "One folder in which a training is run again and again."
    def __init__(self, start, folder, kind, epochs, rng):
        self.start, self.folder, self.rng, self.tried, self.lost = start, folder, rng, Counter(), []
        self.arguments = ['--config', 'tiny.yaml', '--resume', 'auto', '--set', *SMALL, *kind, f'sched.epochs={epochs}']
        self.checkpoints = folder/'checkpoints/tiny'
        folder.mkdir(parents=True)
        (folder/'tiny.yaml').write_text(TINY)

    def go(self): return self.start(self.folder, *self.arguments)

    def whole(self):
        "The last checkpoint, which must be whole at any moment."
        last = self.checkpoints/'last.pth'
        if not last.exists(): return None
        try: return load_checkpoint(last)
        except CheckpointError as error: self.lost.append(str(error))

    def say(self, done, code, pattern):
        if done.code != code or not re.search(pattern, done.out + done.err) or 'Traceback' in done.err + done.out: self.lost.append(f'{pattern}: code {done.code}: {done.err[-500:]}')

    def killed(self):
        "SIGKILL: at a random moment, or while a checkpoint is written."
        process, moment = self.go(), self.rng.choice([None, self.rng.uniform(0, 2*SECONDS)])
        parts, last = kill(process, self.folder, moment), self.whole()
        if process.poll() != -signal.SIGKILL: return
        self.tried['kills'] += 1
        self.tried['kills while a checkpoint was written'] += bool(parts)
        self.tried['… that left a part of a file'] += bool(last and parts and min(parts) < (self.checkpoints/'last.pth').stat().st_size//2)
        self.orphans = process

    def stopped(self):
        "SIGTERM or SIGINT, sent twice: exit code 0 and the way to go on."
        process, number = self.go(), self.rng.choice([signal.SIGTERM, signal.SIGINT])
        until(lambda: self.checkpoints.exists() and 'goes on' in process.out.read_text() or (self.checkpoints/'last.pth').exists(), process)
        time.sleep(self.rng.uniform(0, 2*SECONDS))
        for _ in range(2): process.signal(number, missing_ok=True)
        done = process.wait()
        self.tried[number.name] += 1
        self.say(done, 0, 'go on with: --resume auto|best epoch|ended outside of the training')

    def starved(self):
        "A disk that is full from some moment on; the limit of a file's size stands for it."
        process = self.go()
        time.sleep(self.rng.uniform(.3, SECONDS))
        if process.poll() is None: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (self.rng.choice([100, 10**5, 10**6]), resource.RLIM_INFINITY))
        done, _ = process.wait(), self.whole()
        if done.code: self.say(done, 1, r'^(?s:.*)error: .*')
        self.tried['full disks'] += done.code == 1

    def damaged(self, how):
        "`last.pth` is cut, emptied or replaced by a program, while an older good file is there."
        last, older = self.checkpoints/'last.pth', [*self.checkpoints.glob('epoch_*.pth')]
        if not last.exists() or not older: return self.tried.update(missed=1)
        content = last.read_bytes()
        if how == 'a program in a pickle': torch.save(dict(model_state_dict={}, epoch=99, bomb=Bomb()), last)
        else: last.write_bytes(content[:len(content)*how//10])
        process, before = self.go(), last.stat().st_mtime_ns
        until(lambda: last.stat().st_mtime_ns > before, process)   # the run has put it in order
        process.signal(signal.SIGTERM, missing_ok=True)
        self.say(process.wait(), 0, 'last.pth: .*; trying an older one')
        if (self.folder/'crater').exists(): self.lost.append('a checkpoint was executed')
        self.tried['programs in a pickle' if how == 'a program in a pickle' else 'torn checkpoints'] += 1

    def refused(self):
        "A second run in the same folder."
        process = self.go()
        until(lambda: (self.folder/'logs/log-tiny/.lock').exists() and (self.folder/'logs/log-tiny/.lock').read_text() == f'process {process.pid} on {os.uname().nodename}', process)
        self.say(self.go().wait(), 1, f'process {process.pid} on .* trains in this folder')
        process.signal(signal.SIGTERM, missing_ok=True)
        process.wait()
        self.tried['second runs refused'] += 1

    def end(self, straight):
        "Let it finish, and compare."
        self.say(self.go().wait(), 0, 'best epoch')
        try: assert_same_run(straight.folder, self.folder)
        except AssertionError as error: self.lost.append(f'not the same run: {error}')
        if litter := [*self.folder.rglob('*.tmp')]: self.lost.append(f'left behind: {litter}')
        numbered = [*self.checkpoints.glob('epoch_*.pth')]
        if len(numbered) > 3: self.lost.append(f'not pruned: {numbered}')
        self.tried['trainings compared with undisturbed ones'] += 1


def small_disk(folder) -> bool:
    "A disk of 64 MB, where that is allowed."
    folder.mkdir(parents=True)
    return not subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', folder], capture_output=True).returncode


def read_only(folder):
    "For whoever opens a file by its path from now on."
    for options in (['--bind', folder, folder], ['-o', 'remount,bind,ro', folder]): subprocess.run(['mount', *options], check=True)


def real_disks(start, folder, tried, lost):
    "A checkpoint folder on a disk that is too small, and on one that turns read-only."
    (folder/'tiny.yaml').write_text(TINY)
    for name, change, pattern in (('disks that were really full', lambda disk: (disk/'ballast').write_bytes(bytes(shutil.disk_usage(disk).free - 2**19)), 'No space left'),
                                  ('disks that turned read-only', read_only, 'Read-only file system')):
        disk = folder/name.replace(' ', '_')
        if not small_disk(disk): tried[f'{name} (not allowed here)'] += 1; continue
        try:
            process = start(folder, '--config', 'tiny.yaml', '--resume', 'auto', '--set', *SMALL, 'sched.epochs=9', f'checkpoints.save_dir={disk}', f'version={disk.name}')
            until((disk/disk.name/'last.pth').exists, process)
            change(disk)
            done = process.wait()
            if done.code != 1 or len(done.err.splitlines()) != 1 or pattern not in done.err: lost.append(f'{name}: {done.err}')
            load_checkpoint(disk/disk.name/'last.pth')
            tried[name] += 1
        finally:
            while disk.is_mount(): subprocess.run(['umount', '-l', disk], check=True)


def endurance(start, folder, steps, tried, lost):
    "Memory and open files of one process and its workers over many steps, TensorBoard's files, old checkpoints."
    folder.mkdir()
    (folder/'tiny.yaml').write_text(TINY)
    epochs = -(-steps//50)   # of 400 samples, in batches of 4, two a step
    process, found = start(folder, '--config', 'tiny.yaml', '--set', *SMALL, f'sched.epochs={epochs}', 'data.train_samples=400', 'train.accumulate=2', 'train.batch_size=4'), []
    while process.poll() is None:
        time.sleep(.5)
        try:
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            memory = [int(Path(f'/proc/{pid}/statm').read_text().split()[1])*resource.getpagesize()/2**20 for pid in (process.pid, *children)]
            found.append((len(process.out.read_text().splitlines()), memory[0], sum(memory[1:]), len(os.listdir(f'/proc/{process.pid}/fd')), len(children)))
        except (FileNotFoundError, ProcessLookupError): break   # it has just ended
    done = process.wait()
    if done.code: return lost.append(f'endurance: {done.err[-500:]}')
    run = [row for row in found if row[0] > epochs//5]   # after the first fifth
    first, last = run[:len(run)//5], run[-len(run)//5:]
    middle = lambda rows, column: sorted(row[column] for row in rows)[len(rows)//2]
    report = {name: [round(middle(rows, column), 1) for rows in (first, last)] for name, column in (('memory, MB', 1), ("workers' memory, MB", 2), ('open files', 3), ('workers', 4))}
    events = [path.stat().st_size for path in (folder/'logs/tensorboard').rglob('*tfevents*')]
    report |= {'steps': load_checkpoint(folder/'checkpoints/tiny/last.pth')['step'], 'TensorBoard files': len(events), 'TensorBoard, bytes a step': round(sum(events)/steps),
               'numbered checkpoints': len([*(folder/'checkpoints/tiny').glob('epoch_*.pth')]), 'processes left': int(not is_over(process))}
    if report['memory, MB'][1] > 1.05*report['memory, MB'][0] or report['open files'][1] > report['open files'][0] or report['numbered checkpoints'] > 3 or report['processes left']: lost.append(f'endurance: {report}')
    tried['optimiser steps in one process'] += report['steps']
    return report


def disturbed(start, folder, kind, epochs, kills, rng):
    "One training with so many kills and everything else between them; it and an undisturbed one."
    straight, chaos = Chaos(start, folder/'straight', kind, epochs, rng), Chaos(start, folder/'chaos', kind, epochs, rng)
    straight.say(straight.go().wait(600), 0, 'best epoch')
    others = [chaos.stopped]*3 + [chaos.starved]*2 + [chaos.refused] + [lambda how=how: chaos.damaged(how) for how in (*range(10), 'a program in a pickle')]
    rng.shuffle(others)
    while chaos.tried['kills'] < kills:
        if (chaos.whole() or {}).get('done'): chaos.lost.append(f'the training ended after {chaos.tried["kills"]} kills: too few epochs'); break
        chaos.killed()
        if others and rng.random() < .4: others.pop()()
    for other in others:
        if not (chaos.whole() or {}).get('done'): other()
    chaos.end(straight)
    if hasattr(chaos, 'orphans'): until(lambda: is_over(chaos.orphans), type('', (), dict(poll=lambda: None, began=time.monotonic(), err=straight.folder/'tiny.yaml')), 60)
    return chaos


@call_parse
def main(
    minutes: float = 10,   # about how long; at least one training of 50 kills is run
    json: str = None,      # file for the counts
    kills: int = 50,       # of the first training; the others have a fifth
    steps: int = 2000,     # of the endurance run
    seed: int = 0,
):
    "Kill, stop, starve and damage trainings, and say what was lost."
    began, rng, tried, lost = time.monotonic(), random.Random(seed), Counter(), []
    folder = Path(tempfile.mkdtemp(prefix='chaos-'))
    with forking() as start:
        real_disks(start, folder, tried, lost)
        report, number = None, 0
        while not number or time.monotonic() < began + 60*minutes:
            chaos = disturbed(start, folder/str(number), KINDS[number % len(KINDS)], (2*kills if not number else kills)//2, kills if not number else kills//5, rng)
            tried += chaos.tried
            lost += [f'training {number}: {what}' for what in chaos.lost]
            shutil.rmtree(folder/str(number))
            print(f'{time.monotonic() - began:.0f} s: {number + 1} trainings, {tried["kills"]} kills, lost: {lost or "nothing"}', flush=True)
            if not report: report = endurance(start, folder/'endurance', steps, tried, lost)
            number += 1
    shutil.rmtree(folder, ignore_errors=True)
    result = dict(minutes=round((time.monotonic() - began)/60, 1), cores=os.cpu_count(), torch=torch.__version__.partition('+')[0], tried=dict(tried), endurance=report, lost=lost)
    if json: Path(json).write_text(dumps(result, indent=1, ensure_ascii=False) + '\n')
    for name, count in tried.items(): print(f'{count:6} {name}')
    print(f'lost: {lost or "nothing"}', report)
    sys.exit(bool(lost))
