"""Presets as a person runs them: resumed after a kill, with a failure, a third time, through SLURM; and the trail of a cell."""
import json, os, random, re, resource, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, psutil, pytest, yaml
import slurm
from conftest import ROOT
from msnlan.images import imwrite

SMALL = dict(title='small', threads=1, jobs={
    'bicubic': dict(notebook='evaluate', parameters=dict(models=['bicubic'], datasets=['{data}'], scales=[2], crops=0)),
    'tables': dict(notebook='paper_tables', needs=['bicubic'], parameters=dict(runs=['../bicubic']))})

NETS = dict(title='nets', threads=1,
    axes=dict(system={n: dict(model_config=dict(n_feats=16, rgb_range=255) | more) for n, more in dict(
        msnlan=dict(n_resgroups=2, n_resblocks=1), hspan=dict(n_resgroups=1, n_resblocks=1)).items()}),
    jobs={'{system}-x2': {'for': ['system'], 'notebook': 'train', 'use': ['system'], 'parameters': dict(
              model='{system}', data=['{data}'], validation=[], patch=8, batch=2, steps=30, lr=2e-3, schedule='cosine',
              checkpoint_every=5, log_every=5)},
          'evaluate-{system}': {'for': ['system'], 'notebook': 'evaluate', 'needs': ['{system}-x2'], 'parameters': dict(
              models=['../{system}-x2/weights.safetensors'], datasets=['{data}'], scales=[2], crops=1)},
          'attention-msnlan': dict(notebook='attention_maps', needs=['msnlan-x2'], parameters=dict(
              model='../msnlan-x2/weights.safetensors', dataset='{data}', limit=1, size=24)),
          'tables': dict(notebook='paper_tables', needs=['{system}-x2', 'evaluate-{system}'], parameters=dict(
              runs=['../{system}-x2', '../evaluate-{system}']))})


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A folder that is the project by links, with two small pictures"
    folder = tmp_path_factory.mktemp('project')
    for name in ('settings.ini', 'nbs', 'requirements.lock'): (folder/name).symlink_to(ROOT/name)
    rng = np.random.default_rng(0)
    for name in 'ab':
        steps = rng.integers(0, 256, (7, 6, 3)).repeat(8, 0).repeat(8, 1)
        imwrite(folder/f'data/Mine/HR/{name}.png', steps.astype(np.uint8))
    return folder


def write_preset(project, preset, name, change=lambda text: text):
    path = project/f'{name}.yaml'
    path.write_text(change(yaml.safe_dump(preset, sort_keys=False).replace('{data}', 'Mine')))
    return str(path)


def environ(project, **more):
    return {k: v for k, v in os.environ.items() if k not in ('SLURM_CONF',)} | dict(
        MSNLAN_DATA=str(project/'data'), XDG_CACHE_HOME=str(project/'cache'), PYTHONPATH=str(ROOT)) | more


def msnlan(project, *args, limit=600, **env):
    return subprocess.run([sys.executable, '-m', 'msnlan.cli', *map(str, args)], cwd=project, env=environ(project, **env),
                          capture_output=True, text=True, timeout=limit)


def stamps(folder): return {p.parent.name: (p.name, p.stat().st_mtime_ns) for p in folder.glob('runs/[!.]*/done-*')}
def tables(folder): return {p.name: p.read_bytes() for p in sorted((folder/'tables').glob('*')) if p.suffix in ('.csv', '.tex', '.json')}


@pytest.fixture(scope='module')
def small(project):
    "A preset of two runs that is done"
    preset = write_preset(project, SMALL, 'small')
    run = msnlan(project, 'reproduce', preset)
    assert run.returncode == 0, run.stdout + run.stderr
    return preset, project/'reports/small'


def test_nothing_is_to_be_done_twice(project, small):
    preset, folder = small
    before, page = stamps(folder), (folder/'index.html').stat().st_mtime_ns
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = used()
    run = msnlan(project, 'reproduce', preset)
    assert run.returncode == 0 and 'Nothing is to be done' in run.stdout, run.stdout + run.stderr
    assert stamps(folder) == before and (folder/'index.html').stat().st_mtime_ns == page
    assert used() - start < 15, 'seconds of processor time'


