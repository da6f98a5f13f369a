"""Turn a face upright by five points of it, to where ArcFace's training had them.

Source: InsightFace's `utils/face_align.py` (`arcface_dst`, `norm_crop`); the similarity is the least-squares one of
S. Umeyama, Least-Squares Estimation of Transformation Parameters Between Two Point Patterns, PAMI 13(4), 1991.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Where eyes, nose and corners of the mouth lie in a face of 112 × 112 pixels, left before right as one sees them."""


def upright(pixels: NDArray[np.uint8], points: NDArray[np.floating], side: int) -> NDArray[np.uint8]:
    """The face whose five points [5, 2] in `pixels` [height, width, 3] are given, uint8 [side, side, 3].

    `side` is a multiple of 112, or of 128: then 16 pixels of each 128 are beside what 112 show. What lies outside of
    the picture is black.
    """
    import cv2

    ratio, beside = (side / 112, 0.0) if side % 112 == 0 else (side / 128, 8.0 * side / 128)
    target = POINTS * np.float32(ratio) + np.array([beside, 0], np.float32)
    warped = cv2.warpAffine(pixels, similarity(points, target), (side, side), borderValue=0.0)
    return np.asarray(warped, np.uint8)


def similarity(points: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rotation, scale and shift [2, 3] that bring points [n, 2] nearest to target [n, 2]."""
    source, goal = points.astype(np.float64), target.astype(np.float64)
    source_mean, goal_mean = source.mean(axis=0), goal.mean(axis=0)
    covariance = (goal - goal_mean).T @ (source - source_mean) / len(source)
    left, stretch, right = np.linalg.svd(covariance)
    # No mirror image: it would be nearer to points that are mirrored themselves.
    flip = np.array([1.0, np.sign(np.linalg.det(covariance)) or 1.0])
    rotation = left @ np.diag(flip) @ right
    scale = (stretch * flip).sum() / source.var(axis=0).sum()
    return np.column_stack([scale * rotation, goal_mean - scale * rotation @ source_mean])
