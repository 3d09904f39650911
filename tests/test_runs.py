"""What makes a job run again, and what does not; which GPU a job gets; what is refused."""
import ast, json, os, shutil, subprocess, sys
from dataclasses import fields
from pathlib import Path
import numpy as np, pytest
from conftest import ROOT
from msnlan.reproduce.fingerprints import closure, fingerprints, imports, notebook_source
from msnlan.images import imwrite
from msnlan.reproduce.presets import Job, PresetError, load_preset
from msnlan.training.recipes import TrainConfig, load_recipe
from msnlan.training.trainer import Trainer, fit


@pytest.fixture()
def package(tmp_path):
    "A copy of the package to edit"
    shutil.copytree(ROOT/'msnlan', tmp_path/'msnlan', ignore=shutil.ignore_patterns('__pycache__', 'weights', '*.nb?'))
    return tmp_path/'msnlan'


def reached(notebook, package): return closure(imports(ast.parse(notebook_source(ROOT/f'nbs/experiments/{notebook}.ipynb'))), package)
def edit(path, old, new):
    text = path.read_text()
    assert old in text, f'{path.name} has no {old!r}'
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def test_a_comment_or_docstring_changes_nothing(package):
    before = reached('evaluate', package)
    edit(package/'images.py', 'def imread(', '# read it\n\ndef imread(')
    edit(package/'metrics.py', '"""', '"""Other words. ')
    assert reached('evaluate', package) == before


def test_a_module_counts_where_it_is_reached(package):
    before = {n: reached(n, package) for n in ('train', 'evaluate', 'paper_tables', 'attention_maps')}
    assert 'msnlan.metrics' in before['evaluate'] and 'msnlan.images' in before['train']
    edit(package/'training/trainer.py', 'import', 'EXTRA = 1\nimport')
    assert reached('train', package) != before['train'] and reached('evaluate', package) == before['evaluate']
    edit(package/'correlation/maps.py', 'import', 'EXTRA = 1\nimport')
    assert reached('attention_maps', package) != before['attention_maps'] and reached('paper_tables', package) == before['paper_tables']
    edit(package/'images.py', 'import', 'EXTRA = 1\nimport')                      # everybody reads pictures
    assert all(reached(n, package) != before[n] for n in before)


def test_rooms_that_no_notebook_reaches():
    for n in ('train', 'evaluate', 'paper_tables', 'attention_maps'):
        found = closure(imports(ast.parse(notebook_source(ROOT/f'nbs/experiments/{n}.ipynb'))))
        assert not {'msnlan.cli', 'msnlan.reproduce.report', 'msnlan.reproduce.plan', 'msnlan.reproduce.jobs', 'msnlan.reproduce.presets', 'msnlan.reproduce.fingerprints', 'msnlan.reproduce.provenance',
                    'msnlan.reproduce.trail'} & set(found), n


@pytest.fixture()
def project(tmp_path, monkeypatch):
    "A project with notebooks to edit and a data set of two pictures"
    shutil.copytree(ROOT/'nbs/experiments', tmp_path/'nbs/experiments', ignore=shutil.ignore_patterns('.snakemake', '__pycache__'))
    shutil.copyfile(ROOT/'settings.ini', tmp_path/'settings.ini')
    for name in 'ab': imwrite(tmp_path/f'data/Mine/HR/{name}.png', np.full((32, 32, 3), ord(name), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MSNLAN_DATA', str(tmp_path/'data'))
    return tmp_path


def jobs(**parameters):
    return [Job('a', 'train', dict(data=['Mine'], validation=[], steps=3) | parameters), Job('b', 'train', dict(data=['skimage-train'])),
            Job('on-a', 'evaluate', dict(models=['../a/weights.safetensors'], datasets=['Mine']), ['a']),
            Job('other', 'evaluate', dict(models=['bicubic', 'msnlan-tiny'], datasets=['skimage-test'])),
            Job('tables', 'paper_tables', {}, ['on-a', 'other'])]


def changed(before, after): return {n for n in before if before[n][0] != after[n][0]}


def test_exactly_what_depends_runs_again(project):
    before = fingerprints(jobs())
    assert changed(before, fingerprints(jobs())) == set()
    assert changed(before, fingerprints(jobs(lr=0.5))) == {'a', 'on-a', 'tables'}, 'a parameter'
    picture = project/'data/Mine/HR/a.png'
    os.utime(picture)
    assert changed(before, fingerprints(jobs())) == set(), 'a touched picture'
    imwrite(picture, np.zeros((32, 32, 3), np.uint8))
    data = fingerprints(jobs())
    assert changed(before, data) == {'a', 'on-a', 'tables'}, 'a picture'
    path = project/'nbs/experiments/evaluate.ipynb'
    nb = json.loads(path.read_text())
    nb['cells'][0]['source'] = ['# Other words\n']
    path.write_text(json.dumps(nb))
    assert changed(data, fingerprints(jobs())) == set(), 'prose of a notebook'
    next(c for c in nb['cells'] if c['cell_type'] == 'code' and 'pd.concat' in ''.join(c['source']))['source'].append('\nextra = 1')
    path.write_text(json.dumps(nb))
    assert changed(data, fingerprints(jobs())) == {'on-a', 'other', 'tables'}, 'a notebook'


def test_weights_count(project):
    start = project/'start.safetensors'
    start.write_bytes(b'one')
    before = fingerprints(jobs(init=str(start)))
    start.write_bytes(b'two')
    assert changed(before, fingerprints(jobs(init=str(start)))) == {'a', 'on-a', 'tables'}
    assert 'msnlan-tiny-x2.safetensors' in before['other'][1]['weights'] and before['on-a'][1]['weights'] == {}


@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT/'nbs/experiments/presets').glob('*.yaml')))
def test_presets_are_whole(name):
    preset = load_preset(name)
    notebooks = [j.notebook for j in preset['jobs']]
    assert notebooks[-1] == 'paper_tables' and preset['title'] and preset['about']
    if name.startswith(('quick', 'paper-')):
        assert {'evaluate', 'attention_maps', 'paper_tables'} < set(notebooks) and any(n.startswith('train') for n in notebooks)
    if name == 'quick': assert {j.parameters['model'] for j in preset['jobs'] if j.notebook == 'train'} == {'msnlan', 'csnln', 'panet', 'hspan', 'mlrn'}


