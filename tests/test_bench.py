"""Benchmarks from the command line."""
import json, subprocess, sys

import pytest
import torch

from captcha_hrnet import bench as benchmarks
from captcha_hrnet.config import Config, UserError

def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "captcha_hrnet.bench", *arguments, "--rounds", "1", "--seconds", "0.05"], capture_output=True, text=True)

SMALL = ["--set", "data.input_height=64", "data.input_width=64", "train.batch_size=2", "train.amp=off", "hardware.threads=1", "synth.width=[128,160]"]

def test_each_kind_prints_one_json_object_with_machine_and_rates():
    for what, first in (("train", "as configured"), ("data", "generator, 0 workers")):
        done = bench(what, "--json", *SMALL)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["what"] == what and said["rates"][0]["variant"] == first and said["machine"]["torch"]
        assert all(rate["low"] > 0 and rate["ratio"] > 0 for rate in said["rates"]) and said["rates"][0]["ratio"] == 1

def test_mistakes_are_one_line():
    for arguments, status, said in ((["sing"], 2, "invalid choice"), (["synth", "--set", "synth.widht=3"], 1, "width")):
        done = bench(*arguments)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr


def test_a_machine_that_is_too_small_is_one_line(monkeypatch):
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(benchmarks, 'compare', full)
    with pytest.raises(UserError, match='smaller train.batch_size'): benchmarks.main('train', set=['hardware.device=cpu'])


def test_the_kernels_have_one_memory_format(monkeypatch):
    monkeypatch.setattr(benchmarks, '_training', lambda *_: None)   # needs a GPU
    config = Config(hardware=dict(device='cpu'))
    assert 'other memory format' in benchmarks.train_variants(config, .1)
    assert 'other memory format' not in benchmarks.train_variants(config.override('train.step=kernels'), .1)
