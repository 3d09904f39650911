"""What the tests share: the place of the knowledge pack beside the project, and skipping where it is absent."""
import os
from pathlib import Path
import pytest

os.environ.setdefault('MSNLAN_OFFLINE', '1')   # a missing set is an error here, not a download
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')   # as `import msnlan` sets it; here before any import of torch
if 'PYTEST_XDIST_WORKER' in os.environ:        # several workers share the cores
    for name in ('OMP_NUM_THREADS', 'NUMBA_NUM_THREADS'): os.environ.setdefault(name, '1')

ROOT = Path(__file__).resolve().parents[1]
SHARED = next((p for p in [ROOT.parent/'shared'] if (p/'golden').is_dir() and (p/'data').is_dir()), None)
ABSENT = 'needs ../shared (golden numbers and pictures), which is not beside the project'


@pytest.fixture(scope='session')
def shared():
    "Folder `../shared`; the test is skipped where it is absent"
    if SHARED is None: pytest.skip(ABSENT)
    return SHARED


@pytest.fixture(scope='session')
def golden(shared):
    "Folder with the numbers made by the authors' programs"
    return shared/'golden'


@pytest.fixture(scope='session')
def data_root(shared):
    "Folder with the benchmark pictures"
    return shared/'data'


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='also run the tests marked slow')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than a few seconds; run by `make test-all`')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--all'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow; run by `make test-all`'))