def test_a_run_leaves_all_of_it(small):
    _, folder = small
    left = {p.name for p in (folder/'runs/bicubic').iterdir()}
    assert {'notebook.ipynb', 'result.json', 'per_picture.csv', 'provenance.json', 'log.txt'} <= left
    record = json.loads((folder/'runs/bicubic/provenance.json').read_text())
    assert record['state'] == 'done' and record['environment']['packages']['torch'] and record['start'] <= record['end']
    kept = json.loads((folder/'runs/bicubic/notebook.ipynb').read_text())['metadata']['msnlan']
    assert kept['state'] == 'done' and kept['depends']['data']['Mine'] == record['depends']['data']['Mine']
    assert not list(folder.glob('runs/.*')) and not list((folder/'.running').glob('*'))


@pytest.mark.slow
def test_trail_of_every_cell(project, small):
    _, folder = small
    code = ('import json, sys\nfrom msnlan.reproduce.trail import trail\nbad = [trail(c)[1] for c in json.loads(sys.argv[1])]\n'
            'assert not any(bad), bad\nprint(len(bad))')
    cells = [f"{folder}/tables/{t}[{i},{j}]" for t, n, m in (('scores_cnn.csv', 1, 2), ('per_picture.csv', 2, 3)) for i in range(1, n + 1)
             for j in range(1, m + 1)]
    run = subprocess.run([sys.executable, '-c', code, json.dumps(cells)], cwd=project, env=environ(project), capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == str(len(cells)), run.stderr[-2000:]
    table = (folder/'tables/scores_cnn.html').read_text()
    target = re.search(r'href="([^"]+)"', table)[1]
    assert (folder/'tables'/target).is_file(), 'a cell links to its executed notebook'


def test_trail_tells_what_differs(project, small):
    _, folder = small
    path = folder/'runs/bicubic/per_picture.csv'
    text = path.read_text()
    try:
        path.write_text(text.replace('cnn', 'CNN'))
        run = msnlan(project, 'why', f'{folder}/tables/scores_cnn.csv[bicubic,Mine x2]')
        assert run.returncode == 1 and 'DIFFERS' in run.stdout and 'per_picture.csv of bicubic' in run.stderr, run.stdout + run.stderr
    finally: path.write_text(text)


@pytest.mark.slow
def test_dry_run_says_why(project, small):
    preset, folder = small
    changed = write_preset(project, SMALL, 'small', lambda t: t.replace('crops: 0', 'crops: 1'))
    run = msnlan(project, 'reproduce', changed, '--dry-run')
    write_preset(project, SMALL, 'small')
    assert re.search(r'run +bicubic +evaluate +crops: 0 -> 1', run.stdout) and re.search(r'run +tables +\w+ +after bicubic', run.stdout), run.stdout
    assert '2 of 2 runs to do' in run.stdout


def test_page_needs_no_network(small):
    _, folder = small
    for page in [folder/'index.html', *folder.glob('pages/*.html')]:
        found = re.findall(r'(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert found == [], f'{page.name} asks for {found}'
    for target in re.findall(r'href="([^"#]+)"', (folder/'index.html').read_text()): assert (folder/target).exists(), target


@pytest.mark.slow
def test_failure_leaves_the_others_done(project):
    preset = write_preset(project, NETS, 'fails', lambda t: t.replace("model: '{system}'", "model: '{system}'", 1))
    text = yaml.safe_load(Path(preset).read_text())
    text['jobs']['bad'] = dict(notebook='evaluate', parameters=dict(models=['bicubic'], datasets=['Mine'], tile='nonsense'))
    text['jobs']['after-bad'] = dict(notebook='paper_tables', needs=['bad'], parameters=dict(runs=['../bad']))
    Path(preset).write_text(yaml.safe_dump(text, sort_keys=False))
    run = msnlan(project, 'reproduce', preset, '--keep-going', limit=1200)
    folder = project/'reports/fails'
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1].startswith('msnlan: bad: '), run.stderr
    assert set(stamps(folder)) == {'msnlan-x2', 'hspan-x2', 'evaluate-msnlan', 'evaluate-hspan', 'attention-msnlan', 'tables'}
    page = (folder/'index.html').read_text()
    assert 'Traceback (most recent call last)' in page and '6 of 8 runs done, 1 failed, 1 not run' in page
    record = json.loads((folder/'failed/bad/provenance.json').read_text())
    assert record['state'] == 'failed' and record['traceback'] and record['environment']


def test_a_signal_to_one_process_ends_all(project):
    "SIGTERM to the command alone: its Snakemake and its job end"
    preset, folder = write_preset(project, SMALL, 'ended'), project/'reports/ended'
    p = subprocess.Popen([sys.executable, '-m', 'msnlan.cli', 'reproduce', preset], cwd=project, env=environ(project),
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list((folder/'.running').glob('*')) and time.monotonic() < end: time.sleep(.1)
    below = psutil.Process(p.pid).children(recursive=True)
    assert len(below) >= 2, 'Snakemake and a job'
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=120)[1]
    assert p.returncode == 1 and f'the same command goes on: msnlan reproduce {preset}' in said
    assert psutil.wait_procs(below, 20)[1] == []


def test_a_training_stopped_by_a_signal_is_not_done(project):
    "SIGTERM to a command that a script started with `&` (interrupts are ignored below it): nothing further starts, the checkpoint stays"
    jobs = {n: dict(notebook='train', parameters=dict(model='hspan', model_config=dict(n_feats=16, n_resgroups=1, n_resblocks=1),
                data=['{data}'], validation=[], patch=8, batch=2, steps=1_000_000, checkpoint_every=5)) for n in ('first', 'second')}
    preset, folder = write_preset(project, dict(title='stopped', threads=1, jobs=jobs), 'stopped'), project/'reports/stopped'
    p = subprocess.Popen([sys.executable, '-m', 'msnlan.cli', 'reproduce', preset, '--jobs', '1'], cwd=project, env=environ(project),
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    end = time.monotonic() + 120
    while not list(folder.glob('runs/.*.partial/checkpoints/step-*')) and time.monotonic() < end: time.sleep(.1)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=120)[1]
    assert p.returncode == 1 and f'the same command goes on: msnlan reproduce {preset}' in said
    begun = [f for f in folder.glob('runs/.*.partial') if (f/'log.txt').is_file()]
    assert stamps(folder) == {} and len(begun) == 1 and list(begun[0].glob('checkpoints/step-*'))


def kill_and_resume(project, name, kills, seed):
    "Reproduce NETS with `kills` SIGKILLs at random moments; gives the number of finished runs seen at each kill"
    preset, folder, rng, seen = write_preset(project, NETS, name), project/f'reports/{name}', random.Random(seed), []
    for _ in range(kills):
        before = stamps(folder)
        with subprocess.Popen([sys.executable, '-m', 'msnlan.cli', 'reproduce', preset, '--jobs', '2'], cwd=project, env=environ(project),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as p:
            time.sleep(rng.uniform(4, 40))
            os.killpg(p.pid, signal.SIGKILL)
        assert {n: s for n, s in stamps(folder).items() if n in before} == before, 'what was done is not done again'
        seen.append(len(stamps(folder)))
    before = stamps(folder)
    run = msnlan(project, 'reproduce', preset, '--jobs', 2, limit=1200)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {n: s for n, s in stamps(folder).items() if n in before} == before
    return folder, seen


@pytest.mark.slow
def test_killed_ten_times_gives_the_same_bytes(project):
    whole, _ = kill_and_resume(project, 'nets', 0, 0)
    killed, seen = kill_and_resume(project, 'killed', 10, 1)
    print('finished runs at each kill:', seen)
    first, second = tables(whole), tables(killed)
    assert len(first) >= 9 and first == second


@pytest.mark.slow
def test_two_runs_through_slurm(project, tmp_path):
    if reason := slurm.why_not(): pytest.skip(f'SLURM: {reason}')
    preset = write_preset(project, SMALL, 'cluster')
    profile = tmp_path/'profile/config.yaml'
    profile.parent.mkdir()
    profile.write_text((ROOT/'nbs/experiments/profiles/slurm/config.yaml').read_text().replace('mem_mb: 32000', 'mem_mb: 1500')
                       .replace('runtime: 2880', 'runtime: 20').replace('latency-wait: 60', 'latency-wait: 20')
                       + '\nslurm-init-seconds-before-status-checks: 5\nslurm-status-command: squeue\n')
    try: running = slurm.cluster(tmp_path/'slurm'); env = running.__enter__()
    except (RuntimeError, OSError) as e: pytest.skip(f'SLURM does not start here: {e}')
    try:
        run = msnlan(project, 'reproduce', preset, '--profile', profile.parent, '--gpus', 0, SLURM_CONF=env['SLURM_CONF'], PATH=env['PATH'], limit=400)
        jobs = subprocess.run(['scontrol', 'show', 'jobs', '-o'], env=env, capture_output=True, text=True).stdout
    finally: running.__exit__(None, None, None)
    assert run.returncode == 0, run.stdout + run.stderr
    assert jobs.count('JobState=COMPLETED') == 2, jobs
    local, cluster = project/'reports/small', project/'reports/cluster'
    assert set(stamps(cluster)) == {'bicubic', 'tables'}
    if local.is_dir(): assert tables(local)['scores_cnn.csv'] == tables(cluster)['scores_cnn.csv']


STUDY = dict(title='study', threads=1,
    axes=dict(attention={n: dict(label=n) for n in ('none', 'pixel')}, seed=[1, 2]),
    jobs={'{attention}-s{seed}': {'for': ['attention', 'seed'], 'notebook': 'train', 'parameters': dict(
              model='slot', model_config=dict(attention='{attention.label}', n_feats=18, n_resblocks=2), seed='{seed}', data=['{data}'], validation=[],
              patch=8, batch=2, steps=3)},
          'evaluate-{attention}': {'for': ['attention'], 'notebook': 'evaluate', 'needs': ['{attention}-s{seed}'], 'parameters': dict(
              models=['../{attention}-s{seed}/weights.safetensors'], label='{attention.label}', datasets=['{data}@16'], scales=[2], crops=0)},
          'study': dict(notebook='study', needs=['evaluate-{attention}'], parameters=dict(runs=['../evaluate-{attention}'], against='none'))})


@pytest.mark.slow
def test_a_study_from_its_trainings_to_its_arms(project):
    "Two arms, two seeds each: one row an arm, seeds counted"
    run = msnlan(project, 'reproduce', write_preset(project, STUDY, 'study'))
    assert run.returncode == 0, run.stdout + run.stderr
    import pandas as pd
    arms = pd.read_csv(project/'reports/study/tables/arms.csv')
    assert sorted(arms.arm) == ['none', 'pixel'] and arms.seeds.tolist() == [2, 2] and arms.pictures.tolist() == [2, 2]


def test_times_of_files_mean_nothing(project, small):
    "`git clone` writes them in any order: what has its done file is not run again"
    _, folder = small
    os.utime(next(folder.glob('runs/tables/done-*')), (1, 1))
    before = stamps(folder)
    more = SMALL['jobs'] | dict(more=dict(notebook='evaluate', parameters=dict(models=['bicubic'], datasets=['{data}'], scales=[3], crops=0)))
    run = msnlan(project, 'reproduce', write_preset(project, SMALL | dict(jobs=more), 'small'))
    assert run.returncode == 0 and run.stderr.count(' ...') == 1, run.stdout + run.stderr
    after = stamps(folder)
    assert after.pop('more') and after == before