TINY = dict(msnlan=dict(n_feats=16, n_resgroups=2, n_resblocks=1), csnln=dict(n_feats=8, depth=1),
            panet=dict(n_feats=8, n_resblocks=2, pa_reduction=2), hspan=dict(n_feats=8, n_resgroups=1, n_resblocks=1),
            mlrn=dict(n_feats=16, n_modules=1), slot=dict(n_feats=18, n_resblocks=2))
TRAININGS = [(name, j.name) for name in sorted(p.stem for p in (ROOT/'nbs/experiments/presets').glob('paper-*.yaml'))
             for j in load_preset(name)['jobs'] if j.notebook == 'train']


def training_of(job, **changes):
    "The settings that the train notebook makes of a job, and changes"
    given = {f.name: job.parameters[f.name] for f in fields(TrainConfig) if job.parameters.get(f.name) is not None}
    return load_recipe(job.parameters['recipe'], given | changes)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    imwrite(folder/'a.png', np.random.default_rng(0).integers(0, 256, (56, 60, 3), np.uint8))
    return str(folder)


@pytest.mark.parametrize('preset,name', TRAININGS, ids=lambda v: v)
def test_every_training_of_a_paper_runs_in_miniature(preset, name, pictures, tmp_path):
    "Its recipe, task, scale and level with narrow layers, small patches, two steps and a validation"
    job = next(j for j in load_preset(preset)['jobs'] if j.name == name)
    full = training_of(job)
    assert full.steps >= 500_000 and full.batch == 16 and full.seed == 1
    cfg = training_of(job, model_config=full.model_config | TINY[full.model], data=[pictures], validation=[pictures], patch=12, batch=2,
                      steps=2, validate_every=2, log_every=1, workers=0, cache='memory', trackers=[])
    trainer = Trainer(cfg, tmp_path)
    assert (trainer.net.task, trainer.net.scale) == (full.model_config.get('task', 'sr'), full.scale)
    summary = fit(trainer)
    assert summary['steps'] == 2 and np.isfinite([summary['loss'], summary['psnr']]).all() and (tmp_path/'weights.safetensors').is_file()


def test_a_recipe_stands_once():
    "What a recipe says is not said again by a paper's preset; MLRN trains on pictures that are no test pictures"
    names = {f.name for f in fields(TrainConfig)}
    for preset, name in TRAININGS:
        job = next(j for j in load_preset(preset)['jobs'] if j.name == name)
        assert set(job.parameters) & names <= {'scale', 'level'} and job.parameters['recipe'] != 'default', (preset, name)
    mlrn = [training_of(j) for j in load_preset('paper-mlrn')['jobs'] if j.notebook == 'train']
    assert [c.patch for c in mlrn] == [96, 64, 48] and all(c.data == ['T91', 'train/BSDS/train'] for c in mlrn)


def test_panet_has_its_four_tasks():
    seen = [training_of(j) for j in load_preset('paper-panet')['jobs'] if j.notebook == 'train']
    assert {c.model_config['task'] for c in seen} == {'sr', 'denoise', 'demosaic', 'dejpeg'} and len(seen) == 12
    assert sorted(c.level for c in seen if c.model_config['task'] == 'denoise') == [10, 30, 50, 70]
    assert sorted(c.level for c in seen if c.model_config['task'] == 'dejpeg') == [10, 20, 30, 40]
    assert sorted(c.scale for c in seen if c.model_config['task'] == 'sr') == [2, 3, 4]


def test_one_gpu_a_job(tmp_path):
    "Three processes, two GPUs: two run at once on different ones, the third waits"
    code = ('import sys, os, time\nfrom pathlib import Path\nfrom msnlan.reproduce.jobs import claim_gpu\nstart = time.time()\n'
            'with claim_gpu(Path(sys.argv[1]), True) as g:\n    print(g, os.environ["CUDA_VISIBLE_DEVICES"], time.time(), flush=True)\n'
            '    time.sleep(2)\n    print(time.time())')
    env = os.environ | dict(CUDA_VISIBLE_DEVICES='3,5')
    running = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate(timeout=60)[0].split() for p in running]
    assert all(s[0] == s[1] for s in said) and {s[0] for s in said} == {'3', '5'}
    for a in said:
        for b in said:
            if a is not b and a[0] == b[0]: assert float(a[3]) <= float(b[2]) or float(b[3]) <= float(a[2]), 'never two on one GPU'


def test_a_mistake_in_a_preset_is_one_line(tmp_path):
    path = tmp_path/'mine.yaml'
    path.write_text('jobs:\n  train:\n    notebook: train\n    parameters:\n      steps: 10\n      learning_rate: 1e-3\n')
    run = subprocess.run([sys.executable, '-m', 'msnlan.cli', 'reproduce', str(path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.strip().startswith('msnlan: ') and 'line 6: ' in run.stderr and len(run.stderr.strip().splitlines()) == 1
    with pytest.raises(PresetError, match='line 6'): load_preset(str(path))
