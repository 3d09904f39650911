"""The package as it is handed out: wheel and sdist, each in an environment of its own, from an empty folder."""
import json, os, shutil, signal, subprocess, sys, sysconfig, time, urllib.request
from pathlib import Path
import numpy as np, pytest
from conftest import ROOT
from msnlan.images import imread, imwrite
from msnlan.reproduce.presets import list_presets

SEEDS = dict(OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')


def run(*command, limit=1800, **more):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=limit, **more)


def project_files():
    listed = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT)
    if listed.returncode: pytest.skip('not a git checkout')
    return [n for n in listed.stdout.split('\0') if n and (ROOT/n).is_file()]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Folder with the wheel and the sdist, built from the project's files alone"
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    for name in project_files():
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, source/name)
    done = run(sys.executable, '-m', 'build', '--no-isolation', '-o', out, source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


class Installed:
    "An environment that has the dependencies of this one by its path, and the package from a file"
    def __init__(self, file:Path, folder:Path):
        self.bin, self.folder = folder/'env/bin', folder/'empty'
        self.folder.mkdir()
        assert run(sys.executable, '-m', 'venv', '--without-pip', folder/'env').returncode == 0
        site = next((folder/'env/lib').glob('python*/site-packages'))
        (site/'rest.pth').write_text(sysconfig.get_path('purelib') + '\n')
        done = run(sys.executable, '-m', 'pip', '--python', self.bin/'python', 'install', '--quiet', '--no-deps', '--no-index', '--no-build-isolation',
                   '--no-compile', '--disable-pip-version-check', file, env=self.environ())
        assert done.returncode == 0, done.stderr[-2000:]
        self.package = site/'msnlan'

    def environ(self, **more):
        env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'MSNLAN_DATA', 'VIRTUAL_ENV')} | SEEDS
        share = Path(sys.prefix)/'share/jupyter'                  # templates of voila and nbconvert, which a real installation has beside it
        return env | dict(PATH=f"{self.bin}:{os.environ['PATH']}", XDG_CACHE_HOME=str(self.folder.parent/'cache'), JUPYTER_PATH=str(share)) | more

    def __call__(self, *args, **more):
        "Run `msnlan` and expect success; what it printed"
        done = run(self.bin/'msnlan', *args, cwd=self.folder, env=self.environ(**more))
        assert done.returncode == 0, f'{args}: {done.stdout[-1500:]}{done.stderr[-1500:]}'
        return done.stdout


@pytest.fixture(scope='module', params=['whl', 'tar.gz'])
def installed(request, made, tmp_path_factory):
    there = Installed(next(made.glob(f'*.{request.param}')), tmp_path_factory.mktemp('installed'))
    said = run(there.bin/'python', '-c', 'import msnlan; print(msnlan.__file__)', cwd=there.folder, env=there.environ()).stdout.strip()
    assert Path(said).parent == there.package, 'the package comes from the file alone'
    return there


SMALL = ('-p', 'steps=4', '-p', 'patch=8', '-p', 'batch=2', '-p', 'validation=[]', '-p', 'model_config={"n_feats": 16, "n_resgroups": 2, "n_resblocks": 1}')


@pytest.mark.slow
def test_what_travels(installed):
    there = lambda name: sorted(p.relative_to(installed.package/name).as_posix() for p in (installed.package/name).rglob('*') if p.is_file())
    kept = lambda folder: sorted(n[len(folder) + 1:] for n in project_files() if n.startswith(folder + '/'))
    for name, folder in dict(experiments='nbs/experiments', published='reports/published', kept='reports/shipped/kept', weights='msnlan/weights').items():
        assert there(name) == kept(folder), name
    assert not (installed.package.parent/'nbs').exists() and not (installed.package.parent/'tests').exists()


@pytest.mark.slow
def test_four_notebooks_from_an_empty_folder(installed):
    installed('train', *SMALL, '-o', 'runs/t')
    said = installed('evaluate', '-p', 'models=["bicubic", "runs/t/weights.safetensors"]', '-p', 'datasets=["skimage-test:1"]', '-p', 'crops=1')
    assert 'bicubic' in said and '\nt  ' in said
    assert ' figures' in installed('attention', '-p', 'model=runs/t/weights.safetensors', '-p', 'limit=1', '-p', 'size=24', '-p', 'points=[[0.5,0.5]]')
    installed('tables', '-p', 'runs=["runs/evaluate", "runs/t"]', '-p', 'published=true')
    assert (installed.folder/'runs/paper_tables/tables/published.csv').is_file()
    record = json.loads((installed.folder/'runs/t/provenance.json').read_text())
    assert record['state'] == 'done' and record['environment']['git']['commit'] is None and record['environment']['msnlan']
    assert {p.name for p in installed.folder.iterdir()} <= {'runs', 'reports', 'study.yaml', 'mine'}, 'outputs lie below runs and reports'


