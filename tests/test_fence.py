"""No kernel touches memory beyond its buffers, at any width of vectors: forbidden pages stand around every one."""
import os, signal, subprocess, sys
import pytest
from conftest import ROOT
from msnlan.attention.definition import has_numba

pytestmark = [pytest.mark.skipif(not has_numba(), reason='needs numba'), pytest.mark.skipif(sys.platform != 'linux', reason='needs mprotect')]
KERNELS = 'backward_scores backward_values forward line_thresholds score_gradient score_walk statistics support_count value_gradient value_walk weigh_rows weight_gradient'


def run(*args, bits=None):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **({'MSNLAN_VECTOR_BITS': str(bits)} if bits else {})}
    return subprocess.run([sys.executable, ROOT/'tests/fence_cases.py', *args], env=env, capture_output=True, text=True, timeout=1800)


def test_at_this_machines_width():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.split(maxsplit=1)[1].strip() == KERNELS                # every kernel was called


@pytest.mark.slow
@pytest.mark.parametrize('side', [[], ['--before']], ids=['after', 'before'])
@pytest.mark.parametrize('bits', [128, 256, 512])
def test_at_every_width(bits, side):
    done = run(*side, '--count', '40', bits=bits)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.split() == [str(bits), *KERNELS.split()]


@pytest.mark.slow
def test_the_fence_finds_a_fault():
    "Gradients narrower than a vector: the fault that was found on an AVX-512 machine, planted again"
    done = run('--narrow', '--dtypes', 'float32', bits=512)
    assert done.returncode == -signal.SIGSEGV, (done.returncode, done.stderr[-2000:])


def test_width_must_be_one_that_there_is():
    done = run(bits=100)
    assert done.returncode == 1 and 'MSNLAN_VECTOR_BITS: expected 128, 256 or 512' in done.stderr
