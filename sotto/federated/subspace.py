"""Codecs that keep the directions in which updates really lie: of public text, or of what was released before.

A random projection of k of n numbers keeps the cosine sqrt(k / n) of an update, whatever the update is. Gradients of a
model on similar text lie near a subspace of few dimensions, so k numbers along *these* keep most of it, and the noise
of n - k others is never added (Yu et al. 2021, arXiv:2102.12677, GEP; Zhou et al. 2021, arXiv:2007.03813).

Shape legend: n elements of an update, k of a latent, m public gradients, r learned directions, q probes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from sotto.errors import SottoError
from sotto.federated.codec import Srht

BASIS = "basis"


class Subspace:
    """Coordinates along orthonormal directions of public gradients: Q u, and back by Q^T z."""

    def __init__(self, basis_kn: torch.Tensor):
        self._basis_kn = basis_kn.float().contiguous()

    @property
    def size(self) -> int:
        return self._basis_kn.shape[0]

    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        return self._basis_kn @ update_n.float().cpu()

    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        return latent_k.float().cpu() @ self._basis_kn

    def spec(self) -> dict[str, Any]:
        return {"codec": "subspace", "latent": self.size, "size": self._basis_kn.shape[1]}

    def state(self) -> dict[str, torch.Tensor]:
        """(k, n) what a device needs to encode, and a checkpoint to go on."""
        return {BASIS: self._basis_kn}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes what `state` gave.

        Raises:
          SottoError: SOT935, it is of another shape, or its rows are not orthonormal.
        """
        self._basis_kn = _orthonormal(state, self._basis_kn.shape)

    def learn(self, update_n: torch.Tensor) -> None:
        """Nothing: what is public text's stays as it is."""


class Learned:
    """Directions of the last releases, and random ones beside them through which new ones come in.

    With B the (r, n) orthonormal directions and P a random projection of the round, a latent is (B u, P (u - B^T B u)),
    and decoding is its pseudo-inverse. B follows the decoded *noised* aggregates alone: post-processing.
    """

    def __init__(self, size: int, latent: int, key: str):
        self._n, self._probes = size, max(1, latent // 4)
        self._most = latent - self._probes
        self._random = Srht(size, self._probes, key)
        self._rows: list[torch.Tensor] = []
        self._basis_rn = torch.zeros(self._most, size)

    @property
    def size(self) -> int:
        return self._most + self._probes

    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        u_n = update_n.float().cpu()
        along_r = self._basis_rn @ u_n
        return torch.cat([along_r, self._random.encode(u_n - along_r @ self._basis_rn, step)])

    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        along_r, probed_q = latent_k.float().cpu().split([self._most, self._probes])
        rest_n = self._random.decode(probed_q, step)
        return along_r @ self._basis_rn + rest_n - (self._basis_rn @ rest_n) @ self._basis_rn

    def spec(self) -> dict[str, Any]:
        return {"codec": "learned", "size": self._n, "latent": self.size, "key": self._random.key}

    def state(self) -> dict[str, torch.Tensor]:
        """(r, n) orthonormal rows, those that are not learned yet zero."""
        return {BASIS: self._basis_rn}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Subspace.restore`."""
        self._basis_rn = _orthonormal(state, self._basis_rn.shape)

    def learn(self, update_n: torch.Tensor) -> None:
        """Takes in a decoded release: it becomes the first direction, and the last one is forgotten."""
        rows_rn = torch.cat([update_n.float().cpu()[None], self._basis_rn[: self._most - 1]])
        basis_rn = torch.zeros(self._most, self._n)
        kept = 0
        for row_n in rows_rn.double():  # Gram-Schmidt, twice, so that rounding leaves no overlap
            for _ in range(2):
                row_n = row_n - (basis_rn[:kept].double() @ row_n) @ basis_rn[:kept].double()
            norm = float(row_n.norm())
            if norm > 1e-6 * max(1e-30, float(rows_rn[0].norm())):
                basis_rn[kept] = (row_n / norm).float()
                kept += 1
        self._basis_rn = basis_rn


def top_directions(gradients_mn: torch.Tensor, latent: int) -> torch.Tensor:
    """(k, n) orthonormal directions in which rows vary most about zero, by the eigenvectors of their (m, m) products.

    Raises:
      SottoError: SOT936, the rows have fewer than k independent directions.
    """
    g_mn = gradients_mn.float()
    values_m, vectors_mm = torch.linalg.eigh((g_mn @ g_mn.T).double())
    usable = int((values_m > 1e-10 * values_m[-1].clamp(min=1e-30)).sum())
    if usable < latent:
        raise SottoError(
            "SOT936", what=f"the public text has {usable} independent gradients, and setting.latent is {latent}",
            where="setting.public_data", why="a subspace has at most as many directions as gradients that span it",
            fix="lower setting.latent, or bring more public text",
        )  # fmt: skip
    top_mk = vectors_mm[:, -latent:].flip(1) / values_m[-latent:].flip(0).sqrt()
    rough_kn = top_mk.T.float() @ g_mn
    return torch.linalg.qr(rough_kn.T)[0].T.contiguous()


def _orthonormal(state: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    basis = state.get(BASIS)
    good = basis is not None and basis.shape == shape and bool(torch.isfinite(basis).all())
    if good:
        assert basis is not None
        products = basis.float() @ basis.float().T
        diagonal = products.diagonal()
        # Rows of zeros have not been learned yet.
        good = bool(((products - torch.diag(diagonal)).abs() < 1e-3).all()) and bool(
            (((diagonal - 1).abs() < 1e-3) | (diagonal == 0)).all()
        )
    if not good:
        raise SottoError(
            "SOT935", what="these are not the directions of this codec", where="codec",
            why="an update would be turned into something else", fix="use the codec of the run's own checkpoint",
        )  # fmt: skip
    assert basis is not None
    return basis.float().contiguous()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of a codec's tensors; "" without any."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest() if state else ""
