"""A page for every module of the package, from its source: signature, docstring, and the comment beside each argument (docments)."""
import ast, io, re, tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[2]/'msnlan'


def comments(source:str)->dict:   # line -> text
    "The comment at the end of each line"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}


def plain(text:str)->str:
    "Text as MyST that shows it as it is: nothing outside of backticks is markup; an example of a command is code"
    parts = re.split('(`[^`]*`)', re.sub('^Example: (.*)$', r'Example: `\1`', text, flags=re.M))
    return ''.join(p if p.startswith('`') else re.sub(r'([<*_$\[\]])', r'\\\1', p) for p in parts)


def annotated(node, said:dict)->tuple:   # its text, the help of a command's option
    "What an annotation says; `Annotated`, by itself or under a name of the module, as type and help"
    node = said.get(getattr(node, 'id', None), node)
    if getattr(getattr(node, 'value', None), 'id', None) != 'Annotated': return (ast.unparse(node) if node else ''), ''
    kind, option = node.slice.elts[:2]
    return ast.unparse(kind), next((ast.literal_eval(k.value) for k in option.keywords if k.arg == 'help'), '')


def arguments(f:ast.FunctionDef, said:dict)->list:   # of (name, type, default, meaning)
    "What a function takes"
    a, out = f.args, []
    given = [None]*(len(a.args) - len(a.defaults)) + a.defaults
    both = [*zip(a.args, given), *zip(a.kwonlyargs, a.kw_defaults)]
    both += [(x, None) for x in (a.vararg, a.kwarg) if x]
    last = {arg.lineno: arg for arg, _ in both}              # a line's comment is about the last argument on it
    for arg, default in both:
        if arg.arg in ('self', 'cls'): continue
        mine = said.get(arg.lineno, '') if last[arg.lineno] is arg and arg.lineno != f.lineno else ''
        kind, help = annotated(arg.annotation, said)
        out.append((arg.arg, kind, ast.unparse(default) if default else '', mine or help))
    return out


def entry(node, said:dict, level:int=2)->list:   # lines of MyST
    "A function or a class with its methods"
    mark, doc = '#'*level, ast.get_docstring(node) or ''
    kind = 'class' if isinstance(node, ast.ClassDef) else 'def'
    lines = [f'{mark} `{kind} {node.name}`', '', plain(doc), '']
    f = node
    if kind == 'class': f = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == '__init__'), None)
    rows = arguments(f, said) if f else []
    if rows:
        cell = lambda s: s.replace('|', r'\|').replace('\n', ' ')
        code = lambda s: f'`{cell(s)}`' if s else ''
        lines += ['| argument | type | default | meaning |', '| --- | --- | --- | --- |']
        lines += [f'| `{n}` | {code(t)} | {code(d)} | {cell(plain(m))} |' for n, t, d, m in rows] + ['']
    if f is not None and kind == 'def' and f.returns:
        meaning = said.get(f.returns.end_lineno, '') if f.returns.lineno != f.lineno else ''
        lines += [f'Returns `{ast.unparse(f.returns)}` {plain(meaning)}', '']
    if kind == 'class':
        for m in node.body:
            if isinstance(m, ast.FunctionDef) and not m.name.startswith('_') and ast.get_docstring(m):
                lines += [f'* `{m.name}({", ".join(x[0] for x in arguments(m, said))})`: {plain(" ".join(ast.get_docstring(m).split()))}']
        lines.append('')
    return lines


def page(path:Path)->str:
    "The page of a module; empty for one that exports nothing"
    source = path.read_text()
    tree, said = ast.parse(source), comments(source)
    said |= {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.value).startswith('Annotated[')}
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
    if not public: return ''
    name = '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
    return '\n'.join([f'# {name}', '', plain(ast.get_docstring(tree) or ''), '', *(l for n in public for l in entry(n, said))])


WINGS = ['', 'attention', 'data', 'models', 'training', 'evaluation', 'correlation', 'reproduce', 'benchmarks']

def write(app):
    "Before Sphinx reads: `api/*.md`, and the table of contents"
    top = Path(app.srcdir)
    if (api := top/'api').is_dir(): [p.unlink() for p in api.glob('*.md')]
    api.mkdir(exist_ok=True)
    names = {w: [] for w in WINGS}
    for w in WINGS:
        for path in sorted((PACKAGE/w).glob('*.py')):
            if path.name.startswith('_') or not (text := page(path)): continue
            name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
            (api/f'{name}.md').write_text(text)
            names[w].append(f'api/{name}')
    tree = lambda caption, items, depth=1: ['```{toctree}', f':caption: {caption}', f':maxdepth: {depth}', '', *items, '```', '']
    notebooks = lambda w: [str(p.relative_to(top).with_suffix('')) for p in sorted((top/w).glob('*.ipynb')) if p.stem != 'index']
    lines = ['# msnlan', '', 'Single-image super-resolution with non-local attention: exact, measured, reproducible.', '',
             *tree('Start', ['index', 'explore', *[str(p.relative_to(top).with_suffix('')) for p in sorted((top/'pages').glob('*.md'))]]),
             *tree('Top level', notebooks(''))]
    lines = [l for i, l in enumerate(lines) if not (l in ('index', 'explore') and l in lines[:i])]
    for w in WINGS[1:]: lines += tree(w.capitalize(), [f'{w}/index', *notebooks(w)])
    lines += tree('Experiments', notebooks('experiments'))
    lines += tree('API', [n for w in WINGS for n in names[w]])
    (top/'contents.md').write_text('\n'.join(lines))


def setup(app):
    "Sphinx calls this"
    app.connect('builder-inited', write)
    return dict(parallel_read_safe=True)
