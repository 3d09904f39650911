"""Every notebook that exports a module runs from top to bottom, in a process of its own and within a time limit."""
import os, signal, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

LIMIT = 240   # seconds a notebook
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                   if 'experiments' not in p.parts and not any(q.startswith(('.', '_')) for q in p.relative_to(ROOT).parts))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_notebook_runs(path):
    command = [Path(sys.executable).parent/'nbdev_test', '--path', path, '--n_workers', '0', '--do_print']
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           start_new_session=True, env=dict(os.environ, MPLBACKEND='agg'))
    try: out, _ = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f'{path.name} did not end within {LIMIT} s')
    assert run.returncode == 0 and 'Success' in out, out[-3000:]
