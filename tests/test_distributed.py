"""Two processes (gloo) train what one trains, with equal weights at every validation; two runs agree."""
import json, os, subprocess, sys
import numpy as np, pytest, torch
from conftest import ROOT
from test_checkpoints import assert_same_bits, small_run
from msnlan.training.trainer import launch, make_accelerator, make_config, train


def two_processes(settings, out, folder, *more):
    "Train as a user would on two processes"
    recipe = folder/'recipe.json'
    recipe.write_text(json.dumps(settings))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'msnlan.training',
                          recipe, out, '--cpu', *more], cwd=ROOT, capture_output=True, text=True, timeout=300,
                         env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out/'curves.json').read_text())


def fifty_steps(tmp_path, **changes):
    return small_run(tmp_path, **dict(dict(batch=16, steps=50, lr=1e-4, log_every=1, validate_every=10, checkpoint_every=25), **changes))


def test_one_process_and_two_have_one_curve(tmp_path):
    "Batch 16, and 2 x 8: within 1e-4 over 50 steps; equal weights on both ranks at every validation"
    settings = fifty_steps(tmp_path)
    two = two_processes(settings, tmp_path/'two', tmp_path)
    train(settings, tmp_path/'one', quiet=True, cpu=True)
    one = json.loads((tmp_path/'one/curves.json').read_text())
    a, b = [np.array(c['loss'])[:, 1] for c in (one, two)]
    print(f'largest relative difference of the losses: {np.abs(a/b - 1).max():.1e}')
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert [(d[0], len(d), d[1] == d[2]) for d in two['digests']] == [(s, 3, True) for s in (10, 20, 30, 40, 50)]
    np.testing.assert_allclose([v[1] for v in one['validation']], [v[1] for v in two['validation']], atol=0.02)
    assert json.loads((tmp_path/'two/summary.json').read_text())['processes'] == 2


def test_processes_that_do_not_find_each_other_stop(tmp_path, monkeypatch):
    "Two lone processes in one folder would spoil each other's checkpoints"
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    with pytest.raises(RuntimeError, match='2 processes were started, 1 found'):
        make_accelerator(make_config(fifty_steps(tmp_path)), tmp_path/'run', cpu=False)


@pytest.mark.slow
def test_two_runs_of_two_processes_agree(tmp_path):
    settings = fifty_steps(tmp_path, accumulate=2, ema=0.9)
    for out in ('a', 'b'): two_processes(settings, tmp_path/out, tmp_path)
    assert_same_bits(tmp_path/'a', tmp_path/'b')


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bits(tmp_path):
    settings = fifty_steps(tmp_path)
    two_processes(settings, tmp_path/'whole', tmp_path)
    two_processes(dict(settings, steps=20), tmp_path/'parts', tmp_path)
    two_processes(settings, tmp_path/'parts', tmp_path)
    a, b = [json.loads((tmp_path/f/'curves.json').read_text()) for f in ('whole', 'parts')]
    assert a['digests'] == b['digests'] and a['loss'] == b['loss']


@pytest.mark.slow
def test_a_notebook_starts_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1'); monkeypatch.setenv('CUDA_VISIBLE_DEVICES', ''); monkeypatch.chdir(ROOT)
    summary = launch(make_config(fifty_steps(tmp_path, steps=10)), tmp_path/'run', 2)
    assert summary['processes'] == 2 and summary['steps'] == 10


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path):
    "A job may come back on another number of machines"
    settings = fifty_steps(tmp_path)
    two_processes(dict(settings, steps=25), tmp_path/'run', tmp_path)
    train(settings, tmp_path/'run', quiet=True, cpu=True)
    train(settings, tmp_path/'one', quiet=True, cpu=True)
    a, b = [np.array(json.loads((tmp_path/f/'curves.json').read_text())['loss'])[:, 1] for f in ('run', 'one')]
    np.testing.assert_allclose(a, b, rtol=1e-4)
