"""The lint names what leaves the Neural Engine, and nothing else."""

import numpy as np
import pytest

from snapgen_core.export.lint import lint, summary
from mlprograms import IOS17, mb, normal, saved


def found(folder, body, arrays):
    return [(finding.op_type, finding.reason, finding.leaves) for finding in lint(saved(folder, body, arrays, IOS17)) if finding.op_type != "const" or "beyond" in finding.reason]


def half(*shape):
    return normal(*shape).astype(np.float16)


def test_what_the_engine_likes_is_clean(tmp_path):
    assert found(tmp_path, lambda a: mb.relu(x=a), [half(1, 8, 1, 64)]) == []


@pytest.mark.parametrize(
    ("body", "arrays", "reason", "leaves"),
    [
        (lambda a: mb.relu(x=a), [normal(1, 8, 1, 64)], "computes in fp32", True),
        (lambda a: mb.relu(x=a), [half(1, 8, 4, 8)], "rows of 16 bytes, padded to 64", False),
        (lambda a: mb.cumsum(x=a, axis=1), [half(1, 64)], "one after the other", True),
        (lambda a: mb.gather(x=a, indices=[0, 2], axis=0), [half(4, 64)], "looks up a table", True),
        (lambda a: mb.add(x=a, y=np.float16(np.inf)), [half(1, 64)], "infinite in 16 bits", True),
    ],
)
def test_each_rule(tmp_path, body, arrays, reason, leaves):
    findings = found(tmp_path, body, arrays)
    assert findings and all(reason in told and left == leaves for _, told, left in findings), findings


def test_a_summary_counts(tmp_path):
    lines = summary(lint(saved(tmp_path, lambda a: mb.relu(x=mb.relu(x=a)), [normal(1, 8, 1, 64)], IOS17)))
    assert lines == [lines[0]] and lines[0].startswith("2 x relu: computes in fp32; first ")
