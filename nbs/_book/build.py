"""`make book`: copy the notebooks aside, let Sphinx build them, say where the pages are."""
import argparse, shutil, subprocess, sys, tempfile
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1]/'tests')]
from readme import networks, photograph   # what the front page takes from cards and benchmarks


def for_readers(path:Path):
    "Take out of a copied notebook what speaks to nbdev only: directives, hidden cells"
    nb = nbformat.read(path, 4)
    hidden = lambda c: c.cell_type == 'raw' or c.source.startswith(('#| hide', '#| default_exp')) or not c.source.strip()
    nb.cells = [c for c in nb.cells if not hidden(c)]
    for c in nb.cells:
        if '<!-- networks -->' in c.source: c.source = c.source.replace('<!-- networks -->', networks())
        if '<!-- photograph -->' in c.source: c.source = c.source.replace('<!-- photograph -->', photograph())
        if c.cell_type == 'code': c.source = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#| '))
    nbformat.write(nb, path)


def build(out:Path)->int:   # Sphinx's exit status
    "Build the book into `out`; the notebooks themselves are not touched"
    with tempfile.TemporaryDirectory() as d:
        source = Path(d)/'nbs'
        shutil.copytree(HERE.parent, source, ignore=shutil.ignore_patterns('_book', '.ipynb_checkpoints', 'Snakefile'))
        for path in source.rglob('*.ipynb'): for_readers(path)
        return subprocess.run([sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-c', str(HERE), str(source), str(out)]).returncode


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--out', type=Path, default=HERE.parents[1]/'_docs/book')
    out = ap.parse_args().out
    status = build(out)
    if not status: print(f'The book: {out/"contents.html"}')
    sys.exit(status)