@pytest.mark.slow
def test_a_study_of_ones_own(installed):
    listed = installed('reproduce', '--list').splitlines()
    assert [l.split()[0] for l in listed] == list_presets()              # those of the clone
    (installed.folder/'mine').mkdir(exist_ok=True)
    path = installed.folder/'mine/study.yaml'
    installed('init', path)
    text = path.read_text().replace('steps: 200', 'steps: 2').replace('seed: [1, 2]', 'seed: [1]').replace('[skimage-test]', "['skimage-test:1']")
    path.write_text(text)
    assert '6 of 6 runs to do' in installed('reproduce', 'mine/study.yaml', '--dry-run')
    assert 'Report: ' in installed('reproduce', 'mine/study.yaml')
    page = (installed.folder/'reports/study/index.html').read_text()
    assert 'pip install msnlan==' in page and 'msnlan reproduce mine/study.yaml' in page
    assert 'Nothing is to be done' in installed('reproduce', 'mine/study.yaml')
    assert 'every hash is that of the file' in installed('why', 'reports/study/tables/scores_cnn.csv[bicubic,skimage-test:1 x2]')
    done = run(installed.bin/'msnlan', 'init', path, cwd=installed.folder, env=installed.environ())
    assert done.returncode == 1 and 'is there already' in done.stderr and path.read_text() == text


@pytest.mark.slow
def test_the_others(installed):
    assert 'Set5' in installed('data', 'list') and 'msnlan-tiny' in installed('models')
    imwrite(installed.folder/'runs/in/a.png', np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8))
    installed('upscale', 'runs/in', '-o', 'runs/out')
    assert imread(installed.folder/'runs/out/a_x2.png').shape == (24, 30, 3)
    installed('restore', 'runs/in/a.png', '-o', 'runs/clean.png', '--model', 'panet-tiny-denoise-30')
    assert imread(installed.folder/'runs/clean.png').shape == (12, 15, 3)
    (installed.folder/'runs/data/Mine').mkdir(parents=True, exist_ok=True)
    shutil.copytree(installed.folder/'runs/out', installed.folder/'runs/data/Mine/HR', dirs_exist_ok=True)
    assert 'mean of 1' in installed('score', 'runs/out', '--dataset', 'Mine', '--scale', '2', '--data-root', 'runs/data')
    assert 'picture' in installed('story', '--parameters')
    installed('export', 'msnlan-tiny', 'runs/tiny.onnx')
    said = run(installed.bin/'msnlan', 'bench', 'nothing', cwd=installed.folder, env=installed.environ())
    assert said.returncode == 1 and 'expected ' in said.stderr


@pytest.mark.slow
def test_the_explorers_page(installed):
    port = 8000 + os.getpid()%1000
    page = subprocess.Popen([installed.bin/'msnlan', 'explore', '--port', str(port), '--no-browser', '--side', '32'], cwd=installed.folder,
                            env=installed.environ(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(120):
            assert page.poll() is None, page.stderr.read()[-2000:]
            try: text = urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=100).read().decode(); break
            except OSError: time.sleep(1)
        else: raise AssertionError('no page within two minutes')
        assert 'msnlan' in text
    finally:
        page.send_signal(signal.SIGINT)
        try: page.wait(30)
        except subprocess.TimeoutExpired: page.kill()


def test_help_and_import_are_quick():
    "Processor time, as other tests run beside: a start without PyTorch, numpy or any plotting"
    code = ('import sys, time; start = time.process_time()\n{}\nheavy = {{"torch", "numpy", "pandas", "matplotlib", "rich", "papermill", "yaml"}} & set(sys.modules)\n'
            'assert not heavy, heavy\nprint(time.process_time() - start)')
    for what, limit in (('import msnlan', .3), ('sys.argv = ["msnlan", "--help"]\nfrom msnlan.cli import main\ntry: main()\nexcept SystemExit: pass', .5)):
        took = min(float(run(sys.executable, '-c', code.format(what), cwd=ROOT, check=True).stdout.split()[-1]) for _ in range(3))
        assert took < limit, (what, took)
