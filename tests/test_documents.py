"""README, guide and help: the commands are commands and run, the Python runs, the links lead somewhere, the size is that of a front page."""
import re, shlex, sys
import numpy as np, pytest, typer
from conftest import ROOT
from msnlan.basics import gpu_names
from msnlan.cli import app, main, parse_parameters
from msnlan.images import imwrite
from msnlan.reproduce.presets import load_preset
from msnlan.reproduce.runs import check_parameters, notebook_path

PAGES = [ROOT/'README.md', *sorted((ROOT/'nbs/pages').glob('*.md'))]
NOTEBOOKS = dict(train='train', evaluate='evaluate', attention='attention_maps', tables='paper_tables')


def helps(group):
    for sub in group.commands.values(): yield from [sub, *(helps(sub) if hasattr(sub, 'commands') else [])]


def commands():
    "What README and guide show in blocks of a shell, and every command's help as its example"
    blocks = [b for p in PAGES for b in re.findall(r'```sh\n(.*?)```', p.read_text(), re.S)]
    lines = [l.split('  #')[0].strip() for b in blocks for l in b.splitlines()]
    examples = [e for c in helps(typer.main.get_command(app)) for e in re.findall('Example: (.*)', c.help or '')]
    return sorted({l for l in [*lines, *examples] if l.startswith('msnlan ')})


@pytest.mark.parametrize('command', commands())
def test_commands(command):
    "Options that exist, parameters of the notebook with their types, presets that can be read"
    name, *args = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    sub = group.commands[name]
    if hasattr(sub, 'commands') and args and args[0] in sub.commands: sub = sub.commands[args.pop(0)]
    context = sub.make_context(name, list(args))
    if name in NOTEBOOKS: check_parameters(notebook_path(NOTEBOOKS[name]), parse_parameters(context.params['parameter']))
    if name == 'reproduce': assert load_preset(context.params['preset'])['jobs']


def test_there_are_commands(): assert len(commands()) > 30


TOY = ['-p', 'steps=2', '-p', 'patch=8', '-p', 'batch=2', '-p', 'validation=[]', '-p', 'model_config={"n_feats": 16, "n_resgroups": 2, "n_resblocks": 1}']
SHORTER = {'train': TOY, 'train -p recipe=msnlan': ['--dry-run'], 'attention': ['-p', 'limit=1', '-p', 'size=24', '-p', 'points=[[0.5,0.5]]'],
           'story': ['--parameters'], 'reproduce': ['--dry-run']}   # what is added, so that a page of commands takes minutes
CANNOT = {'data fetch': 'Set5', 'data verify': 'Set5: expected 5 pictures', 'why': 'reports/quick', 'bench': 'gpu: '}   # with toys, and how that is said
RUNS = 'train', 'evaluate', 'attention', 'tables', 'models card', 'init'    # in this order: others use what the first made


@pytest.mark.slow
@pytest.mark.parametrize('runs', [True, False], ids=['runs', 'others'])
def test_commands_as_written(runs, tmp_path, monkeypatch, capsys):
    "Every line runs in a folder with toys of the names that it has; the page of `explore` and whole presets run elsewhere"
    noise = lambda *size: np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    for name in ('baby', 'bird', 'butterfly', 'head', 'woman'):
        for place in ('DATA/Set5/HR', 'results/Set5_x4'): imwrite(tmp_path/place/f'{name}.png', noise(32, 32, 3))
    for name in ('baboon', 'barbara', 'boats', 'lena', 'peppers'): imwrite(tmp_path/'DATA/Classic5/HR'/f'{name}.png', noise(32, 32))
    for name in ('photo.jpg', 'noisy.png'): imwrite(tmp_path/name, noise(24, 20, 3))
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('MSNLAN_DATA', str(tmp_path/'DATA'))
    monkeypatch.setattr('msnlan.correlation.page.serve', lambda *a, **more: print('served', a, more))
    wrong = []
    turn = lambda line: next((i for i, r in enumerate(RUNS) if line.startswith(r)), len(RUNS))
    for line in sorted((c.removeprefix('msnlan ') for c in commands()), key=lambda l: (turn(l), 'runs/tiny' in l, l)):
        if runs != (turn(line) < len(RUNS)): continue
        key = lambda found: max((k for k in found if line.startswith(k)), key=len, default=None)
        if line.startswith('bench') and gpu_names(): continue
        monkeypatch.setattr(sys, 'argv', ['msnlan', *shlex.split(line), *SHORTER.get(key(SHORTER), [])])
        with pytest.raises(SystemExit) as end: main()
        said = capsys.readouterr()
        last = said.err.strip().splitlines()[-1:]
        fine = not end.value.code if key(CANNOT) is None else (end.value.code, last[0][:8] if last else '') == (1, 'msnlan: ')
        if not fine: wrong.append((line, end.value.code, last))
    assert not wrong, '\n'.join(map(str, wrong))


def test_python_of_the_guide():
    for code in re.findall(r'```python\n(.*?)```', (ROOT/'nbs/pages/guide.md').read_text(), re.S): exec(code, {})


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
        if '://' not in target: assert (page.parent/target).exists(), target


def test_front_page_is_short():
    assert len((ROOT/'README.md').read_text().splitlines()) <= 90, 'a screen and a half; the rest stands in the guide'
