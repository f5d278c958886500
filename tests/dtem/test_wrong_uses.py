import shlex
from pathlib import Path

import pytest

from dtem.main import main
from tests.dtem.wrong_uses import WRONG_USES, make_workspace

# They end the process, or start several.
ALONE = ("store to serve that is missing",)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    make_workspace(folder)
    return folder


@pytest.mark.parametrize("use", [use for use in WRONG_USES if use not in ALONE])
def test_wrong_use_ends_with_one_line_and_leaves_nothing(
    use: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    arguments, message = WRONG_USES[use]
    assert main(shlex.split(arguments)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("dtem")
    assert message in line
    assert "Traceback" not in line
    assert sorted(path.name for path in Path("store").glob("*/*")) == ["1"]
