"""A checkpoint of another optimizer is refused and changes nothing, or it fits, and the next step is ordinary."""

import copy
import io
import random
import zipfile

import pytest
import torch

from tests.cases import SEEDS, OptimizerCase, run, set_gradients
from tests.lab.test_kill import same_tensors


@pytest.mark.parametrize("case", SEEDS, ids=str)
def test_a_foreign_checkpoint_is_refused_whole_or_works(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    refused = 0
    for other in random.Random(case.name).sample([x for x in SEEDS if x.state != case.state], 6):
        saved = run(other, 2)[1].state_dict()
        before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ps)
        try:
            optimizer.load_state_dict(saved)
        except ValueError:
            refused += 1
            assert same_tensors(optimizer.state_dict(), before), other
        assert all(map(torch.equal, ps, weights))
        set_gradients(ps, 3)
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in ps), other
        ps, optimizer = run(case, 2)
    assert refused >= 3


def test_the_file_of_torch_save_carries_checksums_that_see_each_flipped_bit_of_a_tensor() -> None:
    """What docs/trust.md says about checking a checkpoint of your own before it is loaded."""
    content = io.BytesIO()
    torch.save(run(SEEDS[0], 2)[1].state_dict(), content)
    saved, draw = content.getvalue(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        assert archive.testzip() is None
        inside = [x for x in archive.infolist() if "/data/" in x.filename and x.file_size]
    for _ in range(100):
        entry = draw.choice(inside)
        start = saved.index(entry.filename.encode()) + len(entry.filename)
        flipped = bytearray(saved)
        # Behind the name come padding and the tensor, which fills the end of what lies before the next header.
        end = min((x.header_offset for x in inside if x.header_offset > entry.header_offset), default=None)
        if end is None:
            continue
        at = draw.randrange(max(start, end - entry.file_size - 16), end - 16)
        flipped[at] ^= 1 << draw.randrange(8)
        with zipfile.ZipFile(io.BytesIO(bytes(flipped))) as archive:
            assert archive.testzip() is not None or _loads_the_same(bytes(flipped), saved)


def _loads_the_same(flipped: bytes, saved: bytes) -> bool:
    found = [torch.load(io.BytesIO(x), weights_only=True) for x in (flipped, saved)]
    return same_tensors(*found)
