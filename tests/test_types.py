"""Type hints agree with each other and with the code, as far as mypy sees; `mypy.ini` says what it is spared."""
import re, subprocess, sys
import pytest
from conftest import ROOT

pytest.importorskip('mypy')
SPARED = re.compile('|'.join([
    'Too many arguments for "',            # f(*pair, more): mypy takes a tuple of unknown length for all that is left
    '"object"', r'type "\*\*dict\[', r'type "\*Generator\[',   # values of several types in one dict, and such a dict as keywords
    'base class "Network" defined',        # a system's own tuples of scales, tasks, switches
    '"Weights" has no attribute',          # which the classes that inherit from it have
    'Argument 1 to "load_dataset"']))      # a set in `pathlib.Path`: it is taken, its hint says less


def test_package(tmp_path):
    run = subprocess.run([sys.executable, '-m', 'mypy', '--config-file', ROOT/'tests/mypy.ini', '--cache-dir', tmp_path, '--no-error-summary'],
                         cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode in (0, 1), run.stdout[-2000:] + run.stderr[-2000:]
    found = [l for l in run.stdout.splitlines() if ': error:' in l and not SPARED.search(l)]
    assert not found, '\n'.join(found)


def test_it_finds_a_fault(tmp_path):
    "With the same settings: a wrong type, a wrong keyword, a name that is not there"
    (tmp_path/'faulty.py').write_text('''
from msnlan.images import imresize
from msnlan.models.zoo import list_models
def f(n:int)->str: return n
imresize(scal=2)
list_models().nothing
''')
    run = subprocess.run([sys.executable, '-m', 'mypy', '--config-file', ROOT/'tests/mypy.ini', '--cache-dir', tmp_path/'cache', tmp_path/'faulty.py'],
                         cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 1 and run.stdout.count('faulty.py') >= 3, run.stdout
