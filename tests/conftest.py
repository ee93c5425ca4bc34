"""What several test files share."""
import os
import shutil

if not shutil.which('nvidia-smi'): os.environ.setdefault('TRITON_INTERPRET', '1')   # before anything imports Triton, which reads it once

import pytest
import torch
from hypothesis import settings

settings.register_profile('steady', deadline=None)   # a time limit would test how busy the machine is
settings.load_profile('steady')
settings.register_profile('long', max_examples=2000, deadline=None)   # pytest tests/test_fuzz.py --hypothesis-profile=long


@pytest.fixture(scope='session')
def start():
    "`start(folder, *arguments)` starts a training."
    from processes import forking
    with forking() as start: yield start


@pytest.fixture(scope='module')
def one_thread():
    "PyTorch on one thread: small networks are slower on more."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
