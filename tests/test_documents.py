"""README and guide: the commands are commands, the Python runs, the links lead somewhere, the size is that of a front page."""
import re, shlex
import pytest, typer
from conftest import ROOT
from msnlan.cli import app, parse_parameters
from msnlan.reproduce.presets import load_preset
from msnlan.reproduce.runs import check_parameters, notebook_path

PAGES = [ROOT/'README.md', *sorted((ROOT/'nbs/pages').glob('*.md'))]
NOTEBOOKS = dict(train='train', evaluate='evaluate', attention='attention_maps', tables='paper_tables')


def commands():
    blocks = [b for p in PAGES for b in re.findall(r'```sh\n(.*?)```', p.read_text(), re.S)]
    return sorted({l.split('  #')[0].strip() for b in blocks for l in b.splitlines() if l.startswith('msnlan ')})


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


def test_there_are_commands(): assert len(commands()) > 15


def test_python_of_the_guide():
    for code in re.findall(r'```python\n(.*?)```', (ROOT/'nbs/pages/guide.md').read_text(), re.S): exec(code, {})


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
        if '://' not in target: assert (page.parent/target).exists(), target


def test_front_page_is_short():
    assert len((ROOT/'README.md').read_text().splitlines()) <= 90, 'a screen and a half; the rest stands in the guide'
