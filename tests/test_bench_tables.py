"""The project's own benchmarks: what is said about figures follows from them, and a run takes them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(BENCH))

import compare  # noqa: E402
import contenders  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import works  # noqa: E402

# A library of the plots would start a thread for each processor, to the end of this process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

pytestmark = pytest.mark.alone

MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "kernel": "Linux 6",
    "python": "CPython 3.13.0",
    "fastserve": "0.1",
    "commit": "abcdef+",
    "date": "2026-01-01",
    "packages": {"uvloop": "1.0", "gevent": None},
    "compiler": "cc 12",
    "go": "",
}


def server(name: str, family: str, cpu: Sequence[float], model: str = "", **figures: Any) -> dict[str, Any]:
    common = {"requests_per_second": 1000.0, "p99_us": 50.0, "errors": 0, "generator_saturated": False, **figures}
    return {"name": name, "family": family, "model": model, "rounds": [{**common, "cpu_us": each} for each in cpu]}


def work(*servers: dict[str, Any], title: str = "echo", connections: int = 50, **others: Any) -> dict[str, Any]:
    return {
        "name": title,
        "title": title,
        "kind": "echo",
        "connections": connections,
        "curve": True,
        "table": True,
        "limit": "raw C",
        "reference": "stdlib threading",
        "servers": list(servers),
        "missing": [],
        **others,
    }


def result(*found: dict[str, Any]) -> dict[str, Any]:
    return {"machine": MACHINE, "rounds": 3, "seconds": 0.4, "works": list(found)}


RAW = server("raw C", "limit", [2.0, 4.0, 2.0], generator_saturated=True)
STDLIB = server("stdlib threading", "stdlib", [6.0, 12.0, 7.0], "threading")
C_CORE = server("fastserve C threading", "fastserve", [3.0, 6.0, 3.0], "threading")
TWIN = server("fastserve Python threading", "fastserve", [9.0, 15.0, 9.0], "threading", errors=2)
UVLOOP = server("uvloop Protocol", "other", [2.5, 7.0, 2.0])
ECHO = work(STDLIB, RAW, TWIN, C_CORE, UVLOOP)


def test_rows_begin_with_the_least_cpu_time() -> None:
    names = [row.name for row in report.rows(ECHO)]
    assert names == [
        "raw C",
        "uvloop Protocol",
        "fastserve C threading",
        "stdlib threading",
        "fastserve Python threading",
    ]


def test_ratios_are_of_paired_rounds_not_of_medians() -> None:
    row = report.rows(work(RAW, server("x", "other", [8.0, 4.0, 3.0]), STDLIB))[1]
    assert row.to_limit is not None
    assert (row.to_limit.low, row.to_limit.high) == (1.0, 4.0)
    assert row.to_limit.mean == pytest.approx(6 ** (1 / 3))  # of 4, 1 and 1.5; the medians' ratio is 2


def test_the_table_of_a_work_tells_figures_errors_marks_and_what_is_missing() -> None:
    missing = [{"name": "gevent", "reason": "gevent | is not installed"}]
    lines = report.work_table({**ECHO, "missing": missing}).splitlines()
    assert lines[0].startswith("| server | CPU µs per request | ratio to the limit | ratio to stdlib threading |")
    assert "| raw C | 2.00 | 1.00 (1.00 to 1.00) | 0.32 (0.29 to 0.33) | 1,000† | 50.0 | 0 |" in lines
    assert (
        "| **fastserve C threading** | 3.00 | 1.50 (1.50 to 1.50) | 0.47 (0.43 to 0.50) | 1,000 | 50.0 | 0 |" in lines
    )
    assert lines[-2].endswith("| 6 |")
    assert lines[-1].startswith("| gevent | missing: gevent \\| is")
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


def test_each_server_of_fastserve_is_paired_with_the_stdlibs_of_its_model_and_a_slowed_one_with_itself() -> None:
    sync = server("fastserve C sync", "fastserve", [2.0, 2.0, 4.0], "sync")
    slowed = server("fastserve C sync, accept + 5 µs", "slowed", [3.0, 4.0, 8.0], "sync")
    own = server("stdlib sync", "stdlib", [4.0, 4.0, 8.0], "sync")
    pool = server("fastserve C threadpool", "fastserve", [3.0, 6.0, 3.5], "threadpool")
    text = report.pairs_text(work(STDLIB, RAW, UVLOOP, slowed, sync, own, pool))
    assert text.splitlines()[2:] == [
        "- fastserve C sync / stdlib sync: 0.50 (0.50 to 0.50)",
        "- fastserve C threadpool / stdlib threading: 0.50 (0.50 to 0.50)",
        "- fastserve C sync, accept + 5 µs / fastserve C sync: 1.82 (1.50 to 2.00)",
    ]
    assert report.pairs_text(work(RAW, UVLOOP)) == ""
    assert text in report.details(result(work(STDLIB, RAW, UVLOOP, slowed, sync, own, pool)))


def test_a_table_without_the_limit_and_the_stdlib_has_no_ratios() -> None:
    line = report.work_table(work(UVLOOP)).splitlines()[-1]
    assert line == "| uvloop Protocol | 2.50 | – | – | 1,000 | 50.0 | 0 |"


def test_the_overview_has_the_best_of_each_family_and_leaves_out_what_is_only_charted() -> None:
    sync = server("stdlib sync", "stdlib", [5.0, 5.0, 5.0], "sync")
    text = report.overview(result({**ECHO, "servers": [*ECHO["servers"], sync]}, {**ECHO, "table": False}))
    assert text.splitlines()[2:] == [
        "| echo | 2.00 | 5.00 (sync) | 3.00 (threading) | 9.00 (threading) | 2.50 (uvloop Protocol) | 0.76 | 1.50 |"
    ]


def test_losses_name_the_winner_the_work_the_factor_and_its_spread() -> None:
    assert report.losses(result(ECHO)) == [
        "**fastserve C threading loses at echo** to uvloop Protocol (×1.16, 0.86 to 1.50; not in every round).",
        "**fastserve Python threading loses at echo** to stdlib threading (×1.34, 1.25 to 1.50).",
    ]


def test_nothing_is_said_to_be_lost_where_fastserve_uses_the_least() -> None:
    text = report.losses_text(result(work(RAW, STDLIB, C_CORE)))
    assert text == "fastserve uses no more CPU time than any server but the limit, in any of these works."


def test_a_work_without_fastserve_is_not_passed_over() -> None:
    assert report.losses(result(work(RAW, STDLIB))) == ["echo: fastserve is missing."]


def test_the_setting_names_what_was_measured_on_and_nothing_that_was_not_there() -> None:
    assert report.setting(result()) == (
        "a processor, 2 cores, Linux 6; CPython 3.13.0, fastserve 0.1, uvloop 1.0, cc 12; "
        "commit abcdef with changes; 2026-01-01; medians of 3 rounds of 0.4 s."
    )


@pytest.mark.parametrize(("value", "text"), [(0.184, "0.18"), (12.34, "12.3"), (99.96, "100.0"), (1234.5, "1,234")])
def test_figures_have_about_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_comparison_tells_every_ratio_of_both_and_their_difference() -> None:
    faster = {**C_CORE, "rounds": [{**entry, "cpu_us": entry["cpu_us"] / 2} for entry in C_CORE["rounds"]]}
    text, agree = compare.comparison(result(work(RAW, STDLIB, C_CORE)), result(work(RAW, STDLIB, faster, UVLOOP)), 10)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert not agree
    assert lines[0] == "echo"
    assert "fastserve C threading / raw C 1.500 0.750 -50.0% <" in lines
    assert "stdlib threading / raw C 3.158 3.158 +0.0%" in lines
    assert lines[-1] == "4 paired ratios, 2 within 10% of each other; the largest difference is 50.0%"


def test_results_that_have_nothing_in_common_do_not_agree() -> None:
    assert compare.comparison(result(), result(ECHO), 10) == ("the two results have no ratio in common", False)
    assert compare.comparison(result(ECHO), result(ECHO), 10)[1]


def test_what_stands_between_the_markers_is_replaced_and_nothing_else() -> None:
    once = report.replaced(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "new")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replaced(once, "new") == once


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN * 2}{report.END}"])
def test_markers_that_do_not_belong_together_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="there must be one"):
        report.replaced(text, "new")


@pytest.mark.parametrize("page", [run.README, run.PERFORMANCE], ids=lambda path: path.name)
def test_the_pages_have_their_markers(page: Path) -> None:
    assert "new" in report.replaced(page.read_text("utf-8"), "new")


def test_documents_are_written_from_a_stored_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the charts take matplotlib")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "DOCS", tmp_path)
    pages = [tmp_path / "README.md", tmp_path / "performance.md"]
    for name, page in zip(("README", "PERFORMANCE"), pages, strict=True):
        page.write_text(f"# Title\n\n{report.BEGIN}\n{report.END}\n", "utf-8")
        monkeypatch.setattr(run, name, page)
    stored = tmp_path / "full.json"
    stored.write_text(run.stored(result(ECHO, work(*ECHO["servers"], title="echo, 500", connections=500))), "utf-8")
    assert run.main(["--render", str(stored)]) == 0
    for path in run.CHARTS.values():
        assert "<svg" in (tmp_path / path).read_text("utf-8")
        assert f"(docs/{path})" in pages[0].read_text("utf-8")
        assert f"({path})" in pages[1].read_text("utf-8")
    assert "loses at echo" in pages[0].read_text("utf-8")


def test_a_stored_result_is_json_with_one_round_a_line() -> None:
    text = run.stored(result(ECHO, work(STDLIB)))
    assert json.loads(text) == result(ECHO, work(STDLIB))
    assert sum('"cpu_us"' in line for line in text.splitlines()) == 18
    assert all(line.count('"cpu_us"') <= 1 for line in text.splitlines())


def test_every_worker_model_is_served_by_each_core_and_by_the_stdlib_if_it_has_it() -> None:
    names = {contender.name for contender in contenders.CONTENDERS}
    for model in contenders.MODELS:
        assert {f"fastserve C {model.name}", f"fastserve Python {model.name}"} <= names
        assert (f"stdlib {model.name}" in names) is model.stdlib


def test_the_same_handler_source_is_given_to_the_stdlib_and_to_fastserve() -> None:
    for each in works.WORKS:
        targets = {
            contender.arguments(each)[5]
            for contender in contenders.CONTENDERS
            if contender.family in ("stdlib", "fastserve") and contender.takes(each)
        }
        assert targets == {f"{contenders.HANDLERS}:{each.handler}"}


def test_every_work_has_its_limit_and_its_reference() -> None:
    for each in works.WORKS:
        names = [contender.name for contender in contenders.CONTENDERS if contender.takes(each)]
        assert contenders.LIMIT in names
        assert contenders.reference(each) in names


def test_documents_are_refused_for_a_part_of_the_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.arguments(["--documents", "--works", "lines-1"])
    assert "all works" in capsys.readouterr().err


# Real runs

needs_generator = pytest.mark.skipif(
    importlib.util.find_spec("fastserve._load") is None, reason="the load generator was not built"
)
needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="a measurement takes two cores"
)


def measured(output: Path, *options: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, str(BENCH / "run.py"), "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@needs_generator
@needs_cores
def test_a_run_measures_its_servers_and_stores_every_round(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = ["--works", "echo-64-1", "--servers", "stdlib threading", "asyncio Protocol"]
    ran = measured(output, *options, "--rounds", "2", "--seconds", "0.1")
    assert ran.returncode == 0, ran.stderr
    (found,) = json.loads(output.read_text("utf-8"))["works"]
    assert [each["name"] for each in found["servers"]] == ["stdlib threading", "asyncio Protocol"]
    for each in found["servers"]:
        assert len(each["rounds"]) == 2
        for entry in each["rounds"]:
            assert entry["requests"] > 0 and entry["cpu_us"] > 0 and entry["errors"] == 0
    assert "| stdlib threading |" in ran.stdout and "| asyncio Protocol |" in ran.stdout


@needs_generator
@needs_cores
def test_a_server_that_fails_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = importlib.import_module("session")
    dies = tmp_path / "dies.py"
    dies.write_text(
        "import socket\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "for turn in range(2):\n"
        "    client = listener.accept()[0]\n"
        "    while data := client.recv(100):\n"
        "        client.sendall(data)\n"
        "    client.close()\n"
        "raise SystemExit('had enough')\n"
    )
    mute = tmp_path / "mute.py"
    mute.write_text("raise SystemExit('does not start')\n")
    echo = works.echo(works.SMALL, 1)
    servers = [
        contenders.Contender("dies", "other", (sys.executable, str(dies)), contenders.KEPT),
        contenders.Contender("mute", "other", (sys.executable, str(mute)), contenders.KEPT),
        contenders.Contender("absent", "other", (str(tmp_path / "absent"),), contenders.KEPT),
        next(each for each in contenders.CONTENDERS if each.name == "asyncio Protocol"),
    ]
    said: list[str] = []
    found = session.measure(echo, servers, min(os.sched_getaffinity(0)), 3, 0.05, said.append)
    assert [each["name"] for each in found["servers"]] == ["asyncio Protocol"]
    assert len(found["servers"][0]["rounds"]) == 3
    reasons = {each["name"]: each["reason"] for each in found["missing"]}
    assert reasons.keys() == {"dies", "mute", "absent"}
    assert "had enough" in reasons["dies"]
    assert "does not start" in reasons["mute"]
    assert "absent is not built" in reasons["absent"]
    assert len(said) == 3


@needs_generator
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_one_core_is_refused(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    pin = f"import os, sys; os.sched_setaffinity(0, {{{core}}}); os.execv(sys.argv[1], sys.argv[1:])"
    ran = measured(tmp_path / "none.json", "--quick", prefix=[sys.executable, "-c", pin])
    assert ran.returncode == 2
    assert "needs two processors" in ran.stderr
    assert not (tmp_path / "none.json").exists()


@needs_generator
@needs_cores
def test_a_slowed_accept_is_seen(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = ["--works", "oneshot-32", "--servers", "fastserve C sync", "--slow-accept", "300"]
    ran = measured(output, *options, "--rounds", "2", "--seconds", "0.1")
    assert ran.returncode == 0, ran.stderr
    (found,) = json.loads(output.read_text("utf-8"))["works"]
    cpu = {row.name: row.cpu_us for row in report.rows(found)}
    assert cpu["fastserve C sync, accept + 300 µs"] - cpu["fastserve C sync"] > 150
