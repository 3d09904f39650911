"""The command as a person types it: results, and mistakes that end with exit status 1 and one line."""
import json, os, subprocess, sys
import numpy as np, pytest
from conftest import ROOT
from msnlan.basics import gpu_names
from msnlan.images import imread, imwrite

def msnlan(*args, cwd=ROOT, data=None, limit=240):
    "Run the command; `data` is the data root, none hides the one of the caller"
    env = {k: v for k, v in os.environ.items() if k != 'MSNLAN_DATA'}
    env |= {'XDG_CACHE_HOME': str(cwd/'no-cache')} | ({'MSNLAN_DATA': str(data)} if data else {})
    return subprocess.run([sys.executable, '-m', 'msnlan.cli', *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=limit)


@pytest.fixture()
def project(tmp_path):
    "A folder from which notebooks run, with nothing in it: the project's own files by links"
    for name in ('settings.ini', 'nbs', 'requirements.lock'): (tmp_path/name).symlink_to(ROOT/name)
    return tmp_path


def is_one_line_error(run, *texts):
    assert run.returncode == 1, (run.returncode, run.stdout, run.stderr)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith('msnlan: ') and 'Traceback' not in run.stderr.split('msnlan: ')[-1], run.stderr
    for t in texts: assert t in last, last


def left_over(project): return sorted(str(p.relative_to(project)) for p in project.rglob('*') if 'failed' not in p.parts and p.is_file()
                                      and not any(q in p.parts for q in ('nbs', 'no-cache')) and not p.is_symlink())


def test_unknown_parameter(project):
    run = msnlan('train', '-p', 'stepz=3', cwd=project)
    is_one_line_error(run, "no parameter 'stepz'", "did you mean 'steps'?")
    assert left_over(project) == []


def test_parameter_of_another_type(project):
    is_one_line_error(msnlan('train', '-p', 'steps=many', cwd=project), 'steps: expected int', "'many'")


def test_missing_data_set(project):
    run = msnlan('evaluate', '-p', 'models=["bicubic"]', '-p', 'datasets=["Set5"]', cwd=project)
    is_one_line_error(run, 'evaluate', 'Set5', 'expected 5 pictures')
    assert left_over(project) == []


def test_empty_data_set(project, tmp_path):
    (tmp_path/'data/Set5/HR').mkdir(parents=True)
    is_one_line_error(msnlan('score', tmp_path, '--dataset', 'Set5', '--scale', '4', '--data-root', tmp_path/'data', cwd=project), 'Set5', 'expected 5')
    is_one_line_error(msnlan('score', tmp_path, '--dataset', 'Set5', '--scale', '4', '--data-root', tmp_path/'nowhere', cwd=project), 'no such folder')


def test_truncated_picture(project, tmp_path):
    folder = tmp_path/'data/Mine/HR'
    imwrite(folder/'a.png', np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole = (folder/'a.png').read_bytes(); (folder/'a.png').write_bytes(whole[:len(whole)//2])
    run = msnlan('evaluate', '-p', 'models=["bicubic"]', '-p', 'datasets=["Mine"]', cwd=project, data=tmp_path/'data')
    is_one_line_error(run, 'a.png')


def test_score_refuses_another_size(project, tmp_path):
    rng = np.random.default_rng(0)
    imwrite(tmp_path/'data/Mine/HR/a.png', rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    imwrite(tmp_path/'sr/a.png', rng.integers(0, 256, (40, 36, 3), dtype=np.uint8))
    is_one_line_error(msnlan('score', tmp_path/'sr', '--dataset', 'Mine', '--scale', '4', cwd=project, data=tmp_path/'data'), 'a', '40', '36')


def test_weights_of_another_configuration(project, tmp_path):
    from safetensors.torch import load_file, save_file
    from msnlan.models.zoo import create_model, save_weights
    save_weights(create_model('msnlan', scale=2, n_feats=16, n_resgroups=2, n_resblocks=1), tmp_path/'good/w.safetensors')
    import safetensors
    with safetensors.safe_open(tmp_path/'good/w.safetensors', 'pt') as f: meta = f.metadata()
    meta = {k: v.replace('"n_feats": 16', '"n_feats": 32') for k, v in meta.items()}
    save_file(load_file(tmp_path/'good/w.safetensors'), tmp_path/'bad.safetensors', meta)
    photo = tmp_path/'photo.png'
    imwrite(photo, np.zeros((8, 8, 3), np.uint8))
    run = msnlan('upscale', photo, '-o', tmp_path/'out.png', '--model', tmp_path/'bad.safetensors', cwd=project)
    is_one_line_error(run, 'is (16,', 'expected (32,')
    assert not (tmp_path/'out.png').exists()
    assert msnlan('upscale', photo, '-o', tmp_path/'out.png', '--model', tmp_path/'good/w.safetensors', cwd=project).returncode == 0
    assert imread(tmp_path/'out.png').shape == (16, 16, 3)


def test_score_of_another_programs_pictures(project, data_root):
    run = msnlan('score', data_root/'sr_outputs/IMDN/Set5_x4', '--dataset', 'Set5', '--scale', '4', cwd=project, data=data_root)
    assert run.returncode == 0, run.stderr
    assert '32.211' in run.stdout.splitlines()[-1] and '0.8948' in run.stdout.splitlines()[-1]


def test_models(project):
    run = msnlan('models', cwd=project)
    assert run.returncode == 0 and 'msnlan-tiny' in run.stdout, run.stderr


def test_train_evaluate_look_tabulate(project):
    "The main job in small: four notebooks, one after the other"
    run = msnlan('train', '-p', 'steps=4', '-p', 'patch=8', '-p', 'batch=2', '-p', 'validation=[]', '-p',
                 'model_config={"n_feats": 16, "n_resgroups": 2, "n_resblocks": 1}', '-o', 'runs/t', cwd=project)
    assert run.returncode == 0, run.stderr
    weights = 'runs/t/weights.safetensors'
    run = msnlan('evaluate', '-p', f'models=["bicubic", "{weights}"]', '-p', 'datasets=["skimage-test:1"]', '-p', 'crops=1', cwd=project)
    assert run.returncode == 0 and 'bicubic' in run.stdout, run.stderr
    run = msnlan('attention', '-p', f'model={weights}', '-p', 'limit=1', '-p', 'size=24', '-p', 'points=[[0.5,0.5]]', cwd=project)
    assert run.returncode == 0 and ' figures' in run.stdout, run.stderr
    run = msnlan('tables', '-p', 'runs=["runs/evaluate", "runs/t"]', cwd=project)
    assert run.returncode == 0, run.stderr
    table = (project/'runs/paper_tables/tables/scores_cnn.csv').read_text().splitlines()
    assert [l.split(',')[0] for l in table] == ['model', 'bicubic', 't']
    provenance = json.loads((project/'runs/evaluate/provenance.json').read_text())
    assert provenance['state'] == 'done' and len(provenance['inputs']['skimage-test:1']) == 64
    assert not list(project.glob('runs/.*')), 'nothing half-written stays'


@pytest.mark.skipif(bool(gpu_names()), reason='here is a GPU')
def test_bench_gpu_without_one(project, tmp_path):
    run = msnlan('bench', 'gpu', '-o', tmp_path/'out', cwd=project)
    is_one_line_error(run, 'found none', '--interpret')
    assert 'Not run' in (tmp_path/'out/gpu.md').read_text()
    is_one_line_error(msnlan('bench', 'gpus', cwd=project), "expected attention, training, photo, gpu, found 'gpus'")
