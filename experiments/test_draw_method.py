"""The pictures of the method show what the code does."""
import pytest
import torch

import draw_method
import lorc
from cache import GROUP, BiBranchCache


@pytest.mark.parametrize("n", [1, 4, 30, 36, 60, 68, 100, 150])
def test_the_picture_of_the_bibranch_cache_is_what_the_cache_holds(n):
    """Sinks, full groups of rounded latents, latents that wait, window. Kills: a group of another
    size, a window that holds one token more."""
    basis = lorc.basis(torch.eye(4), 2)
    cache = BiBranchCache(1, 200, basis, basis, 2, bits=4)
    for _ in range(n):
        cache.append(*torch.randn(2, 1, 1, 2, 2), rope=None)
    sinks, latents, ring = cache.positions()
    tokens = latents.stop - latents.start
    held = {"sink": sinks.stop, "rounded": tokens // GROUP * GROUP, "waiting": tokens % GROUP,
            "window": len(ring)}
    drawn = draw_method.spans(n)
    assert sum(size for _, size in drawn) == n
    assert held == {kind: sum(size for name, size in drawn if name == kind) for kind in held}


def test_every_picture_of_the_method_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_method.main(["--figures", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("method_*.png"))) >= 3
