"""Pictures of the whole: every number equals that of the map of each query, for every system; memory; a stop in the middle."""
import numpy as np
import pytest

from msnlan.correlation.interventions import contributions
from msnlan.correlation.recording import record
from msnlan.correlation.surveys import NUMBERS, survey
from test_correlation import SMALL, noise, small


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('step', [1, 4])
def test_a_survey_is_the_maps_together(name, step):
    net, image = small(name), noise(22, 13, 3)
    features, added = record(net, image), contributions(net, image)
    for call, add in list(zip(features.calls, added))[-3:]:
        s = survey(features, call, step, contribution=add if add.layer == call.layer else None)
        rows, columns = s.grid.centres()
        for i, j in (0, 0), (len(rows)//2, len(columns)//3), (-1, -1):
            point = (rows[i] - .5, columns[j] - .5)
            if not (point[0] < 21.5 and point[1] < 12.5): continue                 # beside the picture, in a layer's padding
            (m,) = features.maps([point], call)
            best = m.matches(0, 1)[0]
            top, left, h, w = m.query_box()
            for number, want in (('effective_keys', m.effective_keys[0]), ('entropy', m.entropy[0]), ('distance', m.distance[0]), ('largest', m.weights.max())):
                assert s.numbers[number][i, j] == pytest.approx(want, rel=2e-3, abs=1e-3), (number, call.layer)
            near = np.hypot(best.centre[0] - top - h/2, best.centre[1] - left - w/2)
            if m.matches(0, 2)[-1].weight < best.weight*(1 - 1e-4): assert s.numbers['best_distance'][i, j] == pytest.approx(near, abs=1e-3)
            own = sum(level[0][k.cell(top + h/2, left + w/2)] for level, k in zip(m.levels, m.keys))
            assert s.numbers['self_match'][i, j] == pytest.approx(own, rel=2e-3, abs=1e-6)
        assert set(s.numbers) >= set(NUMBERS) - {'contribution'} and s.on_picture('entropy').shape == (22, 13)


def test_what_tell_raises_ends_the_survey_and_parts_grow():
    features, heard = record(small('csnln'), noise(40, 40, 3)), []
    survey(features, 0, tell=heard.append, step=5)
    assert heard == sorted(heard) and heard[-1] == 1 and len(heard) > 2
    def stop(part): raise InterruptedError
    with pytest.raises(InterruptedError): survey(features, 0, tell=stop)


def test_files_hold_the_numbers(tmp_path):
    s = survey(record(small('msnlan'), noise(9, 8, 3)), 0)
    with np.load(s.save(tmp_path/'a.npz')) as f:
        np.testing.assert_array_equal(f['entropy'], s.numbers['entropy'])
        assert f['rows'][0] == .5 and str(f['layer']) == s.layer
