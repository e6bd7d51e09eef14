"""An operand is added in the schema's bundle and in the backends that use it, as
docs/extending.md says, and nowhere else.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROBE = """
import torch
from alphacl_fast import ops
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term
from alphacl_fast.functional import alpha_cl_loss
z1, z2 = torch.randn(2, 9, 4, dtype=torch.float64)
truth = alpha_cl_loss(z1, z2, backend="reference")
for backend in (name for name, reason in ops.backends().items() if reason is None):
    torch.testing.assert_close(alpha_cl_loss(z1, z2, backend=backend), truth)  # without the operand
bucket, zero = torch.tensor([0, 1, 1, 0, 2, 0, 1, 2, 0], dtype=torch.int32), z1.new_zeros(9)
function = PairFunction("exp", (), torch.tensor(0.5, dtype=torch.float64))
operands = Rows(z1), Pairing(0, 0, 9, bucket=bucket), function, RowScalars(zero)
shift, total = ops.row_sums(*operands, (Term.SHIFT, Term.F), "", "blocked")
excluded = (bucket[:, None] != bucket) | torch.eye(9, dtype=torch.bool)
t = (z1 @ z1.t() / 0.5).masked_fill(excluded, -torch.inf)
torch.testing.assert_close(shift + total.log(), t.logsumexp(1))
place = torch.device("cpu"), torch.float64, None, "exp", ("bucket",)
print(ops.choose("auto", *place)[0], ops.unsupported("cpu", *place))
"""


def test_an_operand_is_added_where_the_documents_say(tmp_path):
    shutil.copytree(
        ROOT / "alphacl_fast",
        tmp_path / "alphacl_fast",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for folder in ("kernels", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    text = (ROOT / "docs" / "extending.md").read_text()
    section = text[text.index("## Add an operand") : text.index("## Add a backend")]
    blocks = re.findall(r"```diff\n--- (\S+)\n(.*?)```", section, re.DOTALL)
    assert {name for name, _ in blocks} == {
        "alphacl_fast/bundles.py",
        "alphacl_fast/backend/blocked.py",
    }
    for name, diff in blocks:
        lines = diff.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        source = (tmp_path / name).read_text()
        assert source.count(old) == 1, (
            f"docs/extending.md shows lines that {name} does not have:\n{old}"
        )
        (tmp_path / name).write_text(source.replace(old, new))
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked bucket: not in this backend; use blocked"
