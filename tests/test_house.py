"""The house is in order: exported code, clean notebooks, README and rules that a reader relies on."""
import ast, json, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest
from conftest import ROOT
import readme

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted((ROOT/'msnlan').rglob('*.py'))
FIRST_ROOMS = ['images', 'degradations', 'metrics', 'inference']
FIRST_WINGS = ['attention', 'data', 'models', 'training']


def copy_of_house(tmp_path)->Path:
    "A copy of notebooks and package, so that checks change nothing here"
    for name in ('nbs', 'msnlan'):
        shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py'): shutil.copyfile(ROOT/name, tmp_path/name)
    return tmp_path


def nbdev(command, folder):
    run = subprocess.run([sys.executable, '-c', f'from nbdev.{command[0]} import {command[1]} as f; f()'], cwd=folder,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def test_package_is_what_the_notebooks_export(tmp_path):
    house = copy_of_house(tmp_path)
    for p in (house/'msnlan').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    nbdev(('doclinks', 'nbdev_export'), house)
    files = lambda root: {str(p.relative_to(root/'msnlan')): p.read_text() for p in (root/'msnlan').rglob('*.py')}
    made, kept = files(house), files(ROOT)
    assert sorted(made) == sorted(kept), 'modules without a notebook, or notebooks not exported: nbdev_export'
    assert [n for n in made if made[n] != kept[n]] == [], 'edited by hand or not exported: nbdev_update, then nbdev_export'


def test_notebooks_are_clean(tmp_path):
    house = copy_of_house(tmp_path)
    nbdev(('clean', 'nbdev_clean'), house)
    changed = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if json.loads((house/p.relative_to(ROOT)).read_text()) != json.loads(p.read_text())]
    assert changed == [], 'nbdev_clean cleans them'


def test_reading_notebooks_keep_what_their_code_made():
    "By the hash of the code; `make notebooks` runs those that are out of date"
    sys.path.insert(0, str(ROOT/'nbs/_book'))
    try: import outputs
    finally: sys.path.pop(0)
    for name in outputs.READING:
        path = ROOT/f'nbs/{name}.ipynb'
        assert outputs.stale(path) == '', name
        assert outputs.size(nbformat.read(path, 4)) <= outputs.LIMIT, name


def test_readme_is_current():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme.readme(), 'make readme writes it'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_exported_code_keeps_the_house_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    imported = {(n.module or '') if isinstance(n, ast.ImportFrom) else a.name for n in ast.walk(tree)
                if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert not {m for m in imported if m.split('.')[0] in ('nbdev', 'fastcore')}, 'exported code imports neither nbdev nor fastcore'
    stars = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names)]
    assert stars == [], 'no star imports'
    if path.name == '_modidx.py': return
    long = [i for i, l in enumerate(text.splitlines(), 1) if i > 1 and len(l) > 120 and not l.startswith('__all__')]
    assert long == [], f'lines too long: {long}'
    undocumented = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_') and not ast.get_docstring(n)]
    assert undocumented == [], f'public names without a docstring: {undocumented}'


def test_first_rooms_need_no_notebook_tools():
    "Batch machines have no papermill, pooch or nbdev: these rooms must import without them"
    code = ('import sys\nfor m in ("papermill","nbdev","fastcore","pooch","anywidget","snakemake","typer","jupyter_client","ipywidgets"): sys.modules[m] = None\n'
            'import importlib, pkgutil, msnlan\n'
            f'for m in {FIRST_ROOMS!r}: importlib.import_module(f"msnlan.{{m}}")\n'
            f'for w in {FIRST_WINGS!r}:\n'
            '    wing = importlib.import_module(f"msnlan.{w}")\n'
            '    for m in pkgutil.iter_modules(wing.__path__): importlib.import_module(f"msnlan.{w}.{m.name}")')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_experiment_has_annotated_parameters():
    for path in (ROOT/'nbs/experiments').glob('*.ipynb'):
        cells = [c for c in nbformat.read(path, as_version=4).cells if 'parameters' in c.metadata.get('tags', [])]
        assert len(cells) == 1, f'{path.name}: expected one cell tagged parameters'
        for line in cells[0].source.splitlines():
            assert line.startswith(' ') or not line.strip() or ('#' in line and ':' in line.split('=')[0]), f'{path.name}: not annotated: {line}'


@pytest.mark.parametrize('path', sorted((ROOT/'nbs/experiments').glob('*.ipynb')), ids=lambda p: p.name)
def test_experiments_hold_no_untested_logic(path):
    "What can be wrong by itself is a function of a module, with its check below it; here it is called. No line over 110"
    for i, c in enumerate(nbformat.read(path, as_version=4).cells):
        long = [l for l in c.source.splitlines() if len(l) > 110]
        assert long == [], f'cell {i}: {long}'
        if c.cell_type != 'code': continue
        tree = ast.parse('\n'.join(l for l in c.source.splitlines() if not l.startswith(('%', '!'))))
        defined = [n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        assert defined == [], f'cell {i} defines {defined}: into a module, with a test'
        assert not any(isinstance(n, ast.While) for n in ast.walk(tree)), f'cell {i} has a loop without end'


def unchecked(path:Path)->list:   # of runs: a name for each cell
    "Runs of more than three exported cells without a check below; a class of data alone is not counted"
    runs, run = [], []
    for c in nbformat.read(path, as_version=4).cells:
        if c.cell_type != 'code': continue
        if c.source.startswith('#| export'):
            made = [n.name for n in ast.parse(c.source).body if isinstance(n, ast.FunctionDef)
                    or isinstance(n, ast.ClassDef) and any(isinstance(m, ast.FunctionDef) for m in n.body)]
            run += made[:1]
        elif 'test_' in c.source or 'assert' in c.source: runs.append(run); run = []
    return [r for r in [*runs, run] if len(r) > 3]


def test_a_check_stands_under_what_it_checks():
    "Never more than three exported cells without one"
    found = {str(p.relative_to(ROOT)): r for p in NOTEBOOKS if not {'experiments', '_book'} & {*p.parts} and (r := unchecked(p))}
    assert found == {}, 'a short check directly under one of them, see CONTRIBUTING.md'


def test_no_large_files_and_no_local_paths():
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip('not a git checkout')
    for name in filter(None, files.stdout.split('\0')):
        path = ROOT/name
        if not path.exists(): continue
        assert path.stat().st_size <= (8 if name.startswith('msnlan/weights/') else 1)*2**20, f'{name} is too large'


ROLES = {'METHODS', 'as_markdown', 'benchmark', 'main', 'measure'}   # what every benchmark has under the same name


def test_a_public_name_is_defined_in_one_room():
    "Except for commands, which are called after what they call, and for the same parts of every benchmark"
    rooms = {}
    for path in MODULES:
        room = str(path.relative_to(ROOT/'msnlan'))[:-3]
        if room in ('_modidx', 'cli') or path.name.startswith('__'): continue
        for n in ast.parse(path.read_text()).body:
            targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
            names = [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): names = [n.name]
            for name in names:
                if not name.startswith('_') and not (name in ROLES and room.startswith('benchmarks/')): rooms.setdefault(name, set()).add(room)
    assert {name: where for name, where in rooms.items() if len(where) > 1} == {}
