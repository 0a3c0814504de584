"""Windows of a grid: cut and joined again, and who sees whom in a shifted one, against loops over positions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.models.windows import Windows

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.booleans())


def windows_by_loop(grid: Windows) -> list[list[tuple[int, int] | None]]:
    """Positions of each window, in rows; None for one outside the grid."""
    height, width = grid.padded
    found = []
    for top in range(0, height, grid.side):
        for left in range(0, width, grid.side):
            window: list[tuple[int, int] | None] = []
            for row in range(top, top + grid.side):
                for column in range(left, left + grid.side):
                    y, x = (row + grid.shift) % height, (column + grid.shift) % width
                    window.append((y, x) if y < grid.height and x < grid.width else None)
            found.append(window)
    return found


@settings(derandomize=True, deadline=None, max_examples=60)
@given(GRIDS)
def test_windows_hold_each_position_once_and_come_back(case: tuple[int, int, int, bool]) -> None:
    height, width, side, shifted = case
    grid = Windows.of(height, width, side, shifted=shifted)
    x_SBD = torch.arange(1.0, height * width * 2 + 1).view(height * width, 2, 1)
    cut_WND = grid.cut(x_SBD)
    assert cut_WND.shape == (grid.side**2, grid.number * 2, 1)
    for number, window in enumerate(windows_by_loop(grid)):
        for place, position in enumerate(window):
            expected = [0.0, 0.0] if position is None else x_SBD[position[0] * width + position[1], :, 0].tolist()
            assert cut_WND[place, 2 * number : 2 * number + 2, 0].tolist() == expected
    assert torch.equal(grid.join(cut_WND), x_SBD)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(GRIDS)
def test_a_shifted_window_separates_opposite_sides(case: tuple[int, int, int, bool]) -> None:
    """Two positions of a window see each other if they are as near in the (filled up) picture as in the window."""
    height, width, side, shifted = case
    grid = Windows.of(height, width, side, shifted=shifted)
    mask = grid.mask(torch.device("cpu"))
    assert (mask is None) == (grid.shift == 0)
    if mask is None:
        return
    down, across = grid.padded
    for number in range(grid.number):
        top, left = (number // (across // side)) * side, (number % (across // side)) * side
        places = [(top + i // side + grid.shift, left + i % side + grid.shift) for i in range(side * side)]
        wrapped = [(y >= down, x >= across) for y, x in places]
        expected = torch.tensor([[a == b for b in wrapped] for a in wrapped])
        assert torch.equal(mask[number, 0], expected)


def test_a_window_as_large_as_the_grid_is_whole_and_not_shifted() -> None:
    for side in (4, 5, 100):
        assert Windows.of(4, 4, side, shifted=True) == Windows(4, 4, 4, 0)
    assert Windows.of(4, 9, 6, shifted=True) == Windows(4, 9, 4, 0)
    assert Windows.of(1, 1, 7, shifted=True).cut(torch.zeros(1, 3, 2)).shape == (1, 3, 2)


def test_distances_are_numbered_and_scaled() -> None:
    grid = Windows.of(8, 8, 4, shifted=False)
    index, distances = grid.index(torch.device("cpu")), grid.distances(torch.device("cpu"))
    for i in range(16):
        for j in range(16):
            away = torch.tensor([i // 4 - j // 4, i % 4 - j % 4], dtype=torch.float64) / 3 * 8
            expected = torch.sign(away) * torch.log2(1 + away.abs()) / 3
            torch.testing.assert_close(distances[index[i, j]].double(), expected, rtol=1e-6, atol=1e-7)
    assert len(distances) == 49 and index.unique().numel() == 49
    wide = Windows.of(8, 8, 4, shifted=False).distances(torch.device("cpu"), trained_side=7)
    assert wide.max() < 1.0 < distances.max() + 0.1
    assert Windows.of(1, 1, 1, shifted=False).distances(torch.device("cpu")).tolist() == [[0.0, 0.0]]
