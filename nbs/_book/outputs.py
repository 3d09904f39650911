"""`make notebooks`: run the reading notebooks and keep their pictures and tables; `--check` says which are out of date.

A notebook is current when the hash of its code is the one that its outputs were made from: pictures differ by bytes between machines."""
import argparse, base64, hashlib, io, json, os, sys
from pathlib import Path

import nbformat

NBS = Path(__file__).parents[1]
READING = ['01_images', '02_degradations', '04_inference', 'explore', 'attention/00_definition', 'attention/02_cpu', 'attention/07_gpu',
           'attention/08_operator', 'models/01_layers', 'correlation/01_drawing', 'correlation/02_recording', 'correlation/05_figures',
           'correlation/04_comparison', 'reproduce/09_story']
LIMIT = 150_000   # bytes of outputs in a notebook


def code_hash(nb)->str:   # 16 hexadecimal digits
    "Hash of all code cells"
    return hashlib.sha256('\n'.join(c.source for c in nb.cells if c.cell_type == 'code').encode()).hexdigest()[:16]


def smaller(png:str, colours:int=240)->str:   # base64
    "A picture with few colours, as figures have them; the same where that is no smaller"
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').quantize(colours, Image.Quantize.MAXCOVERAGE).save(out, 'PNG', optimize=True)
    return min(base64.b64encode(out.getvalue()).decode(), png.strip(), key=len)


def tidy(output):   # an output, or none where it is of no use to a reader
    "Keep pictures, tables and printed text; drop warnings, widgets and what repeats a picture in words"
    if output.output_type == 'stream': return output if output.name == 'stdout' and output.text.strip() else None
    if output.output_type not in ('display_data', 'execute_result'): return output
    data = output.data
    widget = data.pop('application/vnd.jupyter.widget-view+json', None)
    if widget or 'image/png' in data: data.pop('text/plain', None)
    if 'image/png' in data: data['image/png'] = smaller(data['image/png'])
    output.metadata = {}
    return output if data else None


def size(nb)->int:   # bytes
    "Of the outputs, and of what they left in the notebook's metadata"
    return sum(len(json.dumps(c.get('outputs', []))) for c in nb.cells) + len(json.dumps(nb.metadata))


def run(path:Path):
    "Execute a notebook and keep its outputs in it"
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    os.environ.update(MPLBACKEND='module://matplotlib_inline.backend_inline', MSNLAN_OFFLINE='1')
    # a figure made without pyplot is shown as a picture only where the kernel does so from the start
    NotebookClient(nb, timeout=300, kernel_name='python3', extra_arguments=['--matplotlib=inline'],
                   resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for c in nb.cells:
        c.metadata.pop('execution', None)
        if c.cell_type != 'code': continue
        c.execution_count, c.outputs = None, [t for o in c.outputs if (t := tidy(o)) is not None]
        for o in c.outputs:
            if 'execution_count' in o: o.execution_count = None
    for useless in ('language_info', 'widgets'): nb.metadata.pop(useless, None)   # the second is state of widgets that are not kept
    if size(nb) > LIMIT: raise SystemExit(f'{path.name}: outputs of {size(nb):,} bytes; expected at most {LIMIT:,}: smaller pictures')
    words = [o.get('data', {}).get('text/plain', '') for c in nb.cells for o in c.get('outputs', [])]
    if any(w.startswith('<Figure') for w in words): raise SystemExit(f'{path.name}: a figure was kept in words, not as a picture')
    nb.metadata['msnlan'] = dict(outputs=code_hash(nb))
    nbformat.write(nb, path)


def stale(path:Path)->str:   # what is wrong; empty where nothing is
    "Whether the outputs of a notebook are those of its code"
    nb = nbformat.read(path, 4)
    kept = nb.metadata.get('msnlan', {}).get('outputs')
    if kept is None: return 'has never kept outputs'
    if not any(c.get('outputs') for c in nb.cells): return 'has lost its outputs'
    return '' if kept == code_hash(nb) else 'has outputs of older code'


def main(args=None)->int:
    "The command"
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('names', nargs='*', help='notebooks below nbs, without ending; none: those that are out of date')
    ap.add_argument('--check', action='store_true')
    a = ap.parse_args(args)
    paths = [NBS/f'{n}.ipynb' for n in a.names or READING]
    old = {p: why for p in paths if (why := stale(p)) or a.names}
    if a.check:
        for p, why in old.items(): print(f'{p.relative_to(NBS)} {why}: make notebooks', file=sys.stderr)
        return bool(old)
    for p in old: print(p.relative_to(NBS), flush=True); run(p)
    return 0


if __name__ == '__main__': sys.exit(main())
