"LaTeX tables compile as they are."
import shutil, subprocess
import pandas as pd, pytest
from conftest import ROOT
from msnlan.evaluation.tables import write_table

WHOLE = r"""\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\tiny
%s
\end{document}"""


def compiles(text, folder):
    (folder/'t.tex').write_text(WHOLE % text)
    run = subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 't.tex'], cwd=folder, capture_output=True, text=True, errors='replace')
    assert run.returncode == 0 and (folder/'t.pdf').is_file(), run.stdout[-2000:]


@pytest.mark.skipif(not shutil.which('pdflatex'), reason='no pdflatex here: texlive-latex-recommended has it')
def test_tables_compile(tmp_path):
    odd = pd.DataFrame({'method': ['a_b & c%', 'x^2 ~ {y} #1 $'], 'Set5 x2': ['37.53 / 0.9589', '37.23 / 0.9574'], r'back\slash': ['', '±']})
    write_table(odd, tmp_path, 'odd', 'A caption with 95 % and _', marks=[[(), (0, 1), ()], [(), (1, 0), ()]], groups=['', 'x2', 'x2'])
    compiles((tmp_path/'odd.tex').read_text(), tmp_path)
    written = sorted((ROOT/'reports').glob('**/tables/*.tex'))
    assert written
    compiles('\n\\clearpage\n'.join(p.read_text() for p in written), tmp_path)
