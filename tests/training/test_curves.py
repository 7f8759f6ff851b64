"""`curves.png` is drawn for every run that has a record, whatever it lacks, and shows what the record says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training import curves
from training.curves import Series, draw_curves, run_title, smooth, validation_domains

ROOT = Path(__file__).resolve().parents[2]


def record(step, **values):
    return {"step": step, "tokens": 100 * step, **{key.replace("__", "/"): value for key, value in values.items()}}


FULL = [
    record(0, validation__c4__loss=9.0, validation__wiki__loss=8.0, validation__mean__loss=8.5),
    record(10, train__loss=7.0, train__lr=1e-3, train__grad_norm=2.0, throughput__tokens_per_second=12_300.0),
    record(20, train__loss=None, train__lr=2e-3, train__grad_norm=None, throughput__tokens_per_second=12_500.0),
    record(
        30,
        train__loss=6.25,
        train__lr=1e-3,
        train__grad_norm=1.0,
        throughput__tokens_per_second=12_400.0,
        throughput__mfu=0.25,
        validation__c4__loss=6.0,
        validation__wiki__loss=5.0,
        validation__mean__loss=5.5,
    ),
]


def write_run(folder: Path, records: list[dict], name: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if name is not None:
        (folder / "config.yaml").write_text(f"run:\n  name: {name}\n")
    return folder


@pytest.fixture
def figure_of(monkeypatch):
    """The figure that `draw_curves` would write."""

    def draw(run_dir):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(curves, "save", lambda figure, path: figures.append(figure))
            draw_curves(run_dir)
        return figures[0]

    return draw


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def test_matplotlib_is_imported_only_when_something_is_drawn():
    code = "import sys, training.curves, training.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_picture_has_the_runs_name_and_final_numbers(tmp_path, figure_of):
    figure = figure_of(write_run(tmp_path / "folder", FULL, name="first-light"))
    assert figure.get_suptitle() == "first-light"
    loss, domains, _, speed = figure.axes[:4]
    assert legend(loss) == ["training 6.250", "validation, mean of domains 5.500"]
    assert legend(domains) == ["wiki 5.000", "c4 6.000"]
    assert legend(speed) == ["median 12.4 k tokens/s, MFU 25.0 %"]
    assert loss.lines[0].get_xydata().tolist() == [[10, 7.0], [30, 6.25]]


@pytest.mark.parametrize(
    "records",
    [
        FULL,
        FULL[:1],
        FULL[1:2],
        FULL[1:3],
        [record(5)],
        [record(1, train__loss=None, train__lr=None, train__grad_norm=None, throughput__tokens_per_second=None)],
        [record(step, train__loss=3.0, train__lr=0.0, train__grad_norm=0.0) for step in range(1, 300)],
        [record(step, **{f"validation__d{i}__loss": 3.0 + i for i in range(25)}) for step in (0, 10)],
    ],
    ids=["full", "only step 0", "single", "no validation", "no values", "only nulls", "constant", "25 domains"],
)
def test_every_run_with_a_record_gets_a_picture(tmp_path, records):
    picture = draw_curves(write_run(tmp_path, records))
    assert picture == tmp_path / "curves.png"
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[0] >= 800
    assert pixels.std() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_run_without_records_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no record yet"):
        draw_curves(write_run(tmp_path, []))


def test_the_first_fall_of_the_loss_does_not_flatten_the_rest(tmp_path, figure_of):
    records = [record(step, train__loss=3.0 + 8.0 * np.exp(-step / 10)) for step in range(1, 1001)]
    low, high = figure_of(write_run(tmp_path, records)).axes[0].get_ylim()
    assert 2.5 < low < 3.0
    assert high < 4.0


def test_a_late_spike_of_the_loss_is_seen(tmp_path, figure_of):
    records = [record(step, train__loss=20.0 if step == 900 else 3.0) for step in range(1, 1001)]
    assert figure_of(write_run(tmp_path, records)).axes[0].get_ylim()[1] > 20.0


def test_tokens_stand_above_the_steps_they_belong_to(tmp_path, figure_of):
    figure = figure_of(write_run(tmp_path, FULL))
    figure.canvas.draw()
    (tokens,) = figure.axes[0].child_axes
    assert tokens.get_xlim() == pytest.approx([100 * step for step in figure.axes[0].get_xlim()])


def test_a_missing_or_damaged_configuration_leaves_the_folders_name(tmp_path):
    assert run_title(write_run(tmp_path / "a", FULL)) == "a"
    (tmp_path / "a" / "config.yaml").write_text("run: [")
    assert run_title(tmp_path / "a") == "a"


def test_series_leave_out_what_is_missing_or_not_finite():
    nan = float("nan")
    series = Series.of([record(0), record(1, a=1.0), record(2, a=nan), record(3, a=2.0)], "a")
    assert (series.steps.tolist(), series.tokens.tolist(), series.values.tolist()) == ([1, 3], [100, 300], [1.0, 2.0])
    assert len(Series.of([record(0)], "a")) == 0


def test_smoothing_keeps_a_line_straight_at_the_start_and_averages_noise():
    line = np.arange(600.0)
    assert np.allclose(smooth(line)[:590], line[:590])
    noise = np.random.default_rng(0).standard_normal(6000)
    assert smooth(noise).std() < 0.1
    assert smooth(noise)[-1] == pytest.approx(noise[-101:].mean())
    assert smooth(np.array([])).shape == (0,)
    assert smooth(np.array([2.0, 5.0])).tolist() == [2.0, 5.0]


def test_domains_are_read_from_the_keys_without_the_mean():
    assert validation_domains(FULL) == ["c4", "wiki"]
