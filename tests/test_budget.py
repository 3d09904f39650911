"""What a run will take, said before it runs; batches that are on their way while a step computes."""
import json
from contextlib import nullcontext
from types import SimpleNamespace
import pytest, torch
from test_cli import is_one_line_error, msnlan, project                                        # noqa: F401 (a fixture)
from msnlan.benchmarks.training import step_memory
from msnlan.training import budget
from msnlan.training.feed import ahead
from msnlan.training.recipes import TrainConfig, load_recipe

SMALL = dict(n_feats=16, n_resgroups=2, n_resblocks=1)


def test_dry_run(project):                                                                      # noqa: F811
    given = ['-p', 'steps=1000', '-p', 'patch=12', '-p', 'batch=2', '-p', f'model_config={json.dumps(SMALL)}']
    run = msnlan('train', '--dry-run', *given, '-o', 'runs/x', cwd=project)
    assert run.returncode == 0, run.stderr
    assert [line.split(':')[0] for line in run.stdout.splitlines()] == ['msnlan', 'memory', 'time']
    assert not (project/'runs').exists()
    is_one_line_error(msnlan('train', '--dry-run', '-p', 'stepz=1', cwd=project), 'stepz')


def test_rate_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, 'package_folder', lambda: tmp_path/'msnlan')
    cfg = load_recipe('msnlan', dict(precision='bf16'))
    assert budget.measured_rate(cfg, 'msnlan', 'a GPU') is None
    row = dict(part='training', recipe='msnlan', kind='bf16', method='ours', patch=48, patches_per_second=100.)
    rows = [row, row | dict(patches_per_second=200.), row | dict(kind='TF32', patches_per_second=300.), row | dict(method='reference', patches_per_second=400.)]
    (tmp_path/'reports/benchmarks').mkdir(parents=True)
    (tmp_path/'reports/benchmarks/gpu.json').write_text(json.dumps(dict(machine=dict(device='a GPU'), rows=rows)))
    assert budget.measured_rate(cfg, 'msnlan', 'a GPU') == 200 and budget.measured_rate(cfg, 'msnlan', 'another') is None
    assert budget.measured_rate(cfg, 'csnln', 'a GPU') is None


def test_gpu_memory_holds_what_the_attention_takes_inside():
    one = TrainConfig(model='msnlan', model_config=SMALL, patch=48, batch=1)
    step = budget.step_budget(one, 'cuda').peak
    inside = budget.planned_bytes((1, 8, 48, 48), [(1, 8, 52, 52)], [(1, 16, 52, 52)], 7)
    assert inside < step < 3*inside                                                            # maps of scores are most of it


class Moved(list):
    "Stands for a tensor: notes what is done to it"
    def to(self, device, non_blocking=False): self.append(('to', str(device), non_blocking)); return self
    def record_stream(self, stream): self.append('record')


def test_next_batch_is_on_its_way(monkeypatch):
    started, waited = [], []
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: 'side')
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: SimpleNamespace(wait_stream=waited.append))
    def source():
        for n in range(3): started.append(n); yield Moved(), Moved()
    got = ahead(source(), torch.device('cuda', 0))
    first = next(got)
    assert started == [0, 1] and waited == ['side']                          # the second is under way before the first is used
    assert first == [[('to', 'cuda:0', True), 'record']]*2
    assert len(list(got)) == 2 and started == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='here is a GPU')
@pytest.mark.parametrize('model,patch,batch,config', [
    ('msnlan', 48, 4, SMALL), ('csnln', 32, 2, dict(n_feats=16, depth=2)), ('panet', 40, 2, dict(n_feats=16, n_resblocks=4, pa_reduction=2)),
    ('hspan', 40, 4, dict(n_feats=32, n_resgroups=2, n_resblocks=2)), ('mlrn', 40, 4, dict(n_feats=16, n_modules=2))])
def test_predicted_memory_is_what_a_step_takes(model, patch, batch, config, monkeypatch):
    "Resident memory of two training steps in a process of its own, beyond what Python and its libraries take: within a quarter"
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    for name in ('MMAP', 'TRIM'): monkeypatch.setenv(f'MALLOC_{name}_THRESHOLD_', '65536')     # what is freed goes back, so that resident is alive
    predicted = budget.step_budget(TrainConfig(model=model, model_config=config, patch=patch, batch=batch), 'cpu').peak/1e6
    measured = step_memory(dict(model=model, config=dict(config, scale=2), patch=patch, batch=batch), 'auto')
    print(f'{model}: predicted {predicted:.0f} MB, measured {measured:.0f} MB')
    assert .75 < predicted/measured < 1.25, (predicted, measured)
