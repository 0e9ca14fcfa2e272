"""The sinks: exact floats, torn files, killed writers, resumed runs, and what a person sees."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from normscope import sinks
from normscope.errors import MissingExtraError, RecordFileError, SinkError
from normscope.record import LifecyclePoint, Record

FILE_SINKS = [sinks.JSONL, sinks.CSV]
FileSink = type[sinks.JSONL] | type[sinks.CSV]


def record(step: int, **values: float) -> Record:
    return Record(step, LifecyclePoint.POST_STEP, {f"norms/{name}": value for name, value in values.items()})


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def steps(path: Path) -> list[int]:
    """The steps that a reader of a JSONL or CSV file finds."""
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return [int(row["step"]) for row in csv.DictReader(file)]
    return [found.step for found in sinks.read_records(path)]


@pytest.fixture(params=FILE_SINKS, ids=lambda sink: sink.__name__)
def file_sink(request: pytest.FixtureRequest) -> FileSink:
    sink: FileSink = request.param
    return sink


@pytest.fixture
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    of_csv = "file_sink" in request.fixturenames and request.getfixturevalue("file_sink") is sinks.CSV
    return tmp_path / ("metrics.csv" if of_csv else "metrics.jsonl")


class TestEverySink:
    def test_missing_folders_are_made(self, file_sink: FileSink, tmp_path: Path) -> None:
        file_sink(tmp_path / "a" / "b" / "metrics").close()
        assert (tmp_path / "a" / "b" / "metrics").exists()

    def test_str_and_pathlike(self, file_sink: FileSink, path: Path) -> None:
        targets: list[str | Path] = [str(path), path]
        for step, target in enumerate(targets):
            with file_sink(target) as sink:
                sink.write(record(step, total_norm=1.0))
        assert steps(path) == [0, 1]

    def test_write_after_close_names_the_sink(self, file_sink: FileSink, path: Path) -> None:
        with file_sink(path) as sink:
            pass
        sink.close()
        with pytest.raises(SinkError, match=rf"{file_sink.__name__}\('.*metrics.*'\) is closed; the record of step 7"):
            sink.write(record(7, total_norm=1.0))

    def test_key_that_the_format_uses_is_refused(self, file_sink: FileSink, path: Path) -> None:
        with file_sink(path) as sink:
            with pytest.raises(SinkError, match="uses the key 'step' itself"):
                sink.write(Record(1, LifecyclePoint.SNAPSHOT, {"step": 2.0}))
            sink.write(record(1, total_norm=1.0))
        assert steps(path) == [1]

    def test_torn_last_line_is_removed_and_the_run_goes_on(self, file_sink: FileSink, path: Path) -> None:
        with file_sink(path) as sink:
            for step in (1, 2):
                sink.write(record(step, total_norm=0.1))
        whole = path.read_bytes()
        last_line = whole.splitlines(keepends=True)[-1]
        for torn_length in range(1, len(last_line) - 1):
            path.write_bytes(whole + last_line[:torn_length])
            with file_sink(path) as sink:
                sink.write(record(3, total_norm=0.2))
            assert path.read_bytes().startswith(whole)
            assert steps(path) == [1, 2, 3]

    def test_torn_line_longer_than_a_block(self, file_sink: FileSink, path: Path) -> None:
        with file_sink(path) as sink:
            sink.write(record(1, total_norm=0.1))
        whole = path.read_bytes()
        path.write_bytes(whole + b"2" * 200_000)
        file_sink(path).close()
        assert path.read_bytes() == whole

    @pytest.mark.parametrize(
        "content", [b"Dear diary", b"Dear diary,\n\ntoday", b"{\n  1: 2\n}", b"\x89PNG\r\n\x1a\n\x00"]
    )
    def test_some_other_file_is_left_alone(self, file_sink: FileSink, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(RecordFileError, match=r"metrics.*, line 1: not a "):
            file_sink(path)
        assert path.read_bytes() == content

    def test_file_that_holds_only_a_torn_line(self, file_sink: FileSink, path: Path) -> None:
        path.write_bytes(b'{"ste' if file_sink is sinks.JSONL else b"step,poi")
        with file_sink(path) as sink:
            sink.write(record(1, total_norm=0.1))
        assert steps(path) == [1]

    def test_keep_until_drops_later_steps(self, file_sink: FileSink, path: Path) -> None:
        with file_sink(path) as sink:
            for step in (0, 5, 10, 15):
                sink.write(record(step, total_norm=step / 3))
        path.chmod(0o640)
        with file_sink(path, keep_until=5) as sink:
            sink.write(record(6, total_norm=2.0))
        assert steps(path) == [0, 5, 6]
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.listdir(path.parent) == [path.name]

    def test_keep_until_of_a_missing_file(self, file_sink: FileSink, path: Path) -> None:
        file_sink(path, keep_until=5).close()
        assert path.read_bytes() == b""
        file_sink(path, keep_until=5).close()

    def test_line_that_does_not_fit_leaves_the_file_as_it_was(self, file_sink: FileSink, path: Path) -> None:
        """A limit on the file's size stands in for a full disk; the run may go on once there is room."""
        resource = pytest.importorskip("resource")
        with file_sink(path) as sink:
            sink.write(record(1, total_norm=0.1))
            before = path.read_bytes()
            ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, hard))
            try:
                with pytest.raises(OSError, match="no room for a line"):
                    sink.write(record(2, total_norm=0.1))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                signal.signal(signal.SIGXFSZ, ignored)
            assert path.read_bytes() == before
            sink.write(record(3, total_norm=0.1))
        assert steps(path) == [1, 3]

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
    def test_killed_writer_leaves_whole_lines(self, file_sink: FileSink, path: Path) -> None:
        program = f"""
import itertools, sys
from normscope.record import Record
from normscope.sinks import {file_sink.__name__} as FileSink
sink = FileSink(sys.argv[1])
for step in itertools.count():
    sink.write(Record(step, "post_step", {{"norms/norm_%d" % layer: step / 7 for layer in range(50)}}))
    if step == 100:
        print("running", flush=True)
"""
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout:
            assert writer.stdout.readline() == b"running\n"
            writer.kill()
            writer.wait()
        assert path.read_bytes().endswith(b"\n")
        found = steps(path)
        assert found == list(range(len(found)))
        assert len(found) > 100


