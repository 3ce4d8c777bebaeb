"""What a node has by its file, and what is wrong with a file in words that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from p2p import cgroups
from p2p.cgroups import Limits
from p2p.gpus import Reading
from p2p.resources import ResourcesError, detect
from tests.nodes import ROOT


def write(folder: Path, body: Any) -> Path:
    path = folder / "resources.yaml"
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    return path


def test_gpus_by_a_file_with_all_that_a_test_may_say(tmp_path: Path) -> None:
    one = {"model": "A40", "memory_mb": 46_000, "uuid": "GPU-a", "compute_capability": "8.6", "memory_used_mb": 6_000,
           "numa_node": 1, "nvlink": "left", "utilization": 40}  # fmt: skip
    two = {"model": "A40", "memory_mb": 46_000, "nvlink": "left"}
    three = {"model": "T4", "memory_mb": 15_000, "nvlink": "right"}
    found = detect(tmp_path, write(tmp_path, {"cpus": 4, "memory_mb": 100, "gpus": [one, two, three]}))
    first, second, third = found.look().gpus
    assert (first.uuid, first.used_mb, first.numa_node, first.links, first.utilization, first.compute_capability) == (
        "GPU-a", 6_000, 1, ("GPU-1",), 40.0, "8.6",
    )  # fmt: skip
    assert first.processes == 1
    assert (second.uuid, second.links, second.utilization, second.used_mb) == ("GPU-1", ("GPU-a",), None, 0)
    assert third.links == ()
    offer = found.offer("n1", found.look())
    assert (offer.cpus, offer.memory_mb, len(offer.gpus)) == (4, 100, 3)


def test_a_recording_is_found_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "rec.json").write_text((ROOT / "tests/data/nvml/two_h100.json").read_text())
    found = detect(tmp_path, write(tmp_path, {"fixture": "rec.json"}))
    assert [gpu.model for gpu in found.look().gpus] == ["NVIDIA H100 80GB HBM3"] * 2
    told = found.as_json(found.look())
    assert (told["gpu_driver"], told["cuda"], told["gpu_error"]) == ("550.54.15", "12.4", None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"gpu": []}, "gpu: Extra inputs"),
        ({"gpus": [{"model": "A40", "memory_mb": 1, "vram": 2}]}, "gpus.0.vram: Extra inputs"),
        ({"gpus": [{"model": "A40"}]}, "gpus.0.memory_mb: Field required"),
        ({"gpus": [{"model": "A40", "memory_mb": 1, "utilization": 101}]}, "gpus.0.utilization"),
        ({"gpus": [{"model": "A40", "memory_mb": 1, "numa_node": -2}]}, "gpus.0.numa_node"),
        ({"gpus": [], "fixture": "x.json"}, "leave one of them out"),
        (
            {"gpus": [{"model": "A", "memory_mb": 1, "uuid": "G"}, {"model": "A", "memory_mb": 1, "uuid": "G"}]},
            "uuid G",
        ),
        ({"cpus": 0}, "cpus"),
        ("[", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, body: Any, message: str) -> None:
    with pytest.raises(ResourcesError, match=message.replace("(", r"\(")):
        detect(tmp_path, write(tmp_path, body))


def test_cgroups_bound_what_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = detect(tmp_path, None)
    monkeypatch.setattr(cgroups, "limits", lambda: Limits(0.5, 64 << 20))
    found = detect(tmp_path, None)
    assert (found.cpus, found.memory_mb) == (0.5, 64)
    monkeypatch.setattr(cgroups, "limits", lambda: Limits(10_000.0, 1 << 60))
    assert (detect(tmp_path, None).cpus, detect(tmp_path, None).memory_mb) == (free.cpus, free.memory_mb)


def test_what_others_are_told_does_not_change_with_every_look(tmp_path: Path) -> None:
    """It is sent to every node when its hash changes."""
    body = {"cpus": 1, "memory_mb": 1, "disk_mb": 1}
    gpu = {"model": "A40", "memory_mb": 46_000}
    quiet = detect(tmp_path, write(tmp_path, {**body, "gpus": [gpu]}))
    busy = detect(tmp_path, write(tmp_path, {**body, "gpus": [{**gpu, "memory_used_mb": 9_000, "utilization": 77}]}))
    assert quiet.as_json(quiet.look()) == busy.as_json(busy.look())
    assert quiet.as_json(quiet.look()) != quiet.as_json(Reading(gpus=quiet.look().gpus).in_doubt("NVML hangs"))
