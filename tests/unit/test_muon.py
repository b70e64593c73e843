"""`navit.train.muon`: torch's orthogonal updates. On several ranks: test_distributed.py."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.train.muon import orthogonalize


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_matrix_is_orthogonalised_to_the_bits_of_torchs_muon(
    rows: int, cols: int, seed: int
) -> None:
    grad = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    weight = torch.nn.Parameter(torch.zeros(rows, cols))
    weight.grad = grad
    muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    muon.step()
    group = muon.param_groups[0]

    found = orthogonalize(
        grad, coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
    )

    assert torch.equal(found.float() * max(1, rows / cols) ** 0.5, -weight.detach())
