"""The comparison of two commits: what counts as worse, and that seeds are compared one by one."""

import json
from pathlib import Path

import pytest

from benchmarks import compare


def runs(seconds: list[float], **more: object) -> list[list[dict[str, object]]]:
    return [
        [{"rows": 7, "fit_s": value, "torch_func_s": 10 * value, "network_rmse": value, **more}] for value in seconds
    ]


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([1.0, 1.1, 0.9], [1.3, 1.5, 1.2], "worse"),
        ([1.3, 1.5, 1.2], [1.0, 1.1, 0.9], "better"),
        ([1.0, 1.4, 0.9], [1.3, 1.5, 1.2], ""),
        ([1.0, 1.01, 0.99], [1.05, 1.06, 1.07], ""),
    ],
)
def test_worse_is_what_no_old_run_reaches_by_more_than_a_tenth(old: list, new: list, verdict: str) -> None:
    (found,) = compare.differences(runs(old), runs(new, solver="CG"))
    assert (found.where, found.column, found.verdict) == ("7", "fit_s", verdict)
    assert found.ratio == pytest.approx(sorted(new)[1] / sorted(old)[1])


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def rows(tree: Path, suite: str, threads: int) -> list[dict[str, float]]:
        order.append(tree.name)
        return [{"fit_s": float(len(order))}]

    monkeypatch.setattr(compare, "rows_of", rows)
    (found,) = compare.compare(Path("old"), Path("new"), "any", 3, 1)
    assert order == ["old", "new", "new", "old", "old", "new"]
    assert (found.old, found.new) == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])


def test_a_suite_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "run.py").write_text("raise ValueError('as expected')")
    with pytest.raises(SystemExit, match=r"(?s)suite 'gram' failed.*ValueError: as expected"):
        compare.rows_of(tmp_path, "gram", 1)


def test_seeds_are_compared_one_by_one() -> None:
    def records(shift: float) -> list[dict[str, object]]:
        # A spread over seeds of 10, of which nothing is left in the differences but 0.1.
        values = [1.0, 11.0, 21.0]
        return [
            {"size": 5, "seed": s, "method": "m", "RMSE": v + shift * (1 + 0.1 * s), "accuracy": -v}
            for s, v in enumerate(values)
        ]

    for shift, verdict in ((0.5, "worse"), (-0.5, "better")):
        rmse, accuracy = compare.paired(records(0.0), records(shift))
        assert rmse["was"] == 11
        assert rmse["difference"] == pytest.approx(shift * 1.1)
        assert rmse["± difference"] == pytest.approx(abs(shift) * 0.1 / 3**0.5)
        assert rmse["verdict"] == verdict
        assert accuracy["verdict"] == ""


def test_tables_of_a_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    stored = compare.RESULTS / "transfer-cstr.json"
    (tmp_path / stored.name).write_text(stored.read_text())
    monkeypatch.setattr("sys.argv", ["compare", "--tables", str(tmp_path)])
    compare.main()
    printed = capsys.readouterr().out
    assert printed.startswith("transfer-cstr\n")
    assert "worse" not in printed
    assert len(printed.splitlines()) > len({r["method"] for r in json.loads(stored.read_text())["records"]})
