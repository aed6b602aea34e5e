"""`any2point bench`: what is wrong is not timed, files are read back, a step's parts are found."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from any2point import Any2Point, Any2PointConfig, Source, ops
from any2point.bench import run, step_report, table, timing
from any2point.bench.cases import Case, Provider
from any2point.bench.compare import compare
from any2point.bench.costs import Cost
from any2point.bench.step import REST, Step, parts_of, profile_step
from any2point.bench.step_floor import floors
from any2point.bench.step_report import WHOLE, composed_ops, step_picture, step_table
from any2point.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = timing.Settings(seconds=0.001)
SMALL: dict[str, list[tuple[Any, ...]]] = {
    "farthest_point_sample": [(1, 64, 16)],
    "farthest_point_hierarchy": [(1, 64, (16, 8))],
    "knn": [(1, 16, 64, 5)],
    "ball_query": [(1, 16, 64, 0.5, 5)],
    "group": [(2, 32, 8, 16, 4)],
    "interpolate": [(2, 16, 8, 32, 3)],
    "voxel_cluster": [(2, 64, 0.3)],
    "segment_pool": [(64, 8, 10)],
    "virtual_project": [(2, 16, (7,), 12, 3)],
    "local_aggregate": [(64, 16, 8, 12, 12, 1)],
    "guided_aggregate": [(2, 16, 24, 3, 6, 5)],
}


@pytest.mark.parametrize("op", run.OPS)
def test_every_case_is_right_and_timed(op: str) -> None:
    make: Any = run.OPS[op]
    rows, wrong = run.measure_cases(make("cpu", SMALL[op]), "cpu", QUICK, lambda _: None)
    assert not wrong
    ours = [row for row in rows if row.provider == "any2point"]
    peers = [row for row in rows if not row.provider.startswith("any2point")]
    assert ours
    assert peers  # every op has someone to be compared with
    assert all(row.p50_us > 0 and row.floor_us > 0 and row.device for row in rows)


@pytest.mark.parametrize("over", run.SCALING)
def test_scaling(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"points": "farthest_point_sample 1,1024,256", "clouds": "group 1,1024,96 -> 512x32"}
    found = list(itertools.islice(run.scaling_cases([shapes[over].split()[0]], "cpu", over), 2))
    assert f"{found[0].op} {found[0].shape}" == shapes[over]
    assert found[1].shape != found[0].shape
    assert not any(case.backward for case in found)
    with pytest.raises(ValueError, match="op: expected one of farthest_point_sample"):
        next(run.scaling_cases(["interpolate"], "cpu", over))


def test_another_result_is_named() -> None:
    row = table.Row("knn", "other", "1,2,3", "forward", match=1.0)
    assert table.peer_name(row) == "other"
    assert table.peer_name(dataclasses.replace(row, match=0.9526)) == "other, 95.3 % equal"
    assert table.peer_name(dataclasses.replace(row, match=float("nan"))) == "other, another result"


def _case(result: Tensor, peer: Tensor) -> Case:
    def check(got: Tensor, i: int, exact: bool) -> float:
        if not torch.equal(got, torch.ones(2)):
            raise AssertionError("not ones")
        return 1.0

    providers = [Provider.plain("any2point", lambda: result), Provider.plain("peer", lambda: peer)]
    return Case("op", "2", [()], check, Cost(8), providers)


def test_wrong_results_are_not_timed() -> None:
    lines: list[str] = []
    rows, wrong = run.measure_cases([_case(torch.ones(2), torch.zeros(2))], "cpu", QUICK, lines.append)
    assert [row.provider for row in rows] == ["any2point"]
    assert not wrong
    assert any("peer: NOT TIMED: not ones" in line for line in lines)
    rows, wrong = run.measure_cases([_case(torch.zeros(2), torch.ones(2))], "cpu", QUICK, lines.append)
    assert not rows  # without a right result of ours there is nothing to compare with
    assert wrong == ["op 2: not ones"]


def test_wrong_gradients_are_not_timed() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, features: Tensor, index: Tensor) -> Tensor:
            ctx.size = features.shape
            return ops.group(features, index)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return torch.ones(ctx.size), None

    make: Any = run.OPS["group"]
    (case,) = make("cpu", SMALL["group"])
    case.providers[0] = Provider.plain("any2point", Wrong.apply)
    rows, errors = run.measure(case, "cpu", QUICK, timing.cpu())
    assert not rows
    assert "relative error" in errors["any2point"]


def test_rows_survive_files(tmp_path: Path) -> None:
    row = table.Row("knn", "any2point", "1,2,3", "forward", mem_mb=1.5, launches=3).times([1.0, 2.0, 4.0])
    table.write_csv(tmp_path / "rows.csv", [row.place(timing.cpu())])
    table.write_csv(tmp_path / "rows.csv", [row])  # the same name: replaced
    table.write_json(tmp_path / "rows.json", [row], timing.cpu())
    assert table.read_rows(tmp_path / "rows.json") == [row]
    (back,) = table.read_rows(tmp_path / "rows.csv")
    assert (back.p50_us, back.launches, back.mem_mb) == (2.0, 3, 1.5)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected what `any2point bench --json` wrote"):
        table.read_rows(tmp_path / "other.json")


def test_commands_are_noted_without_paths() -> None:
    words = ["/home/me/any2point/__main__.py", "bench", "op", "--peers", "/x", "--csv", "/y.csv", "--quick"]
    assert table.command_line(words) == "any2point bench op --peers DIR --quick"


def test_compare_finds_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, time in (("a", 10.0), ("b", 10.5), ("c", 15.0)):
        row = table.Row("knn", "any2point", "1,2,3", "forward").times([time])
        table.write_json(tmp_path / f"{name}.json", [row], timing.cpu())
    paths = [str(tmp_path / f"{name}.json") for name in "abc"]
    assert main(["bench", "compare", paths[0], paths[1]]) == 0
    assert main(["bench", "compare", paths[0], paths[2]]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["bench", "compare", paths[0], paths[2], "--threshold", "1.6"]) == 0
    assert "faster" in compare(tmp_path / "c.json", tmp_path / "a.json", 1.1)[0]
    assert main(["bench", "compare", paths[0], str(tmp_path / "none.json")]) == 2


def test_times_have_three_digits() -> None:
    texts = [table.time_text(us) for us in (0.5, 35.86, 226.6, 1084.0, 21924.0, 5.4218e6)]
    assert texts == ["0.50 us", "35.9 us", "227 us", "1.08 ms", "21.9 ms", "5,420 ms"]


@pytest.fixture(scope="module")
def model() -> Any2Point:
    torch.manual_seed(0)
    config = Any2PointConfig(num_classes=3, num_points=64, num_tokens=8, neighbors=4)
    return Any2Point(config, Source.random("bert", width=32, depth=2, heads=2))


@pytest.mark.parametrize("training", [True, False])
def test_step_is_split_into_its_parts(model: Any2Point, training: bool, tmp_path: Path) -> None:
    step = Step(model, torch.rand(2, 64, 3), "fp32", training)
    found = profile_step(step, QUICK)
    names = [name for name in parts_of(model) if training or name not in ("loss", "optimizer")]
    assert all(found.parts[name].forward > 0 for name in names), found.parts
    trained = ["local aggregation 1", "attention", "MLP", "adapter", "guided aggregation", "head"]
    assert all((found.parts[name].backward > 0) == training for name in trained), found.parts
    spent = sum(part.forward + part.backward for part in found.parts.values())
    rest = found.parts[REST]
    assert rest.forward + rest.backward < 0.4 * spent  # what is not labelled
    least = floors(step, timing.cpu())
    assert set(least) == set(parts_of(model))
    assert all(forward > 0 for name, (forward, _) in least.items() if name in trained)
    assert not any("run" in vars(module) for module in model.modules())


def test_step_rows(model: Any2Point, tmp_path: Path) -> None:
    rows = [table.Row("train step", "any2point", "bert 2,64", WHOLE, floor_us=3.0).times([10.0])]
    rows.append(table.Row("train step", "any2point", "bert 2,64", "MLP: forward", floor_us=3.0).times([8.0]))
    text = step_table(rows)
    assert "MLP" in text
    assert "200,000 clouds/s" in text
    for name in ("step.svg", "step.png"):
        step_picture(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert b"<svg" in (tmp_path / "step.svg").read_bytes()


def test_evaluations_over_the_number_of_clouds(monkeypatch: pytest.MonkeyPatch, model: Any2Point) -> None:
    monkeypatch.setattr(step_report, "_model", lambda choice, device: model)
    choice = step_report.Choice("random:bert", points=64)
    rows = step_report.measure_batches(choice, "cpu", QUICK, lambda line: None)
    assert [row.shape for row in rows] == [f"bert {1 << power},64" for power in range(5)]
    assert all(row.p50_us > 0 and row.mode == WHOLE and row.op == "eval step" for row in rows)


def test_composed_ops_give_the_same_logits(model: Any2Point) -> None:
    step = Step(model, torch.rand(2, 64, 3), "fp32", False)
    expected = step()
    with composed_ops():
        got = step()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert main(["bench", "op", "voxel_cluster", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    assert "torch unique" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["machine"]["bandwidth"] > 0
    assert {row["op"] for row in report["rows"]} == {"voxel_cluster"}
    assert main(["bench", "op", "sort"]) == 2
    assert "expected one of farthest_point_sample" in capsys.readouterr().err