class TestJSONL:
    def test_line(self, path: Path) -> None:
        values = {"task/train_loss": 0.1, "a/undefined": math.nan, "a/high": math.inf, "a/low": -math.inf}
        with sinks.JSONL(path) as sink:
            sink.write(Record(10, LifecyclePoint.POST_EPOCH, values, {"layers.0.weight": 3, "bias": 1}))
            sink.write(Record(11, LifecyclePoint.POST_EPOCH, {}))
        first, second = path.read_text().splitlines()
        assert json.loads(first, parse_constant=pytest.fail) == {
            "step": 10,
            "point": "post_epoch",
            "task/train_loss": 0.1,
            "a/undefined": None,
            "a/high": "Infinity",
            "a/low": "-Infinity",
            "nonfinite_parameters": {"layers.0.weight": 3, "bias": 1},
        }
        assert json.loads(second) == {"step": 11, "point": "post_epoch"}

    @given(st.dictionaries(st.text(), st.floats()), st.dictionaries(st.text(), st.integers(1, 2**40)), st.integers())
    def test_round_trip_is_exact(self, values: dict[str, float], nonfinite: dict[str, int], step: int) -> None:
        values = {f"observer/{key}": value for key, value in values.items()}
        written = Record(step, LifecyclePoint.SNAPSHOT, values, nonfinite)
        with tempfile.TemporaryDirectory() as folder:
            with sinks.JSONL(Path(folder, "metrics.jsonl")) as sink:
                sink.write(written)
            (found,) = sinks.read_records(Path(folder, "metrics.jsonl"))
        assert (found.step, found.point, list(found)) == (step, LifecyclePoint.SNAPSHOT, list(values))
        assert list(found.nonfinite_parameters.items()) == list(nonfinite.items())
        for key, value in values.items():
            assert math.isnan(found[key]) if math.isnan(value) else bits(found[key]) == bits(value)

    def test_torn_last_line_is_not_read(self, path: Path) -> None:
        path.write_bytes(b'{"step": 1, "point": "snapshot"}\n\n{"step": 2, "point": "snaps')
        assert steps(path) == [1]

    def test_last_line_that_lacks_only_its_line_break_is_kept(self, path: Path) -> None:
        path.write_bytes(b'{"step": 1, "point": "snapshot"}')
        assert steps(path) == [1]
        with sinks.JSONL(path) as sink:
            sink.write(record(2))
        assert steps(path) == [1, 2]

    @pytest.mark.parametrize(
        "line",
        [
            b"{",
            b"17",
            b'{"point": "snapshot"}',
            b'{"step": 1.5, "point": "snapshot"}',
            b'{"step": 1, "point": "lunch"}',
            b'{"step": 1, "point": "snapshot", "a/b": NaN}',
            b'{"step": 1, "point": "snapshot", "a/b": "high"}',
            b'{"step": 1, "point": "snapshot", "a/b": [1]}',
            b'{"step": 1, "point": "snapshot", "a/b": 1' + b"0" * 400 + b"}",
            b'{"step": 1, "point": "snapshot", "nonfinite_parameters": ["w"]}',
            b'{"step": 1, "point": "snapshot", "a/\xff": 1.0}',
        ],
    )
    def test_corrupt_line_is_named(self, path: Path, line: bytes) -> None:
        path.write_bytes(b'{"step": 1, "point": "snapshot"}\n' + line + b'\n{"step": 3, "point": "snapshot"}\n')
        for read in (sinks.read_records, lambda path: sinks.JSONL(path, keep_until=2)):
            with pytest.raises(RecordFileError) as caught:
                read(path)
            assert isinstance(caught.value, ValueError)
            assert str(caught.value).startswith(f"{path}, line 2: not a record: ")
            assert "\n" not in str(caught.value)

    def test_missing_file(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            sinks.read_records(path)


class TestCSV:
    def test_cells(self, path: Path) -> None:
        with sinks.CSV(path) as sink:
            sink.write(record(1, a=0.1, b=math.nan, c=math.inf, d=-math.inf))
        assert path.read_text() == (
            "step,point,norms/a,norms/b,norms/c,norms/d\n"
            "1,post_step,0.1,nan,inf,-inf\n"
        )  # fmt: skip

    def test_later_metric_widens_the_file(self, path: Path) -> None:
        with sinks.CSV(path) as sink:
            sink.write(record(1))
            sink.write(record(2, a=1.0))
            sink.write(Record(3, LifecyclePoint.SNAPSHOT, {'odd, "quoted"': 3.0, "norms/a": 2.0}))
        with sinks.CSV(path) as sink:
            sink.write(record(4, a=3.0))
            sink.write(record(5, b=4.0))
        with open(path, newline="") as file:
            assert list(csv.reader(file)) == [
                ["step", "point", "norms/a", 'odd, "quoted"', "norms/b"],
                ["1", "post_step", "", "", ""],
                ["2", "post_step", "1.0", "", ""],
                ["3", "snapshot", "2.0", "3.0", ""],
                ["4", "post_step", "3.0", "", ""],
                ["5", "post_step", "", "", "4.0"],
            ]

    @given(st.lists(st.floats(), min_size=1))
    def test_floats_are_exact(self, values: list[float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "metrics.csv")
            with sinks.CSV(path) as sink:
                for step, value in enumerate(values):
                    sink.write(record(step, a=value))
            with open(path, newline="") as file:
                found = [float(row["norms/a"]) for row in csv.DictReader(file)]
        assert list(map(repr, found)) == list(map(repr, values))

    def test_row_without_line_break_is_torn(self, path: Path) -> None:
        path.write_text("step,point,norms/a\n1,post_step,0.5\n2,post_step,0.12")
        sinks.CSV(path).close()
        assert steps(path.rename(path.with_suffix(".csv"))) == [1]

    def test_other_tables_are_refused(self, path: Path) -> None:
        path.write_text("time,loss\n1,2\n")
        with pytest.raises(RecordFileError, match="line 1: not a table of records"):
            sinks.CSV(path)
        path.write_text("step,point,a\n1,post_step,2\nx,post_step,3\n")
        with pytest.raises(RecordFileError, match="line 3: not a record: no integer step"):
            sinks.CSV(path, keep_until=1)


class TestTensorBoard:
    @staticmethod
    def scalars(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(log_dir))
        events.Reload()
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_scalars_are_on_disk_after_write(self, tmp_path: Path) -> None:
        with sinks.TensorBoard(tmp_path / "runs" / "a") as sink:
            sink.write(record(1, total_norm=0.5, mean_component=2.0))
            sink.write(record(2, total_norm=0.25))
            found = self.scalars(tmp_path / "runs" / "a")
        assert found == {"norms/total_norm": [(1, 0.5), (2, 0.25)], "norms/mean_component": [(1, 2.0)]}

    def test_values_that_float32_does_not_hold(self, tmp_path: Path) -> None:
        with sinks.TensorBoard(tmp_path) as sink:
            sink.write(record(1, undefined=math.nan, high=math.inf, low=-math.inf, great=1e300, small=1e-300))
        found = {tag: value for tag, [(_, value)] in self.scalars(tmp_path).items()}
        assert math.isnan(found.pop("norms/undefined"))
        assert found == {
            "norms/high": math.inf, "norms/low": -math.inf, "norms/great": math.inf, "norms/small": 0.0
        }  # fmt: skip

    def test_resumed_run_hides_what_it_does_again(self, tmp_path: Path) -> None:
        with sinks.TensorBoard(tmp_path) as sink:
            for step in (1, 2, 3):
                sink.write(record(step, a=1.0))
        with sinks.TensorBoard(str(tmp_path), purge_step=2) as sink:
            sink.write(record(2, a=5.0))
        assert self.scalars(tmp_path)["norms/a"] == [(1, 1.0), (2, 5.0)]

    def test_write_after_close(self, tmp_path: Path) -> None:
        sink = sinks.TensorBoard(tmp_path)
        sink.close()
        with pytest.raises(SinkError, match="is closed"):
            sink.write(record(1, a=1.0))


def terminal(height: int = 40, *, encoding: str = "utf-8") -> tuple[rich.console.Console, StringIO]:
    """A console that believes to be on a terminal of 100 columns, and what it wrote."""

    class Screen(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    screen = Screen()
    return rich.console.Console(file=screen, force_terminal=True, width=100, height=height, _environ={}), screen


def last_picture(screen: StringIO) -> list[str]:
    """The lines of the table as it stands in the end, without colours."""
    drawn = screen.getvalue()
    start = re.compile(r"\x1b\[1mstep [\d,]+ ")  # only the title is bold
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn[[*start.finditer(drawn)][-1].start() :]).splitlines()
    return [line for line in lines if line.strip()]


class TestConsole:
    def test_line_where_there_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        with sinks.Console() as sink:
            sink.write(Record(7, LifecyclePoint.POST_EPOCH, {"task/loss": 0.123456, "norms/total_norm": math.nan}))
            sink.write(Record(8, LifecyclePoint.POST_EPOCH, {"norms/nonfinite": 3.0}, {"layers.0.weight": 2, "b": 1}))
        assert capsys.readouterr().out == (
            "step 7 post_epoch  task/loss 0.1235  norms/total_norm undefined\n"
            "step 8 post_epoch  norms/nonfinite 3  NaN or inf in the gradient of layers.0.weight (2) and of 1 more\n"
        )

    @pytest.mark.parametrize(
        ("patterns", "shown"),
        [
            (sinks.console.SUMMARIES, {"lr", "norms/total_norm", "norms/nonfinite", "token_gradient/gradient_gini"}),
            (["norms/*"], {"norms/total_norm", "norms/nonfinite", "norms/norm_layers.0.weight"}),
            (["*norm*", "!*_norm"], {"norms/nonfinite", "norms/norm_layers.0.weight"}),
            (["weight_tracking/top_sv/*", "l?"], {"lr", "weight_tracking/top_sv/layers.0.weight"}),
        ],
    )
    def test_patterns_choose_the_metrics(self, patterns: list[str], shown: set[str]) -> None:
        every = ["lr", "norms/total_norm", "norms/nonfinite", "norms/norm_layers.0.weight"]
        every += ["token_gradient/gradient_gini", "weight_tracking/top_sv/layers.0.weight"]
        page = StringIO()
        with sinks.Console(patterns, console=rich.console.Console(file=page)) as sink:
            sink.write(Record(1, LifecyclePoint.SNAPSHOT, dict.fromkeys(every, 1.0)))
        assert set(page.getvalue().removeprefix("step 1 snapshot").split()[::2]) == shown

    def test_table(self) -> None:
        console, screen = terminal()
        with sinks.Console(console=console) as sink:
            for step, loss, gini in ((1000, 4.0, 0.5), (1100, 1.0, 0.25), (1200, 3.0, math.nan)):
                sink.write(record(step, loss=loss, gini=gini))
        assert [line.split() for line in last_picture(screen) if "─" not in line] == [
            ["step", "1,200", "post_step"],
            ["metric", "now", "change", "course", "lowest", "highest"],
            ["norms"],
            ["loss", "3", "+200.0%", "█▁▆", "1", "4"],
            ["gini", "—", "█▁", "0.25", "0.5"],
        ]
        assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back

    def test_first_nonfinite_gradient_stays_in_red(self) -> None:
        console, screen = terminal()
        with sinks.Console(console=console) as sink:
            for step, nonfinite in ((1, {}), (2, {"layers.3.weight": 5}), (3, {"embedding.weight": 9}), (4, {})):
                sink.write(Record(step, LifecyclePoint.POST_STEP, {"norms/nonfinite": 0.0}, nonfinite))
        note = "step 2: NaN or inf in the gradient of layers.3.weight (5); 2 such records so far"
        assert last_picture(screen)[-1].strip() == note
        assert f"\x1b[31m{note}" in screen.getvalue()

    def test_terminal_without_unicode(self) -> None:
        console, screen = terminal(encoding="ascii")
        with sinks.Console(console=console) as sink:
            sink.write(record(1, gini=math.nan))
        assert screen.getvalue().isascii()
        assert last_picture(screen)[-1].replace("|", "").split() == ["gini", "undefined", "undefined", "undefined"]

    def test_more_rows_than_the_terminal_has(self) -> None:
        console, screen = terminal(height=10)
        sink = sinks.Console(console=console)
        sink.write(record(1, **{f"value_{index}": float(index) for index in range(20)}))
        assert len(last_picture(screen)) < 10
        assert last_picture(screen)[-1].strip().startswith("17 more lines than the terminal has room for")
        sink.close()
        assert last_picture(screen)[-1].split()[0] == "value_19"

    def test_drawn_no_oftener_than_asked(self) -> None:
        console, screen = terminal()
        with sinks.Console(console=console, refresh_per_second=1e-3) as sink:
            sink.write(record(1, a=1.0))
            drawn = screen.getvalue()
            for step in range(2, 50):
                sink.write(record(step, a=1.0))
            assert screen.getvalue() == drawn
        assert last_picture(screen)[0].startswith("step 49")

    @given(st.lists(st.floats(), min_size=1, max_size=20))
    def test_any_values_can_be_drawn(self, values: list[float]) -> None:
        for console, screen in (terminal(), (rich.console.Console(file=(page := StringIO())), page)):
            with sinks.Console(console=console) as sink:
                for step, value in enumerate(values):
                    sink.write(record(step, a=value))
            assert f"step {len(values) - 1}" in screen.getvalue()

    def test_bad_refresh_rate(self) -> None:
        with pytest.raises(ValueError, match="refresh_per_second"):
            sinks.Console(refresh_per_second=0.0)


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("rich.console", "tensorboard.compat.proto.summary_pb2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"normscope\[console\]"):
        sinks.Console()
    with pytest.raises(MissingExtraError, match=r"normscope\[tensorboard\]"):
        sinks.TensorBoard(tmp_path)
