"""Recipes for machines that are not reached by ssh: a batch script for Slurm, manifests for Kubernetes. The texts lie in `recipes/`."""

from __future__ import annotations

from importlib import resources
from typing import Final

FILES: Final = {"slurm": "slurm.sh", "k8s": "k8s.yaml"}


def text(kind: str) -> str:
    """Return a recipe. KeyError: there is none of that kind."""
    return (resources.files("zray.launcher") / "recipes" / FILES[kind]).read_text(encoding="utf-8")
