"""The texts of an index as points of a plane, near where their meanings are near."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import numpy as np

from lusifer.publishing import write_json
from lusifer.search.store import Store

logger = logging.getLogger(__name__)

MOST_POINTS = 3000
_MOST_CHARACTERS = 300  # Of a text beside its point.
_NEIGHBOURS = 15  # UMAP's usual number.


def plane(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, dim) float32 unit vectors as (n, 2) float32 points between 0 and 1, and the method.

    UMAP (McInnes et al. 2018) on cosine distances, or PCA where umap-learn is not installed or there are too few texts.
    """
    try:
        from umap import UMAP
    except ImportError:
        UMAP = None
    if UMAP is None or len(vectors) <= _NEIGHBOURS:
        points, method = _principal_components(vectors), "PCA"
    else:
        # One thread and a seed: the same index looks the same each time.
        # Translations are so near each other that at UMAP's own min_dist, 0.1, they would be one dot.
        umap = UMAP(n_neighbors=_NEIGHBOURS, min_dist=0.6, metric="cosine", random_state=0, n_jobs=1)
        points, method = umap.fit_transform(vectors), "UMAP"
    low, high = points.min(axis=0, initial=np.inf), points.max(axis=0, initial=-np.inf)
    return ((points - low) / np.maximum(high - low, 1e-9)).astype(np.float32), method


def _principal_components(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(axis=0) if len(vectors) else vectors
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:2].T
    return np.pad(projected, ((0, 0), (0, 2 - projected.shape[1])))


class CorpusMap:
    """The map of an index, computed once in a thread and kept in the index's folder."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._map: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._failed = ""

    def get(self) -> dict[str, Any]:
        """The map, or how far it is.

        Returns:
            ``status`` (``ready``, ``computing`` or ``failed``) and, when ready, ``method``, ``version`` and ``points``:
            dictionaries of ``id``, ``text``, ``lang``, ``x`` and ``y`` between 0 and 1.
        """
        version = self.store.version()
        with self._lock:
            if self._map is None or self._map["version"] != version:
                self._map = self._stored(version)
            if self._map is not None:
                return self._map
            if self._failed == version:
                return {"status": "failed"}
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._draw, args=(version,), name="map", daemon=True)
                self._thread.start()
        return {"status": "computing"}

    def _stored(self, version: str) -> dict[str, Any] | None:
        """The map in the folder, if it is of this version."""
        if self.store.folder is None:
            return None
        try:
            stored = json.loads((self.store.folder / "map.json").read_text(encoding="utf-8"))
            return stored if stored["version"] == version else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # Missing or damaged: it is only derived, and is made again.

    def _draw(self, version: str) -> None:
        try:
            entries, vectors = self.store.sample(MOST_POINTS)
            points, method = plane(vectors)
            places = [
                {"id": one.id, "text": one.text[:_MOST_CHARACTERS], "lang": one.lang, "x": x, "y": y}
                for one, (x, y) in zip(entries, points.round(4).astype(float).tolist(), strict=True)
            ]
            drawn = {"status": "ready", "version": version, "method": method, "points": places}
            with self._lock:
                self._map = drawn
            if self.store.folder is not None:
                write_json(self.store.folder / "map.json", drawn, indent=None)
        except OSError:
            logger.warning("the map cannot be saved in %s; it is computed again next time", self.store.folder)
        except Exception:
            # The search must go on without a map, whatever a numerical library dislikes.
            logger.exception("the map of the corpus cannot be drawn")
            self._failed = version
