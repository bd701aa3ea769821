"""What a sweep costs is measured on cells that are all made, skipped and read."""

from iclgd_lens.benchmarks.sweeps import measure_sweep, sweep_table


def test_all_cells_are_made_and_every_step_is_timed_and_shown():
    told: list[str] = []
    cost = measure_sweep(1, told.append)
    assert told == [*cost.seconds] == ["plan", "run", "skip", "open", "skip again", "open again", "load", "query"]
    assert cost.cells == 4 * (1 + 4 * 2 * 3) + 4 * (1 + 4 * 2 * 2)  # of the model and of its twin, for two tasks and two k
    # 24 rows of the frame for each, and 32 by query where no control is in the place of the update
    assert cost.rows == cost.cells * 24 + 8 * (1 + 4 * 2) * 32
    assert cost.file_bytes > 1000 * cost.cells
    assert "skip again" in sweep_table([cost]).markdown()
