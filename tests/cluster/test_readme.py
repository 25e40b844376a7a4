"""The README's cluster section works as it is written: its blocks are read from the page and run on three
hosts."""

import re
import shutil
from pathlib import Path

import pytest

from tests.hosts import hosts
from tests.running import REPOSITORY, metrics

SECTION = re.compile(r"^## On a cluster$(.*?)^## ", re.MULTILINE | re.DOTALL)
MARK = "<!-- not run: tests/cluster/test_readme.py does, on the (?P<where>.+?) -->"
BLOCK = re.compile(rf"^{MARK}\n```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cluster_section_works_as_it_is_written(tmp_path: Path) -> None:
    section = SECTION.search((REPOSITORY / "README.md").read_text())
    assert section
    blocks = [(m["where"], m["text"]) for m in BLOCK.finditer(section[1])]
    assert [where for where, _ in blocks] == ["first of three hosts", "other two", "first host", "first host"]
    shared = tmp_path / "shared"
    with hosts(tmp_path, authenticated=False) as three:  # the section makes the token itself

        def follow(host: int, text: str) -> str:
            """Runs a block on a host, with HEAD and /shared replaced by the test's, as a reader would; its
            output."""
            text = text.replace("HEAD", three.address(0)).replace("/shared", str(shared))
            done = three.inside(host, "env", "-u", "RAY_AUTH_MODE", "bash", "-euc", text, timeout=500.0)
            assert done.code == 0, f"{text}\n{done.out}{done.err}"
            return done.out

        for where, text in blocks:
            if where == "other two":
                for host in (1, 2):
                    shutil.copy(
                        three.home(0) / ".ray" / "auth_token", three.home(host) / ".ray" / "auth_token"
                    )
                    follow(host, text)
                continue
            output = follow(0, text)
            if "doctor" in text:
                assert (
                    "3 nodes answered" in output
                    and "Ray asks for a token" in output
                    and "3 machines" in output
                )
                assert "tiny-dpo SUCCEEDED" in output
    assert len(metrics(shared / "runs" / "first")) == 100 and len(metrics(shared / "runs" / "raw")) == 10
    assert len(list((shared / "runs" / "first" / "logs").glob("learner-*.log"))) > 2
