"""What is drawn: gains over the first look at √KL."""

from __future__ import annotations

from tasks.run.monitor.picture import draw, points

LOOKS = [
    {"kl_nats": -1e-9, "proxy": 1.0, "judge": 0.5},
    {"kl_nats": 4.0, "proxy": 1.5, "judge": 0.75},
    {"kl_nats": 9.0, "proxy": 2.0, "judge": 0.25},
]


def test_points_by_hand():
    found = points(LOOKS)
    assert found == {"proxy": [(0, 0), (2, 0.5), (3, 1.0)], "judge": [(0, 0), (2, 0.25), (3, -0.25)]}
    assert set(points([{"kl_nats": 0.0, "proxy": 1.0}])) == {"proxy"} and points([]) == {}


def test_the_same_bytes_twice(tmp_path):
    first, second = (draw(tmp_path / name, LOOKS).read_bytes() for name in "ab")
    assert first == second and first.startswith(b"\x89PNG")
    assert draw(tmp_path / "c", [{k: v for k, v in look.items() if k != "judge"} for look in LOOKS]).is_file()
