"""What several test files share."""
import pytest
from hypothesis import settings

settings.register_profile('steady', deadline=None)   # a time limit would test how busy the machine is
settings.load_profile('steady')
settings.register_profile('long', max_examples=2000, deadline=None)   # pytest tests/test_fuzz.py --hypothesis-profile=long


@pytest.fixture(scope='session')
def start():
    "`start(folder, *arguments)` starts a training."
    from processes import forking
    with forking() as start: yield start
