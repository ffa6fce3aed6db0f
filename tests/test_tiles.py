"""Tiles: the table fits every device, and autotuning keeps what it finds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="there is no triton for this system")

from moe_course.kernels import autotune, fused_moe, tiles
from moe_course.kernels.tiles import SHARED_MEMORY, Tile, Tiles, candidates, choose

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QWEN3 = {"num_experts": 128, "width": 2048, "hidden": 768, "halves": 2}
A, B, C = (Tiles(*[replace(Tile(64, 64, 64), num_stages=n)] * 5) for n in (2, 3, 4))


@pytest.fixture
def compiled(monkeypatch):
    """The table as a GPU of some capability sees it."""

    def of(capability):
        monkeypatch.setattr(tiles, "INTERPRETED", False)
        monkeypatch.setattr(tiles, "capability", lambda device: capability)

    return of


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(autotune, "_answers", {})


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_fits_into_shared_memory_and_its_matrix(compiled, capability, dtype):
    compiled(capability)
    size = torch.empty((), dtype=dtype).element_size()
    for slots in (1, 8, 1024, 2048, 8192, 65536, 262144):
        for width, hidden in (
            (2048, 768),
            (7168, 2048),
            (100, 200),
            (16, 8),
            (2880, 2880),
        ):
            for halves in (1, 2):
                layer = (slots, 128, width, hidden, halves, dtype, CPU)
                for found in [choose(*layer), *candidates(*layer)]:
                    columns = {"up": hidden, "down": width, "dact": hidden, "dx": width}
                    for name in ("up", "down", "dact", "dx", "dw"):
                        tile = getattr(found, name)
                        wide = halves if name == "up" else 1
                        step = (
                            tile.block_k * (tile.block_m + wide * tile.block_n) * size
                        )
                        assert step * tile.num_stages <= SHARED_MEMORY[capability]
                        # tl.dot wants 16 of everything; masks waste less than half a block.
                        assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
                        if name in columns:
                            assert tile.block_n < 2 * max(16, columns[name])
                    rows = {getattr(found, name).block_m for name in columns}
                    assert len(rows) == 1


def test_the_row_kernels_must_share_their_rows():
    with pytest.raises(ValueError, match="share one block_m"):
        Tiles(Tile(64, 64, 64), *[Tile(128, 64, 64)] * 4)


def test_the_choice_of_the_table_is_tried_first_and_none_twice(compiled):
    compiled((9, 0))
    layer = {"slots": 65536, "dtype": torch.bfloat16, "device": CPU} | QWEN3
    found = candidates(**layer)
    assert found[0] == choose(**layer)
    assert 4 < len(found) == len(set(found)) <= 12


def test_the_fastest_is_kept_for_the_next_process(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "tiles.json"
    times = {A: 3.0, B: 1.0, C: 2.0}
    assert autotune.best("key", [A, B, C], times.__getitem__, path) == B
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]

    def never(candidate):
        raise AssertionError("timed again")

    for _ in range(2):  # from memory, then from the file
        assert autotune.best("key", [A, B, C], never, path) == B
        monkeypatch.setattr(autotune, "_answers", {})
    assert autotune.best("another", [A, C], times.__getitem__, path) == C
    assert set(json.loads(path.read_text())) == {"key", "another"}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"key": 1}', '{"key": {"up": {}}}', '{"key": {"up": 3}}'],
)
def test_a_broken_file_is_ignored_and_mended(tmp_path, content):
    path = tmp_path / "tiles.json"
    path.write_text(content)
    assert autotune.best("key", [A, B], {A: 2.0, B: 1.0}.__getitem__, path) == B
    assert list(json.loads(path.read_text())) == ["key"]


def test_a_stored_answer_that_is_no_candidate_any_more_is_timed_again(
    tmp_path, monkeypatch
):
    path = tmp_path / "tiles.json"
    autotune.best("key", [A], lambda candidate: 1.0, path)
    monkeypatch.setattr(autotune, "_answers", {})
    assert autotune.best("key", [B, C], {B: 2.0, C: 1.0}.__getitem__, path) == C


def test_what_cannot_run_loses_and_if_nothing_runs_nothing_is_stored(tmp_path):
    def timer(candidate):
        if candidate != C:
            raise RuntimeError("out of shared memory")
        return 9.0

    path = tmp_path / "tiles.json"
    assert autotune.best("key", [A, B, C], timer, path) == C
    assert autotune.best("no", [A, B], timer, path) == A
    assert list(json.loads(path.read_text())) == ["key"]


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "tiles.json"
    assert autotune.best("key", [A, B], {A: 2.0, B: 1.0}.__getitem__, path) == B


def test_the_cache_lies_where_the_system_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / "moe_course" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / ".cache" / "moe_course" / "tiles.json"


def test_the_option_reaches_the_clock_on_a_gpu_alone(compiled, monkeypatch, tmp_path):
    """A GPU that is only named: the timer is called for every candidate, while a graph is captured for none."""
    compiled((9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timed = []

    def time_layer(candidate, *layer):
        timed.append(candidate)
        return -len(timed)  # the last is the fastest

    capturing = False
    monkeypatch.setattr(autotune, "_time_layer", time_layer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    layer = {
        "slots": 65536,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda"),
    } | QWEN3
    first, *_, last = candidates(**layer)
    assert choose(**layer) == first
    monkeypatch.setenv("MOE_COURSE_AUTOTUNE", "1")
    assert choose(**layer) == last
    assert (
        choose(**layer | {"slots": 65000}) == last
    )  # as many rows, up to a power of 2
    assert len(timed) == len(candidates(**layer))
    assert choose(**layer | {"device": CPU}) == first
    capturing = True
    other = layer | {"num_experts": 64}
    assert choose(**other) == candidates(**other)[0]
    capturing = False
    assert choose(**other) == candidates(**other)[0]  # as it was captured


@pytest.mark.skipif(not tiles.INTERPRETED, reason="with a GPU, the clock itself runs")
@pytest.mark.parametrize("halves", [1, 2])
def test_a_candidate_is_timed_on_a_whole_layer_with_its_tiles(monkeypatch, halves):
    used = []

    def bench(layer, **options):
        layer()
        return 0.5

    def choose(*layer):
        used.append(autotune._trial)
        return autotune.choose(*layer)

    monkeypatch.setattr(autotune.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(sys.modules[fused_moe.__module__], "choose", choose)
    candidate = Tiles(*[Tile(16, 16, 16, group_m=2)] * 5)
    layer = (8, 2, 16, 16, halves, torch.float32, CPU)
    assert autotune._time_layer(candidate, *layer) == 0.5
    assert used == [candidate] * 2  # forward and backward
    assert autotune._trial is None
