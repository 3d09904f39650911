"""README.md is nbs/index.ipynb: `python tests/readme.py --write` writes it, `--check` says whether it is current."""
import json, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def networks()->str:
    "The shipped networks as a table, from the cards beside their weights: a row a network and task, its scores on the first set"
    from msnlan.basics import markdown_table
    from msnlan.degradations import TASKS
    from msnlan.models.cards import shipped_rows
    found = {}
    for r in sorted(shipped_rows(), key=lambda r: list(TASKS).index(r['task'])):
        name = re.fullmatch(r'(.+?-tiny)-.+', r['name'])[1]
        s = next(iter(r['scores']), None)
        said = f"{s['setting']} {s['psnr']:.2f} ({s['bicubic_psnr']:.2f})" if s else 'not measured yet'
        found.setdefault((name, TASKS[r['task']]['title'], s['dataset'] if s else ''), []).append((r['parameters'], said))
    size = lambda rows: '-'.join(sorted({f'{n/1000:.0f}' for n in (min(rows)[0], max(rows)[0])})) + ' k'
    return markdown_table(['name', 'parameters', 'task', 'set', 'PSNR (dB)'],
                          [[f'`{name}`', size(rows), task, data, ', '.join(said for _, said in rows)] for (name, task, data), rows in found.items()])


def photograph()->str:
    "What a photograph takes, of the largest sizes that the benchmark ran in tiles and whole; beyond, its forecast"
    run = json.loads((ROOT/'reports/benchmarks/photo-cpu.json').read_text())
    rows = {(r['width'], r['height'], r['method']): r for r in run['rows']}
    w, h, _ = max(k for k in rows if k[2] == 'ours' and (*k[:2], 'authors') in rows)
    ours, theirs, m = rows[w, h, 'ours'], rows[w, h, 'authors'], run['machine']
    whole = max((r for r in run['rows'] if r['method'] == 'whole'), key=lambda r: r['width']*r['height'])
    more = max((r for r in run['left_out'] if r['method'] == 'whole'), key=lambda r: r['width']*r['height'], default=None)
    beyond = more and (f"; {more['width']}x{more['height']} whole was not run: about {more['cpu_seconds']/60:.0f} min"
                       + (f" and {more['peak_mb']/1000:.1f} GB" if 'peak_mb' in more else '') + ' by forecast')
    time = lambda s: f'{s:.0f} s' if s < 600 else f'{s/60:.0f} min'
    room = lambda mb: f'{mb:.0f} MB' if mb < 1000 else f'{mb/1000:.1f} GB'
    return (f"A photograph of {w}x{h} pixels takes `{m['model']}` x{m['scale']} {time(ours['cpu_seconds'])} of a processor ({m['cpu']}) and "
            f"{room(ours['peak_mb'])} in our tiles,\n{time(theirs['cpu_seconds'])} and {room(theirs['peak_mb'])} in the authors'. "
            f"Whole, {whole['width']}x{whole['height']} takes {time(whole['cpu_seconds'])} of a processor, {time(whole['seconds'])} on "
            f"{m['threads']} cores, and {room(whole['peak_mb'])}{beyond or ''}\n"
            '([all sizes](reports/benchmarks/photo-cpu.md)).')


def hostile()->str:
    "What damaged and odd files did, all that `tests/test_hostile.py` makes"
    run = json.loads((ROOT/'reports/benchmarks/hostile.json').read_text())
    right, refused = [sum(n for k, n in run['count'].items() if k.endswith(word)) for word in ('right', 'refused')]
    return (f"{run['files']:,} damaged and odd files went through `upscale`, `restore`, `score`, the explorer's upload and `load_model`: {right:,} results,\n"
            f"{refused:,} refusals of one line, {len(run['wrong']) or 'no'} other outcome{'s' if len(run['wrong']) != 1 else ''} "
            '([which files](tests/hostile.py), [counts](reports/benchmarks/hostile.json)).')


def readme()->str:
    "The text of README.md, from the cells of the index notebook that are not hidden"
    nb = nbformat.read(ROOT/'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type != 'raw' and '#| hide' not in c.source and '#| default_exp' not in c.source]
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = []
    nb.metadata.language_info = dict(name='python')
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = text.replace('](images/', '](nbs/images/')   # pictures lie beside the notebook
    text = text.replace('<!-- networks -->', networks()).replace('<!-- photograph -->', photograph()).replace('<!-- hostile -->', hostile())
    return '<!-- Written from nbs/index.ipynb by `make readme`. -->\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    path = ROOT/'README.md'
    if '--write' in sys.argv: path.write_text(readme(), encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != readme():
        sys.exit('README.md is not what nbs/index.ipynb says: make readme writes it')
