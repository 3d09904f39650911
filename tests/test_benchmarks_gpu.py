"""One command on a GPU, without one: its whole path by the interpreter, without a network and without notebook tools; going on; what it says."""
import json, os, subprocess, sys
import pytest, torch
from conftest import ROOT, SHARED
from msnlan.attention.definition import has_triton
from msnlan.benchmarks import gpu

BLOCKED = '''
import socket, sys
for name in ('nbdev', 'fastcore', 'papermill', 'pytest', 'typer', 'pooch', 'anywidget', 'snakemake', 'jupyter_client', 'ipykernel'): sys.modules[name] = None
def refuse(*args, **kw): raise OSError('no network here')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
'''

@pytest.fixture()
def bare(tmp_path):
    "The environment of a machine that has neither network nor notebook tools"
    (tmp_path/'site').mkdir(); (tmp_path/'site/sitecustomize.py').write_text(BLOCKED)
    env = {**os.environ, 'PYTHONPATH': f'{tmp_path/"site"}{os.pathsep}{ROOT}', 'OMP_NUM_THREADS': '1'}
    env.pop('TRITON_INTERPRET', None)
    for module in ('papermill', 'socket; socket.create_connection(("example.org", 80))'):                # the blocker blocks
        assert subprocess.run([sys.executable, '-c', f'import {module}'], env=env, capture_output=True).returncode
    return env


def bench(env, *args):
    return subprocess.run([sys.executable, '-m', 'msnlan.benchmarks.gpu', *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not has_triton(), reason='needs Triton')
def test_the_whole_path_by_the_interpreter(bare, tmp_path):
    run = bench(bare, '--interpret', '-o', tmp_path)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    report = json.loads((tmp_path/'gpu-toy.json').read_text())
    assert [gpu.key(r) for r in report['rows']] == [gpu.key(t) for t in gpu.plan(toy=True)]
    assert not [r for r in report['rows'] if 'error' in r and r['part'] != 'golden' or r.get('failed')]
    if SHARED: assert [r['ok'] for r in report['rows'] if r['part'] == 'golden'] == [True]
    for row in report['rows']:
        if row['part'] == 'operator':
            assert set(row['ms']) == set(gpu.METHODS) and row['times_faster'] > 0
            assert row['difference'] < (3e-2 if row['kind'] == 'bf16' else 1e-5), row['name']
        if row['part'] == 'training': assert row['hours'] > 0
    text = (tmp_path/'gpu-toy.md').read_text()
    assert 'times mean nothing' in text and '## Not run' not in text and (tmp_path/'gpu-toy.png').is_file()
    assert not (tmp_path/'gpu-toy.now').exists()
    lost = report['rows'].pop(3)                                                               # goes on, and only there
    (tmp_path/'gpu-toy.json').write_text(json.dumps(report))
    again = bench(bare, '--interpret', '-o', tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines()[0].startswith(f"{lost['part']}: {lost['name']}")
    assert len(again.stdout.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason='here is a GPU')
def test_without_a_gpu_it_says_what_it_would_run(bare, tmp_path):
    run = bench(bare, '-o', tmp_path)
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1 and '--interpret' in run.stderr
    for words in ('p7_384 (6 ways)', 'csnln (7 ways)', 'golden'): assert words in run.stdout, words
    assert 'Not run: no GPU was found' in (tmp_path/'gpu.md').read_text() and not (tmp_path/'gpu.json').exists()


def test_rows_of_other_code_or_another_machine_are_measured_again(tmp_path, monkeypatch):
    here = gpu.open_report(tmp_path/'gpu.json', False)
    row = dict(part='operator', name='p3_96 forward bf16')
    write = lambda **kw: (tmp_path/'gpu.json').write_text(json.dumps({**here, 'rows': [row], **kw}))
    write(); assert gpu.open_report(tmp_path/'gpu.json', False)['rows'] == [row]
    write(machine=here['machine'] | dict(device='another')); assert gpu.open_report(tmp_path/'gpu.json', False)['rows'] == []
    write(source='0'); assert gpu.open_report(tmp_path/'gpu.json', False)['rows'] == []


def test_a_task_that_kills_its_worker_is_named_and_the_next_goes_on(tmp_path, monkeypatch):
    tasks = gpu.plan(['operator'])[:2]
    monkeypatch.setattr(gpu, 'plan', lambda *args: tasks)
    monkeypatch.setattr(gpu, 'device_of', lambda: 'cuda'); monkeypatch.setattr(gpu, 'measured_on', lambda device: dict(
        device='a GPU', torch='2', numba=None, python='3', date='today', threads=1, load=0.))
    def worker(path, parts, toy, until):
        report = gpu.open_report(path, toy)
        task = gpu.left(report, tasks)[0]
        if task is tasks[0]: path.with_suffix('.now').write_text(json.dumps(task)); return -11
        path.write_text(json.dumps(report | dict(rows=[*report['rows'], task | dict(ms=dict(ours=1.), runs=1)]))); return 0
    monkeypatch.setattr(gpu, 'worker', worker)
    with pytest.raises(ValueError, match='1 of 2 tasks failed, the first: operator: p7_96|1 of 2 tasks failed, the first: operator: p3_96'): gpu.benchmark(tmp_path)
    text = (tmp_path/'gpu.md').read_text()
    assert 'its process ended with status -11' in text and '| p3_96 | forward |' in text


@pytest.mark.parametrize('error,status', [(RuntimeError('CUDA error: an illegal memory access'), 3), (RuntimeError('a shape'), 0)])
def test_errors_become_rows(tmp_path, monkeypatch, error, status):
    def broken(*args, **kw): raise error
    monkeypatch.setattr(gpu, 'do_operator', broken)
    monkeypatch.setattr(gpu, 'plan', lambda *args: [dict(part='operator', name='x', case='p3_6')])
    assert gpu.work(tmp_path/'gpu.json', ['operator']) == status
    row, = json.loads((tmp_path/'gpu.json').read_text())['rows']
    assert row['ok'] is False and str(error) in row['error']


def test_memory_that_is_too_small_is_a_cell(monkeypatch):
    def full(*args, **kw): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setitem(gpu.METHODS, 'strips', full)
    monkeypatch.setitem(gpu.METHODS, 'ours', gpu.METHODS['definition'])
    row = gpu.do_operator(dict(case='p3_6', pass_='forward', kind='float32'), 'cpu', rounds=1)
    assert row['failed'] == {'strips': 'out of memory'} and row['difference'] == 0
    monkeypatch.setattr(gpu, 'memory_of', lambda device: 1000)
    row = gpu.do_operator(dict(case='p3_6', pass_='forward', kind='float32'), 'cpu', rounds=1)
    assert row['failed']['definition'] == 'map too large' and 'times_faster' not in row
